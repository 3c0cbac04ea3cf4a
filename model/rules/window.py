"""Reading and writing the compressive memory over a window, and the write gate. The rules are in `model.rules`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from model.rules import MemoryRule, Tokens
from model.rules.base import Reads
from model.rules.borders import Borders
from model.rules.state import State


def remember(
    rule: MemoryRule,
    tokens: Tokens,
    weights: Mapping[str, Tensor],
    state: State,
    borders: Borders,
    *,
    probes: Tensor | None = None,
    detach_reads: bool,
) -> tuple[Tensor, Tensor, State]:
    """Read and write the memory for a window.

    Args:
        rule: the memory rule.
        tokens: queries of t + p segments; keys, values and gates of the t that are written.
        weights: the rule's own parameters, see `MemoryRule.scan`.
        state: memory carried in.
        borders: where documents start.
        probes: int64 `[b, p]` or None: the last p segments of q only read, each what segment `probes[b, j]` reads.
        detach_reads: read the memory without gradient (truncates backpropagation at every segment).

    Returns:
        The read `[b, t + p, n*r, s, d]`, the r heads of a group neighbours, whether the memory it came from held
        anything (1 or 0) for a token, `[b, t + p, n, s]` or 1 for s, and the memory carried out.
    """
    reads = Reads(probes, detach_reads)
    read, present, after = rule.scan_and_read(tokens, weights, state, borders, reads)
    return read.flatten(2, 3), present, after


class _HardGate(torch.autograd.Function):
    """clip((a + 2) / 4, 0, 1) with the logistic's slope in the backward pass, so that a closed gate can reopen."""

    @staticmethod
    def forward(ctx, a: Tensor) -> Tensor:
        # Not `a`: a part of the product of all gates and features (`model.layers.token_linears`), which it would keep.
        ctx.save_for_backward(torch.sigmoid(a))
        return ((a + 2) / 4).clamp(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (logistic,) = ctx.saved_tensors
        return grad * logistic * (1 - logistic)


def write_gate(kind: str, a: Tensor) -> Tensor:
    """The write gate in [0, 1] from its pre-activation; `hard` reaches both ends exactly."""
    return _HardGate.apply(a) if kind == "hard" else torch.sigmoid(a)
