"""The scan over time that all rules share, and the composition of neighbours that a scan may be split by.

What a piece of text does to a memory is a pair: X -> T X + C, the transition T `[d, d]` and the write C `[d, e]`. Pairs
of neighbours compose to one pair, (T2, C2) after (T1, C1) being (T2 T1, T2 C1 + C2): blocks of a segment to a segment
here, segments to what a context-parallel rank passes on. A pair is one tensor `[..., d, e + d]`, C in front of T, so
that one product makes or composes both.

Both functions have their backward pass written out: a state is saved once, gradients of all transitions are one
product, and nothing is filled with zeros to be added to.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def scan_pairs(initial: Tensor, pairs: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
    """Run `X <- T_t (0 where reset_t, else X) + C_t` over the segments of a window.

    Args:
        initial: `[b, n, d, e]`, the state carried in.
        pairs: `[b, t, n, d, e + d]`, C_t in front of T_t.
        reset: bool `[b, t]`, True where the state is cleared before segment t.

    Returns:
        What every segment reads `[b, t, n, d, e]`, after its reset, and the state carried out `[b, n, d, e]`.
    """
    return _Scan.apply(initial, pairs, reset, True)


def scan_sums(initial: Tensor, writes: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
    """`scan_pairs` where nothing is taken off: `X <- (0 where reset_t, else X) + C_t`.

    Args:
        initial: `[b, n, ...]`.
        writes: C_t, `[b, t, n, ...]`.
    """
    return _Scan.apply(initial, writes, reset, False)


def compose_neighbours(pairs: Tensor) -> Tensor:
    """Of pairs `[..., m, d, e + d]`, m a power of two and in order of time, the one that does what all of them do,
    `[..., d, e + d]`: log2(m) products of half as many pairs each."""
    while pairs.shape[-3] > 1:
        pairs = _Compose.apply(pairs)
    return pairs.squeeze(-3)


class _Scan(Function):
    """Gradients, from the last segment to the first, with G the gradient of the state that a segment leaves behind:

    dC_t = G,   dT_t = G X_t^T,   G <- (0 where reset_t, else T_t^T G + dX_t)
    """

    @staticmethod
    def forward(ctx, initial: Tensor, pairs: Tensor, reset: Tensor, has_transition: bool) -> tuple[Tensor, Tensor]:
        columns, segments = initial.shape[-1], pairs.shape[1]
        clear = _per_state(reset, initial)
        states, state = [], initial
        for t in range(segments):
            # Not a product with 0: what is cleared may have overflowed.
            states.append(state.masked_fill(clear[t], 0))
            if has_transition:
                write, transition = _flat(pairs[:, t, ..., :columns]), _flat(pairs[:, t, ..., columns:])
                state = torch.baddbmm(write, transition, _flat(states[t])).view(initial.shape)
            else:
                state = states[t] + pairs[:, t]
        before = torch.stack(states) if segments > 1 else states[0].unsqueeze(0)
        ctx.has_transition = has_transition
        ctx.save_for_backward(clear, *((before, pairs) if has_transition else ()))
        return before.transpose(0, 1), state

    @staticmethod
    @once_differentiable
    def backward(ctx, before: Tensor, after: Tensor):
        clear, *saved = ctx.saved_tensors
        segments, columns = before.shape[1], after.shape[-1]
        wide = after.shape[-1] + after.shape[-2] if ctx.has_transition else columns
        found = after.new_empty(segments, *after.shape[:-1], wide)  # of the pairs
        writes = found[..., :columns]
        writes[-1] = after
        for t in reversed(range(segments)):
            into = writes[t - 1] if t else torch.empty_like(after)
            if ctx.has_transition:
                transition = _flat(saved[1][:, t, ..., columns:])
                torch.baddbmm(_flat(before[:, t]), transition.mT, _flat(writes[t]), out=_flat(into))
            else:
                torch.add(before[:, t], writes[t], out=into)
            into.masked_fill_(clear[t], 0)
        if ctx.has_transition:
            torch.bmm(writes.flatten(0, 2), saved[0].flatten(0, 2).mT, out=found[..., columns:].flatten(0, 2))
        return into, found.transpose(0, 1), None, None


class _Compose(Function):
    """Pairs of neighbours to one: R = T2 [C1 | T1] + [C2 | 0]. Backward: d[C1 | T1] = T2^T dR,
    dT2 = dR [C1 | T1]^T, dC2 = dC."""

    @staticmethod
    def forward(ctx, pairs: Tensor) -> Tensor:
        columns = pairs.shape[-1] - pairs.shape[-2]
        first, second = _halves(pairs)
        composed = torch.bmm(second[..., columns:], first)
        composed[..., :columns].add_(second[..., :columns])
        ctx.save_for_backward(pairs)
        return composed.view(*pairs.shape[:-3], pairs.shape[-3] // 2, *pairs.shape[-2:])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        (pairs,) = ctx.saved_tensors
        columns = pairs.shape[-1] - pairs.shape[-2]
        first, second = _halves(pairs)
        found = torch.empty_like(pairs, memory_format=torch.contiguous_format)
        first_found, second_found = _halves(found)
        gradient = gradient.reshape(first.shape)
        torch.bmm(second[..., columns:].mT, gradient, out=first_found)
        torch.bmm(gradient, first.mT, out=second_found[..., columns:])
        second_found[..., :columns] = gradient[..., :columns]
        return found


def _per_state(of_segments: Tensor, state: Tensor) -> Tensor:
    """`[b, t]` as `[t, b, 1, ...]`, which broadcasts over the states `[t, b, n, ...]`."""
    return of_segments.t().reshape(*reversed(of_segments.shape), *(1,) * (state.dim() - 1))


def _flat(x: Tensor) -> Tensor:
    """`[b, n, ...]` as one batch of matrices."""
    return x.flatten(0, 1)


def _halves(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The earlier and the later of neighbours, `[m, d, e + d]` each; views where `pairs` is contiguous."""
    return pairs.reshape(-1, 2, *pairs.shape[-2:]).unbind(1)
