"""Context parallelism: the segments of a chunk spread over C ranks, and what crosses between them.

Rank c of a context group owns the c-th of C equal parts of every chunk, t consecutive segments. A part does to a state
what a segment does, X -> T X + W with one pair (T, W) (`model.rules.scan`), so ranks exchange pairs, `[d, e + d]` per
head however long the text: one all-gather, after which every rank applies all C pairs in order and finds both the state
that its own part starts with and the one that the chunk ends with. States carried between chunks and steps are hence
the same on all ranks, to the last bit, and their gradients are whole on all of them.

What stands right before a part (a segment of keys and values, three tokens for the convolutions) is the left
neighbour's, and comes by a shift around the ring. What the first rank gets from the last one is what the chunk leaves
behind: the first rank's copy of such a state is the one that counts, the others hand theirs on unread.

Shapes: b lanes, C ranks, t segments of a part, n key/value heads of this rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor


class ContextGroup(NamedTuple):
    """The ranks that share the segments of every chunk, and this one's place among them."""

    group: dist.ProcessGroup
    rank: int
    size: int


class ContextPart(NamedTuple):
    """This rank's part of a chunk, as the scans need it."""

    context: ContextGroup
    cleared: Tensor
    """Bool `[b, C]`: the rank's part holds a reset, so nothing from before it reaches what is behind it."""


def own_part(context: ContextGroup | None, reset: Tensor) -> tuple[ContextPart | None, Tensor]:
    """This rank's part of a chunk, and the resets in it.

    Args:
        reset: of the whole chunk, bool `[b, C t]`, on every rank.

    Returns:
        The part, None where one process has all segments, and bool `[b, t]`.
    """
    if context is None:
        return None, reset
    parts = reset.unflatten(1, (context.size, -1))
    return ContextPart(context, parts.any(dim=-1)), parts[:, context.rank]
