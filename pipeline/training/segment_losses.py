"""The loss by how far into its document a segment stands."""

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


class LossBySegment:
    """Sums of losses and of their weights, by bucket, on the device."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, SEGMENT_BUCKETS, dtype=torch.float64, device=device)

    def add(self, batch: WindowBatch, token_loss: Tensor, segment_length: int) -> None:
        """A window of this process: its losses `[B, T, S]`."""
        bucket = segment_bucket(batch.position_in_document // segment_length).flatten()
        losses = (token_loss.double() * batch.loss_weight).sum(dim=-1).flatten()
        self._sums[0].index_add_(0, bucket, losses)
        self._sums[1].index_add_(0, bucket, batch.loss_weight.double().sum(dim=-1).flatten())

    def collect(self) -> dict[str, float]:
        """Means over all processes by the bucket's name, where there is one, and begin anew; collective."""
        sums = self._sums.clone()
        dist.all_reduce(sums)
        self._sums.zero_()
        losses, weights = sums.tolist()
        both = enumerate(zip(losses, weights, strict=True))
        return {bucket_name(bucket): loss / weight for bucket, (loss, weight) in both if weight}
