"""The scan over time that all rules share, and the composition of neighbours that a scan may be split by.

What a piece of text does to a memory is a pair: X -> T X + C, the transition T `[d, d]` and the write C `[d, e]`. Pairs
of neighbours compose to one pair, (T2, C2) after (T1, C1) being (T2 T1, T2 C1 + C2): blocks of a segment to a segment,
and segments to what a context-parallel rank passes on (`model.rules.context`). A pair is one tensor
`[..., d, e + d]`, C in front of T, so that one product makes or composes both.

A pair is a product itself where a block of tokens writes what differs from what is stored, X -> a X + U^T (V + E X):
T = a I + U^T E, C = U^T V. A device that works on many blocks at once makes all pairs and composes them. A CPU, which
takes a batch of products one by one anyway, takes the blocks in turn and makes no pairs: two products of
`[c, d] x [d, d]` per block for the pair's two, its composition and its step, and four for eight on the way back.

All functions have their backward pass written out: a state is saved once, gradients of all transitions are one
product, and nothing is filled with zeros to be added to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from model.rules.borders import Borders
from model.rules.context import ContextPart, over_states, pass_back, pass_on


class Blocks(NamedTuple):
    """m blocks of c tokens of every segment, each of which does X -> a X + (g L)^T (V + E X)."""

    left: Tensor
    """L, `[b, t, n, m, c, d]`."""
    gate: Tensor | None
    """g, `[b, t, n, m, c]`; None for 1."""
    right: Tensor
    """[V | E], `[b, t, n, m, c, e + d]`."""
    decay: Tensor | None
    """a, one number `[b, t, n, m, 1]` or one per row of X, `[b, t, n, m, d]`; None for 1."""


def scan_blocks(
    initial: Tensor, blocks: Blocks, borders: Borders, part: ContextPart | None = None
) -> tuple[Tensor, Tensor]:
    """Run X <- a X + (g L)^T (V + E X) over the blocks of all segments of a window; m is a power of two.

    Arguments and results are those of `scan_pairs`.
    """
    if initial.device.type == "cpu":
        return _BlockScan.apply(initial, *blocks, borders.reset, borders.cut, part)
    return scan_pairs(initial, compose_neighbours(block_pairs(blocks)), borders, part)


def block_pairs(blocks: Blocks) -> Tensor:
    """The pairs of blocks, `[b, t, n, m, d, e + d]`."""
    return _Pairs.apply(*blocks)


def scan_pairs(
    initial: Tensor, pairs: Tensor, borders: Borders, part: ContextPart | None = None
) -> tuple[Tensor, Tensor]:
    """Run `X <- T_t (0 where reset_t or cut_t, else X) + C_t` over the segments of a window.

    Args:
        initial: `[b, n, d, e]`, the state carried in.
        pairs: `[b, t, n, d, e + d]`, C_t in front of T_t.
        borders: where the state is cleared.
        part: the segments are this rank's part of a chunk; `initial` is what the chunk starts with, on every rank.

    Returns:
        What every segment reads `[b, t, n, d, e]`, after its reset and before its cut, and the state carried out
        `[b, n, d, e]`: with a `part` what the chunk ends with, on every rank.
    """
    return _Scan.apply(initial, pairs, borders.reset, borders.cut, True, part)


def scan_sums(
    initial: Tensor, writes: Tensor, borders: Borders, part: ContextPart | None = None
) -> tuple[Tensor, Tensor]:
    """`scan_pairs` where nothing is taken off: `X <- (0 where reset_t or cut_t, else X) + C_t`.

    Args:
        initial: `[b, n, ...]`.
        writes: C_t, `[b, t, n, ...]`.
    """
    return _Scan.apply(initial, writes, borders.reset, borders.cut, False, part)


def compose_neighbours(pairs: Tensor) -> Tensor:
    """Of pairs `[..., m, d, e + d]`, m a power of two and in order of time, the one that does what all of them do,
    `[..., d, e + d]`: log2(m) products of half as many pairs each."""
    while pairs.shape[-3] > 1:
        pairs = _Compose.apply(pairs)
    return pairs.squeeze(-3)


class _Scan(Function):
    """Gradients, from the last segment to the first, with G the gradient of the state that a segment leaves behind:

    dC_t = G,   dT_t = (0 where cut_t, else G X_t^T)
    G <- (0 where reset_t, else dX_t + (0 where cut_t, else T_t^T G))

    A part of a chunk is gone through twice each way: for its pair, or the G of its first state; then from what the
    other ranks say.
    """

    @staticmethod
    def forward(
        ctx,
        initial: Tensor,
        pairs: Tensor,
        reset: Tensor,
        cut: Tensor | None,
        has_transition: bool,
        part: ContextPart | None,
    ) -> tuple[Tensor, Tensor]:
        columns, segments = initial.shape[-1], pairs.shape[1]
        clear, cut = over_states(reset, initial), _over_states(cut, initial)
        states, state, end, transition_of_part = [], initial, None, None
        if part is not None:
            own = _pair_of_segments(pairs, clear if cut is None else clear | cut, columns)
            state, end = pass_on(initial, own, part)
            transition_of_part = own[..., columns:].clone() if has_transition else None
        for t in range(segments):
            # Not a product with 0: what is cleared may have overflowed.
            states.append(state.masked_fill(clear[t], 0))
            kept = states[t] if cut is None else states[t].masked_fill(cut[t], 0)
            if end is not None and t == segments - 1:
                state = end
            elif has_transition:
                write, transition = _flat(pairs[:, t, ..., :columns]), _flat(pairs[:, t, ..., columns:])
                state = torch.baddbmm(write, transition, _flat(kept)).view(initial.shape)
            else:
                state = kept + pairs[:, t]
        before = torch.stack(states) if segments > 1 else states[0].unsqueeze(0)
        ctx.has_transition, ctx.part = has_transition, part
        ctx.save_for_backward(clear, cut, *((before, pairs, transition_of_part) if has_transition else ()))
        return before.transpose(0, 1), state

    @staticmethod
    @once_differentiable
    def backward(ctx, before: Tensor, after: Tensor):
        clear, cut, *saved = ctx.saved_tensors
        segments, columns = before.shape[1], after.shape[-1]
        wide = after.shape[-1] + after.shape[-2] if ctx.has_transition else columns
        found = after.new_empty(segments, *after.shape[:-1], wide)  # of the pairs
        writes = found[..., :columns]

        def pass_through(first: int) -> Tensor:
            """G of the state that segment 0 starts with, from `writes[first]` of the one that `first` leaves behind."""
            for t in reversed(range(first + 1)):
                into, behind = writes[t - 1] if t else torch.empty_like(after), writes[t]
                # Nothing goes through a cut.
                behind = behind if cut is None else behind.masked_fill(cut[t], 0)
                if ctx.has_transition:
                    transition = _flat(saved[1][:, t, ..., columns:])
                    torch.baddbmm(_flat(before[:, t]), transition.mT, _flat(behind), out=_flat(into))
                else:
                    torch.add(before[:, t], behind, out=into)
                into.masked_fill_(clear[t], 0)
            return into

        if ctx.part is not None:
            of_start = before[:, -1].masked_fill(clear[-1], 0)
            if segments > 1:
                writes[-2] = of_start
                of_start = pass_through(segments - 2)
            transition = saved[2] if ctx.has_transition else None
            after, of_initial = pass_back(of_start, transition, after, ctx.part)
        writes[-1] = after
        of_start = pass_through(segments - 1)
        if ctx.has_transition:
            torch.bmm(writes.flatten(0, 2), saved[0].flatten(0, 2).mT, out=found[..., columns:].flatten(0, 2))
            if cut is not None:
                found[..., columns:].masked_fill_(cut, 0)
        return of_start if ctx.part is None else of_initial, found.transpose(0, 1), None, None, None, None


class _Pairs(Function):
    """[C | T] = [0 | a I] + U^T R with U = g L and R = [V | E]. Backward: dU = R dP^T, dR = U dP, da = diag dT, or its
    sum."""

    @staticmethod
    def forward(ctx, left: Tensor, gate: Tensor | None, right: Tensor, decay: Tensor | None) -> Tensor:
        written = _written(left, gate).flatten(0, 3)
        pairs = torch.bmm(written.mT, right.flatten(0, 3)).view(*left.shape[:4], left.shape[-1], right.shape[-1])
        transition = pairs[..., -left.shape[-1] :]
        transition.diagonal(dim1=-2, dim2=-1).add_(1 if decay is None else decay)
        ctx.decays = None if decay is None else decay.shape[-1]
        ctx.save_for_backward(left, gate, right)
        return pairs

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        left, gate, right = ctx.saved_tensors
        flat = gradient.flatten(0, 3)
        of_left = torch.bmm(right.flatten(0, 3), flat.mT).view(left.shape)
        of_right = torch.bmm(_written(left, gate).flatten(0, 3), flat).view(right.shape)
        of_gate = of_decay = None
        if gate is not None:
            of_gate = (of_left * left).sum(dim=-1)
            of_left.mul_(gate.unsqueeze(-1))
        if ctx.decays:
            of_decay = gradient[..., -left.shape[-1] :].diagonal(dim1=-2, dim2=-1)
            of_decay = of_decay.sum(dim=-1, keepdim=True) if ctx.decays == 1 else of_decay
        return of_left, of_gate, of_right, of_decay


class _BlockScan(Function):
    """With R = V + E X of a block, and G the gradient of the X that it leaves behind, from the last one to the first:

    dR = U G,   dU = R G^T,   dE = dR X^T,   da = the row sums of G X, or their sum,   G <- a G + E^T dR

    A segment's first block finds X = 0 where the state is cut, and hands no G on.

    A part of a chunk is gone through twice, as in `_Scan`.
    """

    @staticmethod
    def forward(ctx, initial, left, gate, right, decay, reset, cut, part):
        b, t, n, m, c, d = left.shape
        columns = initial.shape[-1]
        clear, cut = over_states(reset, initial), _over_states(cut, initial)
        start, end, transition = initial, None, None
        if part is not None:
            clears = clear if cut is None else clear | cut
            own = _pair_of_blocks(left, gate, right, decay, clears, columns)
            start, end = pass_on(initial, own, part)
            transition = own[..., columns:].clone()
        states = initial.new_empty(t * m + 1, b * n, d, columns)
        rest = initial.new_empty(t * m, b * n, c, columns)
        states[0] = start.flatten(0, 1)
        for i, (left_part, gate_part, right_part, decay_part) in enumerate(_in_turn(left, gate, right, decay)):
            state = states[i]
            if i % m == 0:
                # Not a product with 0: what is cleared may have overflowed.
                state.view(initial.shape).masked_fill_(clear[i // m], 0)
                state = _cut_off(state, cut, i // m)
            torch.baddbmm(right_part[..., :columns], right_part[..., columns:], state, out=rest[i])
            kept = state if decay_part is None else state * decay_part
            torch.baddbmm(kept, _written(left_part, gate_part).mT, rest[i], out=states[i + 1])
        ctx.part = part
        ctx.save_for_backward(left, gate, right, decay, clear, cut, states, rest, transition)
        before = states[:-1].view(t, m, *initial.shape)[:, 0].transpose(0, 1)
        return before, states[-1].view(initial.shape) if end is None else end

    @staticmethod
    @once_differentiable
    def backward(ctx, of_before: Tensor, of_after: Tensor):
        left, gate, right, decay, clear, cut, states, rest, transition = ctx.saved_tensors
        b, t, n, m = left.shape[:4]
        columns = of_after.shape[-1]
        found = [None if x is None else torch.empty_like(x) for x in (left, gate, right, decay)]
        steps = zip(_in_turn(left, gate, right, decay), _in_turn(*found, joined=False), strict=True)
        if ctx.part is not None:
            of_start = _of_start(left, gate, right, decay, clear, cut, of_before)
            of_after, of_initial = pass_back(of_start, transition, of_after, ctx.part)
        gradient = of_after.flatten(0, 1)
        for i, (parts, places) in reversed(list(enumerate(steps))):
            left_part, gate_part, right_part, decay_part = parts
            of_left, of_gate, of_right, of_decay = places
            state, stored = states[i] if i % m else _cut_off(states[i], cut, i // m), right_part[..., columns:]
            of_rest = torch.bmm(_written(left_part, gate_part), gradient)
            of_right[..., :columns] = of_rest.view(b, n, *of_rest.shape[1:])
            of_right[..., columns:] = torch.bmm(of_rest, state.mT).view(of_left.shape)
            of_written = torch.bmm(rest[i], gradient.mT)
            if gate_part is not None:
                of_gate.copy_((of_written * left_part).sum(dim=-1).view(of_gate.shape))
                of_written.mul_(gate_part.unsqueeze(-1))
            of_left.copy_(of_written.view(of_left.shape))
            if decay_part is not None:
                of_rows = (gradient * state).sum(dim=-1)
                of_rows = of_rows.sum(dim=-1) if of_decay.shape[-1] == 1 else of_rows
                of_decay.copy_(of_rows.view(of_decay.shape))
                gradient = gradient * decay_part
            gradient = torch.baddbmm(gradient, stored.mT, of_rest)
            if i % m == 0:
                gradient = _cut_off(gradient, cut, i // m)
                gradient.view(of_after.shape).add_(of_before[:, i // m]).masked_fill_(clear[i // m], 0)
        of_start = gradient.view(of_after.shape)
        return of_start if ctx.part is None else of_initial, *found, None, None, None


def _in_turn(
    left: Tensor, gate: Tensor | None, right: Tensor, decay: Tensor | None, *, joined: bool = True
) -> Iterator[tuple[Tensor | None, ...]]:
    """The parts of `Blocks` block by block: lanes and heads as one batch where `joined`, else views `[b, n, ...]`; a
    decay broadcasts over the states."""

    def parts(x: Tensor | None) -> list[Tensor | None]:
        if x is None:
            return [None] * (left.shape[1] * left.shape[3])
        found = [block for segment in x.unbind(1) for block in segment.unbind(2)]
        return [block.flatten(0, 1) for block in found] if joined else found

    if decay is not None and joined:
        decay = decay.unsqueeze(-1)
    return zip(*(parts(x) for x in (left, gate, right, decay)), strict=True)


def _written(left: Tensor, gate: Tensor | None) -> Tensor:
    return left if gate is None else left * gate.unsqueeze(-1)


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


def _pair_of_segments(pairs: Tensor, clear: Tensor, columns: int) -> Tensor:
    """The pair of all segments, `[b, n, d, e + d]`; their sum where there are no transitions. Where documents
    start in between (`clear`), of the last one: that nothing passes through is said by `ContextPart.cleared`."""
    own = pairs[:, 0]
    for t in range(1, pairs.shape[1]):
        own = own.masked_fill(clear[t], 0)
        write, transition = pairs[:, t, ..., :columns], pairs[:, t, ..., columns:]
        if transition.shape[-1]:
            own = transition @ own
            own[..., :columns].add_(write)
        else:
            own.add_(write)
    return own


def _pair_of_blocks(left, gate, right, decay, clear: Tensor, columns: int) -> Tensor:
    """`_pair_of_segments` of `Blocks`: their steps from [0 | I]."""
    b, _, n, m, _, d = left.shape
    own = left.new_zeros(b, n, d, columns + d)
    own[..., columns:].diagonal(dim1=-2, dim2=-1).fill_(1)
    own = own.flatten(0, 1)
    for i, (left_part, gate_part, right_part, decay_part) in enumerate(_in_turn(left, gate, right, decay)):
        if i % m == 0:
            own.view(b, n, d, -1).masked_fill_(clear[i // m], 0)
        rest = torch.bmm(right_part[..., columns:], own)
        rest[..., :columns].add_(right_part[..., :columns])
        kept = own if decay_part is None else own * decay_part
        own = torch.baddbmm(kept, _written(left_part, gate_part).mT, rest)
    return own.view(b, n, d, -1)


def _of_start(left, gate, right, decay, clear: Tensor, cut: Tensor | None, of_before: Tensor) -> Tensor:
    """Gradient of the state that the first of all blocks starts with, where what the last one leaves behind has none;
    `of_before` is that of the states before every segment."""
    m, columns = left.shape[3], of_before.shape[-1]
    gradient = torch.zeros_like(of_before[:, 0]).flatten(0, 1)
    # Nothing reaches the last segment's blocks.
    reached = list(enumerate(_in_turn(left, gate, right, decay)))
    for i, (left_part, gate_part, right_part, decay_part) in reversed(reached):
        if i < len(reached) - m:
            of_rest = torch.bmm(_written(left_part, gate_part), gradient)
            kept = gradient if decay_part is None else gradient * decay_part
            gradient = torch.baddbmm(kept, right_part[..., columns:].mT, of_rest)
        if i % m == 0:
            gradient = _cut_off(gradient, cut, i // m)
            gradient = (gradient.view(of_before[:, 0].shape) + of_before[:, i // m]).masked_fill_(clear[i // m], 0)
            gradient = gradient.flatten(0, 1)
    return gradient.view(of_before[:, 0].shape)


def _over_states(cut: Tensor | None, state: Tensor) -> Tensor | None:
    return None if cut is None else over_states(cut, state)


def _cut_off(state: Tensor, cut: Tensor | None, segment: int) -> Tensor:
    """A state `[b n, d, e]`, or a gradient of one, with 0 in the lanes whose memory is cut in the segment."""
    return state if cut is None else state.unflatten(0, (cut.shape[1], -1)).masked_fill(cut[segment], 0).flatten(0, 1)


def _flat(x: Tensor) -> Tensor:
    """`[b, n, ...]` as one batch of matrices."""
    return x.flatten(0, 1)


def _halves(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The earlier and the later of neighbours, `[m, d, e + d]` each; views where `pairs` is contiguous."""
    return pairs.reshape(-1, 2, *pairs.shape[-2:]).unbind(1)
