"""Where documents begin in the segments of a window, as the memory rules need it.

Without packing a document starts at a segment's first token or not at all: the memory is cleared before such a segment.
With packing (`data.packing`) documents share segments. A **piece** is what of a document stands in one segment. Only a
segment's piece 0, which goes on with the document of the segment before, reads the memory; the others' documents have
none yet. Where a document starts behind a segment's first token, the memory is **cut**: cleared behind the segment's
reads and before its writes. Only the last piece is written: for the memory, other tokens are not there.

Shapes: b lanes, C ranks that share a chunk, t segments of this rank's part of it, p probes behind them, s tokens of a
segment.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.rules.context import ContextGroup, ContextPart, own_part


class Borders(NamedTuple):
    """Made once for all layers. Without packing there is `reset` alone."""

    reset: Tensor
    """Bool `[b, t]`: the memory is cleared before the segment is read."""
    cut: Tensor | None = None
    """Bool `[b, t]`: a document starts behind the segment's first token."""
    piece: Tensor | None = None
    """int32 `[b, t + p, s]`: documents that have started in the segment up to and with this token; 0 in probes."""
    blind: Tensor | None = None
    """Bool `[b, t + p, s]`: the token reads nothing, as from an empty memory."""
    unwritten: Tensor | None = None
    """Bool `[b, t, s]`: the token is not of the segment's last piece, and so not written."""

    @property
    def clears(self) -> Tensor:
        """Bool `[b, t]`: nothing from before the segment goes on behind it."""
        return self.reset if self.cut is None else self.reset | self.cut

    def for_writes(self, state: Tensor) -> Tensor:
        """What the tokens that are written find of states `[b, t, ...]` before segments."""
        if self.cut is None:
            return state
        # Not a product with 0: what is cleared may have overflowed.
        return state.masked_fill(self.cut.view(*self.cut.shape, *(1,) * (state.dim() - 2)), 0)

    def of_written(self, x: Tensor) -> Tensor:
        """Numbers of tokens `[b, t, n, s, ...]` with 0 for those that are not written: decays do not count them."""
        if self.unwritten is None:
            return x
        return x.masked_fill(self.unwritten.view(*x.shape[:2], 1, x.shape[3], *(1,) * (x.dim() - 4)), 0)


def own_borders(
    context: ContextGroup | None, reset: Tensor, starts: Tensor | None = None, *, probes: int = 0
) -> tuple[ContextPart | None, Borders]:
    """This rank's part of a chunk, and the borders in it.

    Args:
        reset: bool `[b, C t]` of the whole chunk, on every rank.
        starts: bool `[b, C t, s]` likewise, True at a document's first token, `reset` being its first tokens; None
            without packing.
        probes: p, segments that are read behind the part's own; no document starts in them.

    Returns:
        The part, None where one process has all segments, and the borders.
    """
    if starts is None:
        part, own = own_part(context, reset, reset)
        return part, Borders(own)
    part, starts = own_part(context, starts.any(dim=-1), starts)
    piece = starts.cumsum(dim=-1, dtype=torch.int32)
    unwritten = piece != piece[..., -1:]
    cut = unwritten[..., 0]
    piece = F.pad(piece, (0, 0, 0, probes))
    return part, Borders(starts[..., 0], cut, piece, piece > 0, unwritten)
