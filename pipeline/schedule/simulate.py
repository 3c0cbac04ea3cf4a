"""Plays the operation lists of all stages against a clock: when each operation runs, where stages wait, what they send.

The rules are those of the executor. A stage does one thing after the other. A receive is posted at once; a send leaves
at once and travels while its stage goes on; a wait lasts until its message is there. A transfer starts when it has been
sent and its receive is posted, one after the other in each direction of each pair of neighbours; it takes bytes /
bandwidth of the link and is there a latency later.

What is not modelled: that a stage waits for its oldest send when `executor.MAX_PENDING_SENDS` others are under way, and
that a transfer may slow a computation down.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.schedule.operations import COMPUTE, Kind, Operation, peak_live_chunks

POSTS = {Kind.POST_FORWARD: Kind.WAIT_FORWARD, Kind.POST_BACKWARD: Kind.WAIT_BACKWARD}
SENDS = {Kind.SEND_FORWARD: (Kind.WAIT_FORWARD, 1), Kind.SEND_BACKWARD: (Kind.WAIT_BACKWARD, -1)}
"""What waits for a send, and in which direction the receiving stage lies."""


@dataclass(frozen=True)
class Costs:
    """What operations take."""

    compute_s: Sequence[Mapping[Kind, float]]
    """Per stage, seconds of a forward, a backward and a replay of one chunk."""
    message_bytes: int = 0
    """One chunk's hidden states, or their gradient."""
    bytes_per_s: float = float("inf")
    latency_s: float = 0.0


class Event(NamedTuple):
    """One operation on the clock, in seconds from the start of the step.

    A send's event is its transfer, which runs beside its stage's other events.
    """

    operation: Operation
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """A step of the pipeline, simulated or measured."""

    events: list[list[Event]]
    """Per stage, in the order of its operation list."""

    @functools.cached_property
    def makespan_s(self) -> float:
        """Seconds from the first to the last event."""
        times = [(event.start_s, event.end_s) for events in self.events for event in events]
        return max(end for _, end in times) - min(start for start, _ in times)

    def compute_s(self, stage: int) -> float:
        """Seconds that a stage computes."""
        return sum(e.end_s - e.start_s for e in self.events[stage] if e.operation.kind in COMPUTE)

    @property
    def bubble_shares(self) -> list[float]:
        """Per stage, the part of the step in which it does not compute."""
        return [1 - self.compute_s(stage) / self.makespan_s for stage in range(len(self.events))]

    @property
    def bubble_share(self) -> float:
        """The part of all stages' time in which they do not compute."""
        return sum(self.bubble_shares) / len(self.events)

    @property
    def peak_live_chunks(self) -> list[int]:
        """Per stage, the most chunks whose activations it holds at once."""
        return [peak_live_chunks([event.operation for event in events]) for events in self.events]

    def messages_sent(self, stage: int) -> int:
        """Transfers that a stage sends."""
        return sum(event.operation.kind in SENDS for event in self.events[stage])


def simulate(programs: Sequence[Sequence[Operation]], costs: Costs) -> Timeline:
    """Play one step.

    Args:
        programs: per stage its operations, from `pipeline.schedule.operations`.
        costs: what they take.

    Raises:
        ValueError: the stages wait for each other for ever; the message says where.
    """
    clock = [0.0] * len(programs)
    events: list[list[Event]] = [[] for _ in programs]
    posted: dict[tuple[int, Operation], float] = {}
    sent: dict[tuple[int, Operation], tuple[float, int, int]] = {}  # when, by whom, and where in its events
    free: dict[tuple[int, Kind], float] = {}
    wire_s = costs.message_bytes / costs.bytes_per_s

    def arrive(stage: int, wait: Operation) -> float | None:
        """When the message of `wait` is there; None while nobody has sent it."""
        if (stage, wait) not in sent:
            return None
        issued, sender, index = sent.pop((stage, wait))
        start = max(issued, posted.pop((stage, wait)), free.get((stage, wait.kind), 0.0))
        free[stage, wait.kind] = start + wire_s
        events[sender][index] = Event(events[sender][index].operation, start, start + wire_s + costs.latency_s)
        return start + wire_s + costs.latency_s

    def execute(stage: int, operation: Operation) -> bool:
        """Run one operation; False when it has to wait for a stage that has not come that far."""
        start = end = clock[stage]
        kind = operation.kind
        if kind in COMPUTE:
            end = start + costs.compute_s[stage][kind]
        elif kind in POSTS:
            posted[stage, operation.of_kind(POSTS[kind])] = start
        elif kind in SENDS:
            wait, direction = SENDS[kind]
            sent[stage + direction, operation.of_kind(wait)] = (start, stage, len(events[stage]))
        else:
            arrival = arrive(stage, operation)
            if arrival is None:
                return False
            end = max(start, arrival)
        clock[stage] = end
        events[stage].append(Event(operation, start, end))
        return True

    moved = True
    while moved:
        moved = False
        for stage, program in enumerate(programs):
            while len(events[stage]) < len(program) and execute(stage, program[len(events[stage])]):
                moved = True
    stuck = [
        f"stage {stage} at {program[len(done)].kind.value} {program[len(done)][1:]}"
        for stage, (program, done) in enumerate(zip(programs, events, strict=True))
        if len(done) < len(program)
    ]
    if stuck:
        raise ValueError(f"the schedule cannot run: {'; '.join(stuck)}")
    return Timeline(events)
