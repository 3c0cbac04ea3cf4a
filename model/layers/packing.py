"""Several documents in a segment (`data.packing`): what a stage's layers need to know of where they start.

The tokens of a segment between two starts are a **piece** of one document. In the local attention a token sees its own
piece, up to itself; with a sliding local context those of a segment's piece 0, which goes on with the document of the
segment before, also see that segment's last piece. Rotary attention depends on distances alone, so positions stay as
they are. What the memory makes of pieces is in `model.rules.borders`.

    starts   0 0 1 0 0   0 1 0 0 0          . . x x x   x . . . .
    piece    0 0 1 1 1   0 1 1 1 1          . . . . .   . x . . .
                                            . . . . .   . x x . .
    on the right, what tokens of the        . . . . .   . x x x .
    second segment see of the two           . . . . .   . x x x x

Every layer and head has the same mask: it is made once per call of a stage. On a CPU, where the host knows the starts,
it is no tensor but the pieces' lengths, and every piece is attended to by itself (`model.layers.packed_attention`).
With `model.packed_attention=flex` it is FlexAttention's blocks of tokens (arXiv 2412.05496), of which those that hide
all are not computed.

Shapes: b lanes, t segments, p probes behind them, B = b (t + p), C context ranks, s tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from model.device import host_knows
from model.rules.base import Reads
from model.rules.borders import Borders, own_borders
from model.rules.context import ContextGroup, ContextPart
from model.rules.state import LocalContext

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Piece(NamedTuple):
    length: int
    """Tokens of the segment."""
    before: int
    """Tokens of the segment before, its last ones, that the piece's tokens see."""


class Run(NamedTuple):
    """Neighbouring segments, and probes, that are cut alike."""

    segments: int
    pieces: tuple[Piece, ...]


class Blocks(NamedTuple):
    """Who sees whom, for FlexAttention."""

    mask: BlockMask
    """Of all B segments and probes, for every head."""
    attend: Callable[[Tensor, Tensor, Tensor, BlockMask], Tensor]
    """`block_attention` of `model.layers.block_attention`, or what the compiler makes of it."""


class DocumentMask(NamedTuple):
    """Who sees whom in the local attention: `blocks` where they are asked for, else `runs` where the host knows it,
    `bias` elsewhere."""

    bias: Tensor | None
    """What is added to the scores, 0 where a token sees a key and -inf elsewhere: `[B, 1, s, s]`, with a sliding
    context `[B, 1, s, 2s]`, the segment before first."""
    runs: tuple[Run, ...] | None
    """Of all B segments and probes, in their order."""
    before: Tensor | None
    """With a sliding context bool `[b, t, s]`: which tokens of the segment before a segment's piece 0 sees."""
    seen: Tensor | None
    """With a sliding context `[b]`: the part of the chunk's last segment that the next one's piece 0 sees."""
    blocks: Blocks | None = None


class Packing(NamedTuple):
    """Made once for all layers of a stage."""

    part: ContextPart | None
    borders: Borders
    mask: DocumentMask


def packing_of(
    starts: Tensor,
    probes: Tensor | None,
    carried: LocalContext | None,
    dtype: torch.dtype,
    context: ContextGroup | None = None,
    attend: Callable | None = None,
) -> Packing:
    """What the layers need to know of a chunk.

    Args:
        starts: bool `[b, C t, s]`, True at a document's first token, of the whole chunk.
        probes: int64 `[b, p]` or None: each sees itself, and before it what segment `probes[b, j]` sees.
        carried: of any layer: how much of it is seen is the same in all of them. None without a sliding context.
        dtype: of the queries.
        context: the ranks that share the chunk; None where this process has it alone.
        attend: `Blocks.attend`; None where FlexAttention is not asked for.
    """
    asked = 0 if probes is None else probes.shape[1]
    part, borders = own_borders(context, starts[:, :, 0], starts, probes=asked)
    before = seen = None
    if carried is not None:
        piece = starts.cumsum(dim=-1)
        last_piece = piece == piece[..., -1:]
        seen = last_piece[:, -1].to(carried.local_seen.dtype).mean(dim=-1)
        before = torch.cat([seen_tokens(carried).unsqueeze(1), last_piece[:, :-1]], dim=1)
        if context is not None:
            before = before.unflatten(1, (context.size, -1))[:, context.rank]
        before = before & ~borders.reset.unsqueeze(2)
    visible = None if before is None else Reads(probes, detach=False).chosen(before)
    if attend is not None:
        from model.layers.block_attention import block_mask

        mask = DocumentMask(None, None, before, seen, Blocks(block_mask(borders.piece, visible), attend))
    elif host_knows(starts.device):
        mask = DocumentMask(None, _runs(borders.piece, visible), before, seen)
    else:
        mask = DocumentMask(_bias(borders.piece, visible, dtype), None, before, seen)
    return Packing(part, borders, mask)


def seen_tokens(context: LocalContext) -> Tensor:
    """Bool `[b, s]`: which tokens of the segment carried in are of the document that goes on."""
    length = context.local_key.shape[2]
    count = (context.local_seen[:, :1, 0].detach() * length).round()
    return torch.arange(length, device=count.device) >= length - count


def _runs(piece: Tensor, before: Tensor | None) -> tuple[Run, ...]:
    """`DocumentMask.runs` of `Borders.piece` and of what each segment and probe sees of the one before, bool
    `[b, t + p, s]`, with a sliding context."""
    piece = piece.flatten(0, 1)
    inner: list[list[int]] = [[] for _ in piece]
    for segment, place in (piece[:, 1:] != piece[:, :-1]).nonzero().tolist():
        inner[segment].append(place + 1)
    visible = [0] * len(inner) if before is None else before.sum(dim=-1).flatten().tolist()
    cut = []
    for places, count in zip(inner, visible, strict=True):
        lengths = [last - first for first, last in pairwise([0, *places, piece.shape[1]])]
        cut.append((Piece(lengths[0], count), *(Piece(length, 0) for length in lengths[1:])))
    return tuple(Run(len(list(alike)), pieces) for pieces, alike in groupby(cut))


def _bias(piece: Tensor, before: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`DocumentMask.bias` of the arguments of `_runs`."""
    sees = (piece[..., :, None] == piece[..., None, :]).tril()
    if before is not None:
        sees = torch.cat([(piece == 0)[..., :, None] & before[..., None, :], sees], dim=-1)
    sees = sees.flatten(0, 1)
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, -torch.inf).unsqueeze(1)
