"""Numbers of gradients and of their copies while a step reduces them and moves the parameters.

What DeepSpeed 0.19 does behind `coalesce_grad_reduction` and in `step` (`runtime/zero/stage_1_and_2.py`), parameter by
parameter, with a bucket of `REDUCTION_BUCKET` numbers:

1. The bucket is made. Gradients move into it until the next one does not fit; a larger one than that stays in place.
2. A full bucket is summed over the ranks. Where borders between the ranks' shares cross it, its slices are laid out
   anew: a copy of it.
3. Gradients of which this rank owns a part are copied to a buffer for all such, made for the first of them.
4. The bucket is given back. The optimizer takes one group after the other: its share in a flat copy (one gradient alone
   is taken as it is) and two temporaries of AdamW of that size. The buffer stays until the last group is flat.

The first replica has the most: its buffer is there while nearly all gradients still are. ZeRO 3 keeps the
bucket and its share of the sums all the time, and frees gradients as it goes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.config.derived import REDUCTION_BUCKET

TEMPORARIES = 2
"""Of AdamW, each of the size of what it updates at once."""

Groups = tuple[tuple[int, ...], ...]
"""Sizes of a rank's parameters in the order of the optimizer's groups."""


@functools.lru_cache(maxsize=4096)
def update_peak(groups: Groups, replicas: int, zero_stage: int) -> int:
    """Numbers that a rank holds at the most, its gradients included; what it holds all the time is not counted."""
    shares = [-(-sum(sizes) // replicas) for sizes in groups]
    if zero_stage == 3:
        return max(sum(map(sum, groups)), (1 + TEMPORARIES) * max(shares))
    return max(_Reduction(groups, shares, zero_stage).peak(), _optimizer_peak(groups, shares))


def zero3_buffers(parameters: int, replicas: int) -> int:
    """Numbers that ZeRO 3 keeps all the time for the reduction of `parameters` gradients."""
    return REDUCTION_BUCKET + -(-parameters // replicas)


def _owned(sizes: Sequence[int], share: int) -> list[int]:
    """Of the first rank: sizes of the parameters that its share has any of."""
    start, owned = 0, []
    for size in sizes:
        if start >= share:
            break
        owned.append(size)
        start += size
    return owned


def _optimizer_peak(groups: Groups, shares: Sequence[int]) -> int:
    buffer = sum(sum(_owned(sizes, share)) for sizes, share in zip(groups, shares, strict=True))
    peak = 0
    for sizes, share in zip(groups, shares, strict=True):
        flat = share if len(_owned(sizes, share)) > 1 else 0
        stays = sizes is not groups[-1] or not flat
        peak = max(peak, buffer + flat, (buffer if stays else 0) + flat + TEMPORARIES * share)
    return peak


@dataclass
class _Reduction:
    """The first three of the module's points, for the first replica."""

    groups: Groups
    shares: Sequence[int]
    zero_stage: int
    buffer: int = 0
    bucket: list[tuple[int, range]] = field(default_factory=list)
    """Size of a gradient that waits, and the ranks that own a part of it."""

    def peak(self) -> int:
        self.gradients = sum(map(sum, self.groups))
        self.most = self.gradients + REDUCTION_BUCKET
        for sizes, share in zip(self.groups, self.shares, strict=True):
            start = 0
            for size in sizes:
                if sum(waiting for waiting, _ in self.bucket) + size > REDUCTION_BUCKET:
                    self._flush()
                if size <= REDUCTION_BUCKET:
                    self.gradients -= size
                self.bucket.append((size, range(start // share, (start + size - 1) // share + 1)))
                start += size
        self._flush()
        return self.most

    def _flush(self) -> None:
        size = sum(size for size, _ in self.bucket)
        copied = size if len({rank for _, ranks in self.bucket for rank in (ranks[0], ranks[-1])}) > 1 else 0
        self._count(copied)
        if not self.buffer and any(ranks[0] == 0 for _, ranks in self.bucket):
            owned = (_owned(sizes, share) for sizes, share in zip(self.groups, self.shares, strict=True))
            self.buffer = sum(map(sum, owned))
            self._count(0)
        for size, ranks in self.bucket:
            if size > REDUCTION_BUCKET and (ranks[0] == 0 or self.zero_stage == 2):
                self.gradients -= size
        self.bucket.clear()

    def _count(self, copied: int) -> None:
        self.most = max(self.most, self.gradients + REDUCTION_BUCKET + self.buffer + copied)
