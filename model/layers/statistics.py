"""What a layer's memory does, in numbers for people: measured beside the forward pass, never part of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import LayerShape
from model.rules.state import State

GATE_BINS = 20
"""Bins of the write-gate histogram over [0, 1]."""


class MemoryStatistics(NamedTuple):
    """What one layer's memory does in one window, for this rank's heads; detached, float32."""

    mix_gate: Tensor
    """The memory's share of the output where it holds something, `[query heads]`: the floor and sigmoid(beta), or the
    mean over tokens."""
    memory_share: Tensor
    """Size of the memory's part of the output relative to both parts, `[query heads]`, in 0..1."""
    write_gate: Tensor
    """Mean write gate, `[key/value heads]`; ones without a write gate."""
    write_gate_histogram: Tensor
    """Tokens per bin of the write gate, `[key/value heads, GATE_BINS]`."""
    memory_norm: Tensor
    """Frobenius norm of M carried out, mean over lanes, `[key/value heads]`."""
    normaliser_norm: Tensor
    """Norm of z carried out, mean over lanes, `[key/value heads]`; zeros for rules without z."""
    effective_rank: Tensor
    """exp of the entropy of M's singular values (divided by their sum), mean over lanes, `[key/value heads]`; 0 where M
    is empty, d at most."""
    read_variation: Tensor
    """How much the memory's part differs between the tokens of a segment: the root mean square of its deviation from
    the segment's mean, relative to its own, `[query heads]`, in 0..1; 0 where nothing is read."""


def statistics_shapes(layer: LayerShape) -> MemoryStatistics:
    """The shape of every field, for a layer (or a rank's part of it)."""
    heads, groups = (layer.heads,), (layer.groups,)
    return MemoryStatistics(
        mix_gate=heads,
        memory_share=heads,
        write_gate=groups,
        write_gate_histogram=(layer.groups, GATE_BINS),
        memory_norm=groups,
        normaliser_norm=groups,
        effective_rank=groups,
        read_variation=heads,
    )


_forward = True


def once() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """The `context_fn` of a checkpoint whose recomputation is not to measure again: nobody reads what it gives."""
    return contextlib.nullcontext(), _recomputing()


@contextlib.contextmanager
def _recomputing() -> Iterator[None]:
    global _forward
    _forward = False
    try:
        yield
    finally:
        _forward = True


@torch.no_grad()
def measure(
    share: Tensor,
    shown: Tensor,
    read: Tensor,
    local: Tensor,
    gate: Tensor | None,
    memory: State,
    blind: Tensor | None = None,
) -> MemoryStatistics | None:
    """Statistics of a window; None in a recomputation.

    Args:
        share: the memory's share of the output where it holds something, see `InfiniAttention.memory_share`.
        shown: its share of the output, see `InfiniAttention.shown_share`.
        read: what the memory gives, `[b, t+p, n, r, s, d]`.
        local: what the local attention gives, `[b*(t+p)*n, r, s, d]`.
        gate: write gate `[b, t, n, s]`, or None without one.
        memory: carried out.
        blind: bool `[b, t+p, s]`: the token reads nothing, whatever the memory holds; None where all read.
    """
    if not _forward:
        return None
    groups = memory.M.shape[1]
    local = ((1 - shown) * local.view(read.shape)).flatten(2, 3)
    read = (shown * read).flatten(2, 3)
    read_size = read.norm(dim=-1).mean(dim=(0, 1, 3))
    local_size = local.norm(dim=-1).mean(dim=(0, 1, 3))
    if gate is None:
        gate = read.new_ones(1, 1, groups, 1)
    per_head = gate.transpose(0, 2).flatten(1)
    histogram = torch.stack([torch.histc(row.float(), GATE_BINS, 0.0, 1.0) for row in per_head])
    z = getattr(memory, "z", None)
    return MemoryStatistics(
        mix_gate=share.mean(dim=(0, 1, 4, 5)).flatten().float(),
        memory_share=(read_size / (read_size + local_size).clamp_min(1e-30)).float(),
        write_gate=per_head.mean(dim=1).float(),
        write_gate_histogram=histogram,
        memory_norm=memory.M.flatten(2).norm(dim=-1).mean(dim=0).float(),
        normaliser_norm=read.new_zeros(groups).float() if z is None else z.norm(dim=-1).mean(dim=0).float(),
        effective_rank=effective_rank(memory.M).mean(dim=0).float(),
        read_variation=read_variation(read, blind).float(),
    )


def effective_rank(matrices: Tensor) -> Tensor:
    """exp of the entropy of the singular values of `[..., d, e]`, divided by their sum.

    0 for a matrix of zeros, NaN for one that is not finite.

    Roy and Vetterli, The effective rank (EUSIPCO 2007).
    """
    finite = torch.isfinite(matrices).all(dim=-1).all(dim=-1)
    # The library raises where there is no decomposition. By M^T M: a GPU takes 229 ms for the singular values of 64
    # matrices of 128 x 128 and 46 ms for these. What is lost is some 1e-8 of the largest one, and M is float32.
    wide = torch.where(finite[..., None, None], matrices, 0).double()
    values = torch.linalg.eigvalsh(wide.mT @ wide).clamp_min(0).sqrt()
    total = values.sum(dim=-1, keepdim=True)
    shares = values / total.clamp_min(torch.finfo(values.dtype).tiny)
    rank = torch.special.entr(shares).sum(dim=-1).exp() * (total.squeeze(-1) > 0)
    return torch.where(finite, rank, torch.nan)


def read_variation(read: Tensor, blind: Tensor | None = None) -> Tensor:
    """`MemoryStatistics.read_variation` of `[b, t, heads, s, d]`; tokens that are `blind` `[b, t, s]` do not count."""
    if blind is None:
        deviation = read - read.mean(dim=3, keepdim=True)
    else:
        reading = ~blind[:, :, None, :, None]
        mean = read.sum(dim=3, keepdim=True) / reading.sum(dim=3, keepdim=True).clamp_min(1)
        deviation = (read - mean) * reading
    spread = deviation.square().sum(dim=(0, 1, 3, 4))
    return (spread / read.square().sum(dim=(0, 1, 3, 4)).clamp_min(torch.finfo(read.dtype).tiny)).sqrt()
