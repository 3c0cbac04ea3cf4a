"""The pipeline as it really ran, next to the simulation of the same operation lists.

Every rank notes when each operation began and ended, by the machine's monotonic clock, which its processes share.

Two ways to run. **Free**: stages compute as fast as they can. That is a fair picture only where every stage has a core
of its own; stages that share cores slow each other down. **Paced**: a computation that is done early sleeps until its
set time is over, as if an accelerator of fixed speed did it. The computation, the messages and the waiting stay real,
and a machine with fewer cores than stages can show whether schedule and simulation agree.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data.files import write_whole
from pipeline.benchmarks.measuring import tracked_peak
from pipeline.benchmarks.repeated_step import Step, random_batch
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.parallel.topology import initialize
from pipeline.schedule.operations import COMPUTE, Kind, Operation
from pipeline.schedule.simulate import SENDS, Costs, Event, Timeline, simulate

MODEL = [
    "model.num_layers=8",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.ffn_hidden_size=172",
    "model.vocab_size=256",
    "model.segment_length=64",
    "model.memory.rule=delta",
    "train.segments_per_window=16",
    "train.lanes_per_microbatch=1",
]
VARIANTS = {
    "segment_1f1b": ["bptt.chunks_per_window=4"],
    "segment_1f1b, recompute window": ["bptt.chunks_per_window=4", "bptt.recompute=window"],
    "1f1b": ["bptt.chunks_per_window=1", "parallel.schedule=1f1b"],
}


@dataclass(frozen=True)
class Measured:
    """One variant of the schedule on one number of stages."""

    variant: str
    paced: bool
    timeline: Timeline
    """The repeat with the median length."""
    simulated: Timeline
    """The same lists with the mean measured cost of every stage's kinds of computation and the messages' latency."""
    latency_s: float
    """From sending to the end of a wait that had begun before, the median."""
    bubble_shares: list[float]
    """Of all repeats."""
    cpu_s: float
    """CPU time of all computations of all stages, in the shown repeat."""
    overruns: int
    """Paced computations that took longer than their set time, in the shown repeat."""
    live_chunks: list[int]
    """Per stage, the executor's own count of activations held at once."""
    live_bytes: list[int]
    """Per stage, the live tensors of a step at most."""

    @property
    def same_order(self) -> float:
        """Of the pairs of computations on different stages that the simulation puts clearly apart, the part that ran in
        the same order."""
        return order_agreement(self.simulated, self.timeline)


class Recorder:
    """Observer of `Executor.run`: notes begin, end and CPU time of every operation, and keeps the pace.

    Args:
        pace_s: least seconds of each kind of computation; empty for none.
    """

    def __init__(self, pace_s: Mapping[Kind, float]) -> None:
        self.pace_s = pace_s
        self.overruns = 0
        self.cpu_s = 0.0
        self.events: list[Event] = []
        self._open: tuple[Operation, float, float] | None = None

    def __call__(self, operation: Operation | None) -> None:
        if self._open is not None:
            last, start, cpu = self._open
            if last.kind in COMPUTE:
                self.cpu_s += time.thread_time() - cpu
            if last.kind in COMPUTE and last.kind in self.pace_s:
                left = start + self.pace_s[last.kind] - time.monotonic()
                self.overruns += left < 0
                time.sleep(max(0.0, left))
            self.events.append(Event(last, start, time.monotonic()))
        self._open = None if operation is None else (operation, time.monotonic(), time.thread_time())


def measure(*, pipeline: int, lanes: int, repeats: int, chunk_s: float, model: list[str]) -> list[Measured]:
    """Run every variant, free and paced, on all ranks; collective. Every rank gets all results.

    Args:
        pipeline: stages; there must be as many processes.
        lanes: microbatches per step.
        repeats: steps of each kind.
        chunk_s: paced seconds of the forward of a quarter of a window; a backward takes twice that.
        model: overrides on top of `MODEL`.
    """
    common = [*MODEL, *model, f"train.lanes={lanes}", f"parallel.pipeline={pipeline}"]
    topology = initialize(tensor=1, pipeline=pipeline, timeout_s=120)
    step = Step(load_config(None, common), topology)
    batch = random_batch(step.config)
    configs = {name: load_config(None, [*common, *overrides]) for name, overrides in VARIANTS.items()}
    for config in configs.values():
        step.run(batch, config)  # makes gradients and connections
    results = []
    for paced in (False, True):
        # The variants take turns, so that other work on the machine meets all of them.
        runs: dict[str, list[tuple[Recorder, int]]] = {name: [] for name in configs}
        for _ in range(repeats):
            for name, config in configs.items():
                recorder = Recorder(pace(config, chunk_s) if paced else {})
                dist.barrier()
                runs[name].append((recorder, step.run(batch, config, recorder).peak_live_chunks))
        for name, config in configs.items():
            live = tracked_peak(lambda config=config: step.run(batch, config))
            results.append(_gather(name, paced, runs[name], live))
    return results


def pace(config: Config, chunk_s: float) -> dict[Kind, float]:
    """Seconds of each kind of computation: the same per segment whatever the chunk."""
    forward = chunk_s * 4 / config.bptt.chunks_per_window
    return {Kind.FORWARD: forward, Kind.REPLAY: forward, Kind.BACKWARD: 2 * forward}


def _gather(variant: str, paced: bool, runs: list[tuple[Recorder, int]], live_bytes: int) -> Measured:
    mine = [(recorder.events, recorder.cpu_s, recorder.overruns, live) for recorder, live in runs]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (mine, live_bytes))
    timelines = [Timeline([rank[i][0] for rank, _ in everyone]) for i in range(len(runs))]
    lengths = [timeline.makespan_s for timeline in timelines]
    shown = lengths.index(statistics.median_low(lengths))
    timeline = timelines[shown]
    latency_s = message_latency(timeline)
    costs = Costs([mean_costs(events) for events in timeline.events], latency_s=latency_s)
    programs = [[event.operation for event in events] for events in timeline.events]
    return Measured(
        variant=variant,
        paced=paced,
        timeline=timeline,
        simulated=simulate(programs, costs),
        latency_s=latency_s,
        bubble_shares=[timeline.bubble_share for timeline in timelines],
        cpu_s=sum(rank[shown][1] for rank, _ in everyone),
        overruns=sum(rank[shown][2] for rank, _ in everyone),
        live_chunks=[rank[shown][3] for rank, _ in everyone],
        live_bytes=[bytes_ for _, bytes_ in everyone],
    )


def mean_costs(events: list[Event]) -> dict[Kind, float]:
    """Mean seconds of each kind of computation of one stage."""
    kinds = {event.operation.kind for event in events} & set(COMPUTE)
    return {kind: statistics.fmean(e.end_s - e.start_s for e in events if e.operation.kind is kind) for kind in kinds}


def message_latency(timeline: Timeline) -> float:
    """Median seconds from the start of a send to the end of the wait for it, of waits that began before the send."""
    waits = {
        (stage, e.operation): e
        for stage, events in enumerate(timeline.events)
        for e in events
        if e.operation.kind in (Kind.WAIT_FORWARD, Kind.WAIT_BACKWARD)
    }
    samples = []
    for stage, events in enumerate(timeline.events):
        for event in events:
            if event.operation.kind in SENDS:
                kind, direction = SENDS[event.operation.kind]
                wait = waits[stage + direction, event.operation._replace(kind=kind)]
                if wait.start_s < event.start_s:
                    samples.append(wait.end_s - event.start_s)
    return statistics.median(samples) if samples else 0.0


def order_agreement(simulated: Timeline, measured: Timeline) -> float:
    """Of the pairs of computations on different stages that start at least half a mean computation apart in the
    simulation, the part that started in the same order when measured."""

    def starts(timeline: Timeline) -> dict[tuple[int, Operation], float]:
        return {
            (stage, event.operation): event.start_s
            for stage, events in enumerate(timeline.events)
            for event in events
            if event.operation.kind in COMPUTE
        }

    expected, seen = starts(simulated), starts(measured)
    total = sum(simulated.compute_s(stage) for stage in range(len(simulated.events)))
    apart = 0.5 * total / len(expected)
    order = sorted(expected, key=expected.get)
    same = pairs = 0
    for i, first in enumerate(order):
        for second in order[i + 1 :]:
            if first[0] != second[0] and expected[second] - expected[first] >= apart:
                pairs += 1
                same += seen[first] < seen[second]
    return same / pairs if pairs else 1.0


def write_results(path: Path, results: list[Measured]) -> None:
    """Write results as JSON, for `read_results` in another process."""

    def plain(timeline: Timeline) -> list:
        return [
            [[e.operation.kind.name, *e.operation[1:], e.start_s, e.end_s] for e in events]
            for events in timeline.events
        ]

    rows = [vars(r) | {"timeline": plain(r.timeline), "simulated": plain(r.simulated)} for r in results]
    write_whole(path, json.dumps(rows))


def read_results(path: Path) -> list[Measured]:
    """What `write_results` wrote."""

    def timeline(rows: list) -> Timeline:
        return Timeline(
            [[Event(Operation(Kind[kind], m, c), start, end) for kind, m, c, start, end in events] for events in rows]
        )

    rows = json.loads(path.read_text(encoding="utf-8"))
    return [
        Measured(**row | {"timeline": timeline(row["timeline"]), "simulated": timeline(row["simulated"])})
        for row in rows
    ]
