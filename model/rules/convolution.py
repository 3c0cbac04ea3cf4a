"""Short convolutions in front of a memory rule (`model.memory.short_convolution`), as Gated Delta Networks have them
(arXiv 2412.06464, section 3.4).

    q, k, v  a causal depthwise convolution over w tokens, SiLU, then what the rule does with them

w is `model.memory.convolution_width`, 4 in the paper.

Rules with a feature map of their own (phi of `linear` and `delta`) get what is convolved without SiLU, which would push
all keys into one corner of phi: nothing below -0.28 is left, and phi is then 0.75 and more everywhere.

Keys then hold something of the tokens before them, which is what binds a value to its name. Only the memory sees
convolved tokens; the local attention gets them as they are. The convolutions run through segment borders inside a
document, so the last w - 1 tokens' q, k and v are part of the state. They see no token of another document.

Initial values have the variance of PyTorch's default, as in the paper's code. Where queries and keys start tied, both
begin as the plain sum of w tokens: places that follow the same tokens match, whichever they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from model.config import LayerShape
from model.device import cache_rows, host_knows
from model.rules.base import MemoryRule, Reads, RuleParameter, Tokens
from model.rules.borders import Borders
from model.rules.context import pass_around, pass_around_back
from model.rules.state import State, extended_state


class ConvolvedRule(MemoryRule):
    """Any rule behind short convolutions that see `width` tokens, their own included.

    The state is the rule's own and `tail`, the last tokens before the convolution `[b, n, r + 2, width - 1, d]`: of the
    head's r query heads, its key and its value.
    """

    def __init__(self, rule: MemoryRule, width: int) -> None:
        self.rule, self.width = rule, width
        self.silu = not rule.has_feature_map

    def token_inputs(self, layer: LayerShape) -> dict[str, int]:
        return self.rule.token_inputs(layer)

    def parameters(self, layer: LayerShape) -> dict[str, RuleParameter]:
        def taps(generator: torch.Generator) -> Tensor:
            return torch.randn(rows, self.width, generator=generator) * (3 * self.width) ** -0.5

        def tied_taps(generator: torch.Generator) -> Tensor:
            drawn = taps(generator)
            drawn.view(layer.groups, layer.ratio + 2, -1)[:, : layer.ratio + 1] = self.width**-0.5
            return drawn

        rows = (layer.heads + 2 * layer.groups) * layer.dim
        return self.rule.parameters(layer) | {
            # Rows as those of the q, k, v projection: per key/value head its query heads, its key, its value.
            "convolution": RuleParameter((rows, self.width), taps, is_gate=False, tied=tied_taps),
        }

    def empty(self, lanes: int, layer: LayerShape, *, dtype: torch.dtype, device: torch.device) -> State:
        shape = (lanes, layer.groups, layer.ratio + 2, self.width - 1, layer.dim)
        empty = self.rule.empty(lanes, layer, dtype=dtype, device=device)
        return _join(empty, torch.zeros(shape, dtype=dtype, device=device))

    def scan(
        self, tokens: Tokens, weights: Mapping[str, Tensor], state: State, borders: Borders
    ) -> tuple[State, State]:
        inner, tail = _split(state)
        reads = Reads(None, detach=False)
        convolved, tails, tail = self._convolve(tokens, weights, tail, borders, reads)
        before, after = self.rule.scan(convolved, weights, inner, borders)
        return _join(before, tails), _join(after, tail)

    def read(self, q: Tensor, weights: Mapping[str, Tensor], state: State) -> Tensor:
        inner, tail = _split(state)
        padded = torch.cat([tail[:, :, :, :-2], q], dim=-2)
        convolved = convolution(padded, _rows(_taps(weights, tail)[:, :-2]))
        return self.rule.read(F.silu(convolved) if self.silu else convolved, weights, inner)

    def scan_and_read(
        self, tokens: Tokens, weights: Mapping[str, Tensor], state: State, borders: Borders, reads: Reads
    ) -> tuple[Tensor, Tensor, State]:
        inner, tail = _split(state)
        convolved, _, tail = self._convolve(tokens, weights, tail, borders, reads)
        read, present, after = self.rule.scan_and_read(convolved, weights, inner, borders, reads)
        return read, present, _join(after, tail)

    def inside(self, state: State, q: Tensor, start: Tensor) -> State:
        inner, tail = _split(state)
        reach = self.width - 1
        # Of what the tail and the queries give one behind the other; joining a whole segment would copy it.
        at = (start[:, None] + torch.arange(reach, device=start.device))[:, None, None, :, None]
        in_tail = torch.take_along_dim(tail[:, :, :-2], at.clamp(max=reach - 1), dim=3)
        in_segment = torch.take_along_dim(q, (at - reach).clamp(min=0), dim=3)
        last = torch.where(at < reach, in_tail, in_segment.to(tail.dtype))
        return _join(self.rule.inside(inner, q, start), torch.cat([last, tail[:, :, -2:]], dim=2))

    def present(self, state: State) -> Tensor:
        return self.rule.present(_split(state)[0])

    def flops_per_token(self, layer: LayerShape) -> int:
        return self.rule.flops_per_token(layer) + 2 * self.width * (layer.heads + 2 * layer.groups) * layer.dim

    def exchanges(self, layer: LayerShape) -> list[int]:
        return self.rule.exchanges(layer)

    def halo(self, layer: LayerShape) -> int:
        return (self.width - 1) * (layer.heads + 2 * layer.groups) * layer.dim

    def saved_bytes(self, layer: LayerShape, length: int, m: int, c: int, *, gated: bool) -> tuple[int, int]:
        per_token, per_segment = self.rule.saved_bytes(layer, length, m, c, gated=gated)
        # q, k, v with their tails in front, and what is convolved where SiLU or the rule asks for it again.
        kept = (layer.heads + 2 * layer.groups) * layer.dim * m
        if self.silu or self.rule.keeps_value:
            per_token += kept
        if self.rule.keeps_value:
            per_token -= layer.groups * layer.dim * c
        return per_token + kept, per_segment + (self.width - 1) * kept

    def _convolve(
        self, tokens: Tokens, weights: Mapping[str, Tensor], tail: Tensor, borders: Borders, reads: Reads
    ) -> tuple[Tokens, Tensor, Tensor]:
        """The tokens behind the convolutions, and the tails before every segment and behind the last one."""
        taps = _taps(weights, tail)
        q, k, v, before, after = _Convolution.apply(*tokens[:3], tail, taps, borders, reads, self.silu, tokens.part)
        return tokens._replace(q=q, k=k, v=v), before, after


def _join(inner: State, tail: Tensor) -> State:
    return extended_state(type(inner), ("tail",))(*inner, tail)


def _split(state: State) -> tuple[State, Tensor]:
    return type(state).inner(*state[:-1]), state[-1]


def _taps(weights: Mapping[str, Tensor], tail: Tensor) -> Tensor:
    """The convolutions' weights as `[n, r + 2, d, width]`."""
    parts, reach, dim = tail.shape[-3:]
    return weights["convolution"].view(-1, parts, dim, reach + 1)


def convolution(
    padded: Tensor, weights: Tensor, out: Tensor | None = None, foreign: tuple[Tensor | None, ...] | None = None
) -> Tensor:
    """The causal convolution of `[..., n, parts, width - 1 + s, d]`, a tail and the tokens behind it, with taps
    `[width, n, parts, 1, d]`: `[..., n, parts, s, d]`.

    Args:
        foreign: by tap, where the token that it sees is of another document; broadcasts to `[..., s, d]`. None where
            none is.
    """
    width = len(weights)
    foreign = (None,) * width if foreign is None else foreign
    length = padded.shape[-2] - (width - 1)
    out = torch.mul(_without(padded[..., :length, :], foreign[0]), weights[0], out=out)
    for i in range(1, width):
        out.addcmul_(_without(padded[..., i : i + length, :], foreign[i]), weights[i])
    return out


class _Convolution(Function):
    """All convolutions of a window at once: y_i = sum_j w_j x_{i - h + j}, through segment borders inside a document,
    with h = width - 1 and j from 0 to h.

    The tokens of a segment stand in a buffer behind the h before them. Backward: dx_i = sum_j w_j dy_{i + h - j},
    dw_j = sum_i dy_i x_{i - h + j}; what a tail gets goes to the tokens that it was copied from. Where ranks share a
    chunk, the first tail is the left neighbour's last one (`model.rules.context.pass_around`).
    """

    @staticmethod
    def forward(ctx, q, k, v, initial, taps, borders, reads, silu, part):
        """Convolved q `[b, t + p, n, r, s, d]`, k and v `[b, t, n, s, d]`; the tails before every segment
        `[b, t, n, r + 2, h, d]`, without gradient, and behind the last one."""
        b, segments, n, r, s, d = q.shape
        t, width = k.shape[1], taps.shape[-1]
        reach = width - 1
        padded = _time_first(initial, b, segments, n, r + 2, reach + s, d)
        own, tails = padded[..., reach:, :], padded[..., :reach, :]
        own[:, :, :, :r], own[:, :t, :, r], own[:, :t, :, r + 1] = q, k, v
        clear, foreign = _cleared(borders, reach), _foreign(borders.piece, width)
        context = None if part is None else part.context
        left = initial
        if context is not None:
            own_last = initial.new_empty(initial.shape)
            for place, segment, tokens, lost in _last_tokens(t, s, borders, reach):
                own_last[..., place, :] = own[:, segment, ..., tokens, :].masked_fill(lost, 0)
            left, carried_out = pass_around(own_last, initial, context)
        tails[:, 0] = left.masked_fill(clear[:, 0], 0)
        for before, after in _neighbours(t, s, reach):
            tails[:, after] = padded[:, before, ..., -reach:, :]
            # Not a product with 0: what is cleared may have overflowed.
            tails[:, after].masked_fill_(clear[:, after], 0)
        if segments > t:
            own[:, t:, :, r:].zero_()
            tails[:, t:] = reads.chosen(tails[:, :t])[:, t:]
        weights = _rows(taps)
        convolved = _time_first(initial, b, segments, n, r + 2, s, d)
        activated = torch.empty_like(convolved) if silu else convolved
        for first, last in _blocks(convolved, width):
            block = convolved[..., first:last, :]
            convolution(padded[..., first : last + reach, :], weights, block, _of_block(foreign, first, last))
            if silu:
                torch.ops.aten.silu.out(block, out=activated[..., first:last, :])
        ctx.set_materialize_grads(False)
        ctx.reads, ctx.silu, ctx.shapes, ctx.dtype, ctx.context = reads, silu, (q.shape, t), q.dtype, context
        ctx.save_for_backward(padded, weights, convolved if silu else None, reads.probes, *borders)
        last = (padded[:, t - 1, ..., -reach:, :] if context is None else carried_out).clone()
        if context is None and borders.cut is not None:
            last.masked_fill_(clear[:, t], 0)
        before = tails[:, :t]
        ctx.mark_non_differentiable(before)
        return activated[:, :, :, :r], activated[:, :t, :, r], activated[:, :t, :, r + 1], before, last

    @staticmethod
    @once_differentiable
    def backward(ctx, of_q, of_k, of_v, _, of_last):
        padded, weights, convolved, probes, *borders = ctx.saved_tensors
        borders, width = Borders(*borders), len(weights)
        reach = width - 1
        clear, foreign = _cleared(borders, reach), _foreign(borders.piece, width)
        (b, segments, n, r, s, d), t = ctx.shapes
        gradient = _time_first(padded, b, segments, n, r + 2, s, d)
        if segments > t:
            gradient[:, t:, :, r:].zero_()
        parts = ((slice(None), slice(r)), (slice(t), r), (slice(t), r + 1))
        found = torch.empty_like(padded)
        blocks = _blocks(gradient, width)
        products = [None] * width
        for first, last in blocks:
            block = gradient[..., first:last, :]
            for (which, part), of_part in zip(parts, (of_q, of_k, of_v), strict=True):
                into = block[:, which, :, part]
                into.zero_() if of_part is None else into.copy_(of_part[..., first:last, :])
            if ctx.silu:
                torch.ops.aten.silu_backward(block, convolved[..., first:last, :], grad_input=block)
            of_block = _of_block(foreign, first, last)
            for i in range(width):
                seen = _without(padded[..., first + i : last + i, :], of_block[i])
                if first == 0:
                    products[i] = block * seen
                else:
                    products[i][..., : last - first, :].addcmul_(block, seen)
            end = last if last < s else s + reach
            torch.mul(_without(block, of_block[0]), weights[0], out=found[..., first:last, :])
            found[..., last:end, :].zero_()
            for i in range(1, width):
                low, high = max(first, i), min(end, s + i)
                (seeing,) = _of_block(foreign[i : i + 1], low - i, high - i)
                of_seen = _without(gradient[..., low - i : high - i, :], seeing)
                found[..., low:high, :].addcmul_(of_seen, weights[i])
        of_taps = torch.stack([x.sum(dim=(0, 1, 4)) for x in products], dim=-1)
        of_tails = found[..., :reach, :]
        if ctx.reads.detach:
            of_tails[:, :, :, :r].zero_()
        if segments > t:
            lane = torch.arange(b, device=probes.device).unsqueeze(1)
            of_tails.index_put_((lane, probes), of_tails[:, t:], accumulate=True)
        if of_last is not None and ctx.context is None:
            of_last = of_last if borders.cut is None else of_last.masked_fill(clear[:, t], 0)
            found[:, t - 1, ..., -reach:, :].add_(of_last)
        for before, after in reversed(_neighbours(t, s, reach)):
            passed = of_tails[:, after].masked_fill_(clear[:, after], 0)
            found[:, before, ..., -reach:, :].add_(passed)
        of_initial = of_tails[:, 0].masked_fill(clear[:, 0], 0)
        own = found[..., reach:, :]
        if ctx.context is not None:
            of_last = torch.zeros_like(of_initial) if of_last is None else of_last
            of_own_last, of_initial = pass_around_back(of_initial, of_last, of_initial.dtype, ctx.context)
            for place, segment, tokens, lost in _last_tokens(t, s, borders, reach):
                own[:, segment, ..., tokens, :].add_(of_own_last[..., place, :].masked_fill(lost, 0))
        own = own.to(ctx.dtype)
        return (
            own[:, :, :, :r],
            own[:, :t, :, r],
            own[:, :t, :, r + 1],
            of_initial,
            of_taps,
            None,
            None,
            None,
            None,
        )


def _without(x: Tensor, foreign: Tensor | None) -> Tensor:
    # Not a product with 0: what another document leaves behind may have overflowed.
    return x if foreign is None else x.masked_fill(foreign, 0)


def _foreign(piece: Tensor | None, width: int) -> tuple[Tensor | None, ...]:
    """By tap, where the token that it sees is of another document, bool `[b, t + p, 1, 1, s, 1]`, from `Borders.piece`;
    None where it never is. What a tail holds is of piece 0, or has been cleared."""
    if piece is None:
        return (None,) * width
    seen = F.pad(piece, (width - 1, 0)).unfold(-1, width, 1)  # [b, t + p, s, width]
    foreign = (seen != piece.unsqueeze(-1))[:, :, None, None, :, None]
    return *foreign.unbind(-1)[:-1], None


def _of_block(foreign: tuple[Tensor | None, ...], first: int, last: int) -> tuple[Tensor | None, ...]:
    """`foreign` of some tokens; None as well where the host knows that no document starts near them: most blocks, and
    what is not copied there is half of what packing costs a convolution."""
    parts = [None if x is None else x[..., first:last, :] for x in foreign]
    return tuple(None if x is None or (host_knows(x.device) and not x.any()) else x for x in parts)


def _rows(taps: Tensor) -> Tensor:
    """Taps `[n, parts, d, width]` as rows of all channels, `[width, n, parts, 1, d]`."""
    return taps.movedim(-1, 0).contiguous().unsqueeze(-2)


def _time_first(like: Tensor, b: int, t: int, n: int, parts: int, s: int, d: int) -> Tensor:
    """An empty `[b, t, n, parts, s, d]` that lies as the projection's output does, so that all channels of a token are
    one row to a product with the taps: 2 ms for 6 of 3 million numbers on a CPU."""
    return like.new_empty(s, b, t, n, parts, d).permute(1, 2, 3, 4, 0, 5)


def _blocks(x: Tensor, width: int) -> list[tuple[int, int]]:
    """First and last token (exclusive) of the blocks in which `[..., s, d]` is convolved: `cache_rows`, and as
    many as a tail reaches into one block before."""
    length, rows = x.shape[-2], max(width, cache_rows(x, -2))
    return [(first, min(first + rows, length)) for first in range(0, length, rows)]


def _neighbours(t: int, s: int, reach: int) -> list[tuple[slice, slice]]:
    """Segments and those behind them, in the order in which tails of `reach` tokens are passed on: all at once where a
    tail lies in one segment."""
    if s >= reach:
        return [(slice(t - 1), slice(1, t))] if t > 1 else []
    return [(slice(i, i + 1), slice(i + 1, i + 2)) for i in range(t - 1)]


def _last_tokens(t: int, s: int, borders: Borders, reach: int) -> Iterator[tuple[slice, int, slice, Tensor]]:
    """Where the last `reach` tokens of t segments stand, which must have as many: places in a tail, the segment and
    tokens of it, and whether a document starts between them and the end (broadcasts over tails)."""
    assert t * s >= reach, "a part is shorter than a tail"
    step = min(s, reach)
    for end in range(reach, 0, -step):
        segment = t - 1 - (reach - end) // step
        size = min(step, end)
        tokens = slice(s - size, s)
        lost = borders.clears[:, segment + 1 :].any(dim=1).view(-1, 1, 1, 1, 1)
        if borders.unwritten is not None:
            lost = lost | borders.unwritten[:, None, None, segment, tokens, None]
        yield slice(end - size, end), segment, tokens, lost


def _cleared(borders: Borders, reach: int) -> Tensor:
    """Where the tails before segments are cleared, which broadcasts over tails: bool `[b, t, 1, 1, 1, 1]`, and where
    documents share segments `[b, t + 1, 1, 1, reach, 1]`, the last one being the tail that is carried out."""
    reset = borders.reset[:, :, None, None, None, None]
    if borders.unwritten is None:
        return reset
    # What a segment shorter than a tail leaves behind begins with what it found.
    found = borders.clears.unsqueeze(-1).expand(-1, -1, reach)
    lost = torch.cat([found, borders.unwritten], dim=-1)[..., -reach:]
    lost = F.pad(lost, (0, 0, 1, 0))[:, :, None, None, :, None]
    return lost | F.pad(reset, (0, 0) * 4 + (0, 1))
