"""The loss of text by how far into its document it stands, and by the set that it is from; probes do not count."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from data.lanes.loader import WindowBatch
from pipeline.evaluation.scalars import span_name

SEGMENT_BUCKETS = 20
"""Loss by segment index: 0, 1, 2-3, 4-7, ... (powers of two); the last bucket takes the rest."""


def segment_bucket(index: Tensor) -> Tensor:
    """Bucket of a segment's index in its document."""
    return (
        torch.where(index > 0, torch.log2(index.clamp(min=1).double()).floor() + 1, 0)
        .long()
        .clamp(max=SEGMENT_BUCKETS - 1)
    )


def bucket_name(bucket: int) -> str:
    """`0`, `1`, `2-3`, `4-7`, ..."""
    first, last = (2 ** (bucket - 1), 2**bucket) if bucket else (0, 1)
    return span_name((first, last)) if bucket < SEGMENT_BUCKETS - 1 else f"{first}+"


class GroupedLosses:
    """Sums of losses and of their weights by group, on the device."""

    def __init__(self, groups: int, device: torch.device) -> None:
        self._sums = torch.zeros(2, groups, dtype=torch.float64, device=device)

    def collect(self) -> dict[int, float]:
        """Means over all processes by the group's number, of groups with any weight, and begin anew; collective."""
        sums = self._sums.clone()
        dist.all_reduce(sums)
        self._sums.zero_()
        losses, weights = sums.tolist()
        both = enumerate(zip(losses, weights, strict=True))
        return {group: loss / weight for group, (loss, weight) in both if weight}


class LossBySegment(GroupedLosses):
    """Groups are `segment_bucket`s.

    A token's segment index is how many borders of its lane's segments lie between its document's start and it. So
    with packing a document's first segment may be short, and everything behind a start inside of a segment has index 0.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(SEGMENT_BUCKETS, device)

    def add(self, batch: WindowBatch, token_loss: Tensor, segment_length: int) -> None:
        """A window of this process: its losses `[B, T, S]`."""
        weights = batch.loss_weight.double()
        both = torch.stack([token_loss.double() * weights, weights])
        borders = -(-batch.position_in_document // segment_length)
        if batch.starts is not None:
            started = batch.part.own(batch.starts).cumsum(dim=-1) > 0
            self._sums[:, 0] += both.where(started, 0).sum(dim=(1, 2, 3))
            both = both.where(~started, 0)
        self._sums.index_add_(1, segment_bucket(borders).flatten(), both.sum(dim=-1).flatten(start_dim=1))


class LossBySet(GroupedLosses):
    """Groups are the sets of the mixture, by their places in it."""

    def add(self, batch: WindowBatch, token_loss: Tensor) -> None:
        """A window of this process, which has `set_index`: its losses `[B, T, S]`."""
        weights = batch.loss_weight.double()
        both = torch.stack([token_loss.double() * weights, weights])
        for number in range(self._sums.shape[1]):  # sums in a fixed order, which index_add_ on a GPU would not have
            self._sums[:, number] += both.where(batch.set_index == number, 0).sum(dim=(1, 2, 3))
