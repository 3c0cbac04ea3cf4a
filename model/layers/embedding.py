"""The embedding, with a gradient that is summed in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.megatron import (
    VocabParallelEmbedding,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from model.precision import wide_dtype


class _Rows(torch.autograd.Function):
    """`F.embedding`, whose gradient is summed in float32 at least and not rounded.

    A frequent token has thousands of rows in a chunk. PyTorch adds them up in the precision of the matrix, on a CPU
    one by one: in bfloat16 what is below 1/256 of the sum so far is lost. A matrix whose `grad_dtype` is None takes the
    float32 sums as they are, another one gets them rounded.
    """

    @staticmethod
    def forward(ctx, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows = weight.shape[0]
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        gradient = gradient.to(wide_dtype(gradient.dtype))
        return None, torch.ops.aten.embedding_dense_backward(gradient, tokens, ctx.rows, -1, False)


class Embedding(VocabParallelEmbedding):
    """Megatron's embedding over a vocabulary that is split over tensor-parallel ranks."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Rows `[b, s, h]` of tokens `[b, s]`; with `reduce_scatter_embeddings` this rank's part of `[s, b, h]`."""
        if self.tp_group.size() == 1:
            rows = _Rows.apply(tokens, self.weight)
        else:
            elsewhere = (tokens < self.vocab_start_index) | (tokens >= self.vocab_end_index)
            rows = _Rows.apply((tokens - self.vocab_start_index).masked_fill(elsewhere, 0), self.weight)
            rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        if self.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(rows.transpose(0, 1).contiguous(), group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)
