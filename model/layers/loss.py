"""Cross entropy over a vocabulary that is split over tensor-parallel ranks.

The logits are the largest tensor of a step. They live once: a forward pass keeps them as they came from the output
matrix (2 bytes each in bfloat16), and the backward pass turns them into their own gradient. What the softmax needs in
float32 is made for some rows at a time. Megatron's version, which gives the same numbers to the last bit, keeps the
softmax in float32 and holds it beside the logits on the way there and back: 4 bytes each from forward to backward and 6
to 8 at the peak, against 2 to 4 here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

BLOCK_ELEMENTS = 2**22
"""Of the logits that are wide at once: 16 MiB in float32, at 128,256 tokens 32 rows."""


def _vocabulary_start(logits: Tensor) -> int:
    return parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]


def _owned(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Index of each label among this rank's columns (0 where it is another rank's), and whether it is this rank's."""
    local = labels - _vocabulary_start(logits)
    owned = (local >= 0) & (local < logits.shape[-1])
    return local.where(owned, 0), owned


def _reduce(x: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """`x`, in place, over the ranks that share the vocabulary."""
    dist.all_reduce(x, op=op, group=parallel_state.get_tensor_model_parallel_group())
    return x


def _global_max(logits: Tensor) -> Tensor:
    return _reduce(logits.detach().amax(dim=-1), dist.ReduceOp.MAX)


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows that are small enough to be wide."""
    step = max(1, BLOCK_ELEMENTS // columns)
    return (slice(first, first + step) for first in range(0, rows, step))


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy `[...]` of every token, in float32 at least, from this rank's columns `[..., vocabulary / tp]`.

    The backward pass overwrites `logits`, which nothing may read after it.
    """
    return _TokenLosses.apply(logits, labels)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        index, owned = (x.flatten() for x in _owned(logits, labels))
        rows = logits.view(-1, logits.shape[-1])
        maximum = _global_max(rows).to(wide)
        total = torch.empty_like(maximum)
        for block in _blocks(*rows.shape):
            total[block] = (rows[block] - maximum[block].unsqueeze(-1)).exp_().sum(dim=-1)
        target = rows.gather(-1, index.unsqueeze(-1)).squeeze(-1).to(wide) - maximum
        target = _reduce(target.where(owned, 0))
        total = _reduce(total)
        ctx.save_for_backward(logits, maximum, total, index, owned)
        return (total.log() - target).view(labels.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        logits, maximum, total, index, owned = ctx.saved_tensors
        rows, gradient = logits.view(-1, logits.shape[-1]), gradient.flatten()
        at = torch.arange(len(index), device=index.device)
        for block in _blocks(*rows.shape):
            softmax = (rows[block] - maximum[block].unsqueeze(-1)).exp_()
            softmax /= total[block].unsqueeze(-1)
            softmax[at[: len(softmax)], index[block]] -= owned[block].to(softmax.dtype)
            rows[block] = softmax.mul_(gradient[block].unsqueeze(-1))
            del softmax  # else it would live while the next one is made
        return logits, None


@torch.no_grad()
def token_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Bool `[...]`: whether the label has the largest logit, i.e. greedy decoding would give it."""
    maximum = _global_max(logits)
    index, owned = _owned(logits, labels)
    hit = (logits.gather(-1, index.unsqueeze(-1)).squeeze(-1) >= maximum) & owned
    return _reduce(hit.to(torch.int32), dist.ReduceOp.MAX).bool()
