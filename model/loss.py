"""Cross entropy over a vocabulary that is split over tensor-parallel ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region, vocab_parallel_cross_entropy
from torch import Tensor


def _vocabulary_start(logits: Tensor) -> int:
    return parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]


def _owned(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Index of each label among this rank's columns (0 where it is another rank's), and whether it is this rank's."""
    local = labels - _vocabulary_start(logits)
    owned = (local >= 0) & (local < logits.shape[-1])
    return local.where(owned, 0), owned


def _global_max(logits: Tensor) -> Tensor:
    maximum = logits.detach().amax(dim=-1)
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=parallel_state.get_tensor_model_parallel_group())
    return maximum


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy `[...]` of every token, in float32 at least, from this rank's columns `[..., vocabulary / tp]`.

    Megatron's own version rounds its input to float32; float64 logits (parity tests) take the same sums in float64.
    """
    if logits.dtype != torch.float64:
        # Megatron's version works in place: it must not get the caller's own float32 logits.
        return vocab_parallel_cross_entropy(logits.float().clone() if logits.dtype == torch.float32 else logits, labels)
    shifted = logits - _global_max(logits).unsqueeze(-1)
    index, owned = _owned(logits, labels)
    target = shifted.gather(-1, index.unsqueeze(-1)).squeeze(-1) * owned
    total = reduce_from_tensor_model_parallel_region(shifted.exp().sum(dim=-1))
    return total.log() - reduce_from_tensor_model_parallel_region(target)


@torch.no_grad()
def token_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Bool `[...]`: whether the label has the largest logit, i.e. greedy decoding would give it."""
    maximum = _global_max(logits)
    index, owned = _owned(logits, labels)
    hit = (logits.gather(-1, index.unsqueeze(-1)).squeeze(-1) >= maximum) & owned
    hit = hit.to(torch.int32)
    dist.all_reduce(hit, op=dist.ReduceOp.MAX, group=parallel_state.get_tensor_model_parallel_group())
    return hit.bool()
