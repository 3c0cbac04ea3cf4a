"""Which rank holds the others up: seconds that each of them works itself, and the slowest by name.

All ranks of a step end it together, since they wait for one another. What tells them apart is the time that a rank does
not wait: for its window from the disk, and in the forward and backward passes between two transfers. Ranks of one
pipeline stage have the same work and are compared. Tensor- and context-parallel ranks wait for one another inside
their layers and are slow as a whole; where no others are, there is nobody to compare with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from model.device import Stopwatch
from pipeline.parallel.topology import Topology
from pipeline.schedule.operations import COMPUTE, Operation

NUMBERS = 2
"""Of a rank: seconds of its own per step, and those of them that it waits for data."""
PATIENCE = 2
"""Intervals in a row in which a rank must be the slowest, and slow, before it is named: one hiccup is none."""


class OwnTime:
    """What this rank works, in seconds: passes of the schedule, without the transfers between them."""

    def __init__(self, topology: Topology) -> None:
        self._stopwatch = Stopwatch(topology.device)
        self._works = False

    def at(self, operation: Operation | None) -> None:
        """The schedule comes to an operation, or (None) to its end."""
        if self._works:
            self._stopwatch.stop()
        self._works = operation is not None and operation.kind in COMPUTE
        if self._works:
            self._stopwatch.start()

    def step_s(self) -> float:
        """Of the step that has just ended; its work is done."""
        return self._stopwatch.read_s()


@dataclass(frozen=True)
class Slowest:
    """The rank that takes longest beside those of its stage."""

    rank: int
    own_s: float
    data_s: float
    others_s: float
    """Median of the other ranks of its stage."""

    @property
    def slowdown(self) -> float:
        return self.own_s / self.others_s if self.others_s > 0 else math.nan


def slots(rank: int, world_size: int, own_s: float, data_s: float) -> list[float]:
    """This rank's numbers among places for all ranks': the largest of all processes' lists has everybody's."""
    values = [-math.inf] * (NUMBERS * world_size)
    values[NUMBERS * rank : NUMBERS * (rank + 1)] = [own_s, data_s]
    return values


def find_slowest(own_s: list[float], data_s: list[float], stages: int) -> Slowest | None:
    """The slowest of all ranks, which are numbered stage by stage; None where a stage is one rank.

    Args:
        own_s, data_s: by rank.
    """
    size = len(own_s) // stages
    found = []
    for first in range(0, len(own_s), size) if size > 1 else ():
        rank = max(range(first, first + size), key=own_s.__getitem__)
        others = [own_s[other] for other in range(first, first + size) if other != rank]
        found.append(Slowest(rank, own_s[rank], data_s[rank], median(others)))
    return max(found, key=lambda each: each.slowdown, default=None)


class StragglerWatch:
    """Says in words which rank is slow, once, and when it no longer is.

    Args:
        bound: times the median of the others; more is slow.
        hosts: by rank.
        sharing: ranks with consecutive numbers that work on every layer together.
    """

    def __init__(self, bound: float, hosts: list[str], sharing: int) -> None:
        self.bound, self.hosts, self.sharing = bound, hosts, sharing
        self._seen: tuple[int, int] = (-1, 0)
        """A rank, and the intervals in a row in which it was slow."""
        self._named: int | None = None

    def after_interval(self, slowest: Slowest) -> str | None:
        """A message, when there is something new to say."""
        slow = slowest.slowdown > self.bound
        rank, times = self._seen
        self._seen = (slowest.rank, times + 1 if slowest.rank == rank else 1) if slow else (-1, 0)
        if self._named is not None and not slow:
            rank, self._named = self._named, None
            return f"rank {rank} on {self.hosts[rank]} keeps up again"
        if not slow or slowest.rank == self._named or self._seen[1] < PATIENCE:
            return None
        self._named = slowest.rank
        first = slowest.rank - slowest.rank % self.sharing
        group = "" if self.sharing == 1 else f" (or another of ranks {first} to {first + self.sharing - 1})"
        return (
            f"RANK {slowest.rank} ON {self.hosts[slowest.rank]} IS SLOW{group}: it works {slowest.own_s:.3g} s a step "
            f"({slowest.data_s:.3g} s of that it waits for data), {slowest.slowdown:.2f} times the median of the other "
            f"ranks of its stage ({slowest.others_s:.3g} s); all wait for it"
        )
