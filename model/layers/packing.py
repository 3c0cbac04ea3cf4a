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

Every layer and head has the same mask: it is made once per call of a stage.

Shapes: b lanes, t segments, p probes behind them, B = b (t + p), C context ranks, s tokens of a segment.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.device import host_knows
from model.rules.base import Reads
from model.rules.borders import Borders, own_borders
from model.rules.context import ContextGroup, ContextPart
from model.rules.state import LocalContext


class DocumentMask(NamedTuple):
    """Who sees whom in the local attention."""

    bias: Tensor | None
    """What is added to the scores, 0 where a token sees a key and -inf elsewhere: `[k, 1, s, s]`, with a sliding
    context `[k, 1, s, 2s]`, the segment before first. None where no segment needs one."""
    rows: Tensor | None
    """int64 `[k]`: for which of the segments and probes; None for all."""
    segments: int
    """B."""
    before: Tensor | None
    """With a sliding context bool `[b, t, s]`: which tokens of the segment before a segment's piece 0 sees."""
    seen: Tensor | None
    """With a sliding context `[b]`: the part of the chunk's last segment that the next one's piece 0 sees."""

    @property
    def is_of_all(self) -> bool:
        """Every segment has a mask: nothing is to be computed without."""
        return self.bias is not None and len(self.bias) == self.segments


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
) -> Packing:
    """What the layers need to know of a chunk.

    Args:
        starts: bool `[b, C t, s]`, True at a document's first token, of the whole chunk.
        probes: int64 `[b, p]` or None: each sees itself, and before it what segment `probes[b, j]` sees.
        carried: of any layer: how much of it is seen is the same in all of them. None without a sliding context.
        dtype: of the queries.
        context: the ranks that share the chunk; None where this process has it alone.
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
    return Packing(part, borders, DocumentMask(*_bias(borders.piece, before, probes, dtype), before, seen))


def seen_tokens(context: LocalContext) -> Tensor:
    """Bool `[b, s]`: which tokens of the segment carried in are of the document that goes on."""
    length = context.local_key.shape[2]
    count = (context.local_seen[:, :1, 0].detach() * length).round()
    return torch.arange(length, device=count.device) >= length - count


def _bias(
    piece: Tensor, before: Tensor | None, probes: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, int]:
    """The first fields of `DocumentMask`. Where the host knows which segments hold a start, the others have no mask,
    under which a kernel would take longer."""
    sees = (piece[..., :, None] == piece[..., None, :]).tril()
    needed = piece[..., -1] > piece[..., 0]
    if before is not None:
        of_all = Reads(probes, detach=False).chosen(before)
        needed = needed | (of_all.any(dim=-1) & ~of_all.all(dim=-1))
        sees = torch.cat([(piece == 0)[..., :, None] & of_all[..., None, :], sees], dim=-1)
    sees, rows = sees.flatten(0, 1), None
    if host_knows(piece.device):
        rows = needed.flatten().nonzero().squeeze(1)
        if len(rows) == 0:
            return None, rows, needed.numel()
        sees = sees[rows]
    bias = torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, -torch.inf)
    return bias.unsqueeze(1), rows, needed.numel()
