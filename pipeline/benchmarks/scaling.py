"""What more processes bring: the same step on one process and on several, by data, tensor and pipeline parallelism.

A step is a whole one: forward and backward of all lanes, gradients reduced, optimizer. What a layout could reach at
best is said by bounds, from numbers measured in the same processes:

    shared machine   every process computes its share of the lanes, and nobody talks: what the machine gives
    data             the single process's time / n, and the gradients' reduction and the parameters' gathering alone
    tensor           the single process's time / n, and as many reductions of hidden states as there are
    pipeline         the simulation of the operation lists with each stage's own mean costs and the messages' latency

The communication of a bound is measured without computation beside it, and nothing of it is hidden behind computation.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from data.files import write_whole
from pipeline.accounting.communication import chunks_per_step, tensor_bytes
from pipeline.benchmarks.alternating import wait_for
from pipeline.benchmarks.contestants import Sizes, own_config
from pipeline.benchmarks.pipeline import Recorder, mean_costs, message_latency
from pipeline.benchmarks.repeated_step import random_batch
from pipeline.config.schema import Config
from pipeline.parallel.optimizer import ZeroOptimizer
from pipeline.parallel.setup import build_stage
from pipeline.parallel.topology import Topology, initialize
from pipeline.schedule.executor import Executor
from pipeline.schedule.operations import Operation, configured_schedule
from pipeline.schedule.simulate import Costs, Event, Timeline, simulate
from pipeline.training.batches import to_device

SINGLE, DATA, TENSOR, PIPELINE = "single", "data", "tensor", "pipeline"
PIPELINE_CHUNKS = 4
"""Per window, with pipeline stages."""
LEARNING_RATE = 1e-4


@dataclass
class LayoutTimes:
    """One layout in one launch, as rank 0 saw it: barriers stand around every step."""

    layout: str
    processes: int
    step_s: list[float]
    compute_s: list[float]
    """Forward and backward alone; on every process at once, its share of the lanes, without communication between
    them (`single` and `data` only)."""
    communication_s: float | None
    """Of a step, measured by itself; None where nobody talks, and with pipeline stages."""
    simulated_s: float | None
    """Forward and backward, with pipeline stages: what the operation lists take in the simulation."""
    ran_s: float | None
    """The same as they ran, the median."""
    bubble_share: float | None
    """Of the simulation."""


def config_of(layout: str, processes: int, sizes: Sizes, rule: str, settings: list[str]) -> Config:
    """The configuration of a layout; all of them train on the same `sizes.lanes` lanes."""
    own = {
        SINGLE: [],
        DATA: [],
        TENSOR: [f"parallel.tensor={processes}"],
        PIPELINE: [f"parallel.pipeline={processes}", f"bptt.chunks_per_window={PIPELINE_CHUNKS}"],
    }[layout]
    return own_config(sizes, rule, "fp32", [*own, *settings])


class _Trained:
    """This process's part of a layout."""

    def __init__(self, config: Config) -> None:
        parallel = config.parallel
        self.config = config
        self.topology = initialize(tensor=parallel.tensor, pipeline=parallel.pipeline, timeout_s=600)
        self.stage = build_stage(config, self.topology, config.model.vocab_size)
        self.optimizer: ZeroOptimizer | None = None
        self.executor = Executor(self.stage, self.topology, chunks=config.bptt.chunks_per_window, carry_gradient=True)
        lanes = config.train.lanes // self.topology.data_size
        self.lanes_per_microbatch = 1 if parallel.pipeline > 1 else lanes
        self.schedule = configured_schedule(
            config, stage=self.topology.pipeline_rank, microbatches=lanes // self.lanes_per_microbatch
        )
        own = replace(config, train=replace(config.train, lanes=lanes))
        self.batch = to_device(random_batch(own), self.topology.device)
        self.memory = self.stage.empty_memory(lanes, self.topology.device)

    def forward_backward(self, observer: Callable[[Operation | None], None] | None = None) -> None:
        tokens = float(self.batch.loss_weight.sum()) * self.topology.data_size
        self.executor.run(
            self.schedule,
            self.batch,
            self.memory,
            lanes_per_microbatch=self.lanes_per_microbatch,
            loss_scale=1 / tokens,
            observer=observer,
        )

    def prepare_steps(self) -> None:
        """From here on there are whole steps, and gradients are DeepSpeed's, which reduces them."""
        self.stage.zero_grad(set_to_none=True)
        self.optimizer = ZeroOptimizer(self.stage, self.topology, self.config)

    def step(self) -> None:
        with self.optimizer.accumulate():
            self.forward_backward()
        self.optimizer.step(LEARNING_RATE)


def measure(*, layouts: list[str], sizes: list[int], rule: str, settings: list[str], steps: int) -> list[LayoutTimes]:
    """Every layout on all processes, one after the other; collective.

    Args:
        sizes: the fields of `Sizes`.
        steps: of each kind, after one that is not counted.
    """
    found = []
    for layout in layouts:
        trained = _Trained(config_of(layout, int(os.environ["WORLD_SIZE"]), Sizes(*sizes), rule, settings))
        found.append(_measure(layout, trained, steps))
    return found


def _measure(layout: str, trained: _Trained, steps: int) -> LayoutTimes:
    device = trained.topology.device
    trained.forward_backward()
    compute_s = []
    if layout in (SINGLE, DATA):
        compute_s = [_together(trained.forward_backward, device) for _ in range(steps)]
    communication, simulated, ran = None, None, None
    if layout == DATA:
        communication = _data_communication(trained, steps)
    elif layout == TENSOR:
        communication = _tensor_communication(trained, steps)
    elif layout == PIPELINE:
        simulated, ran = _simulation(trained, steps)
    trained.prepare_steps()
    trained.step()
    step_s = [_together(trained.step, device) for _ in range(steps)]
    return LayoutTimes(
        layout=layout,
        processes=dist.get_world_size(),
        step_s=step_s,
        compute_s=compute_s,
        communication_s=communication,
        simulated_s=simulated and simulated.makespan_s,
        ran_s=ran,
        bubble_share=simulated and simulated.bubble_share,
    )


def _together(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until all processes have done their part."""
    wait_for(device)
    dist.barrier()
    start = time.perf_counter()
    work()
    wait_for(device)
    dist.barrier()
    return time.perf_counter() - start


def _data_communication(trained: _Trained, repeats: int) -> float:
    """ZeRO 1: one reduction of all gradients, and one gathering of all parameters."""
    topology = trained.topology
    count = sum(parameter.numel() for parameter in trained.stage.parameters())
    count += -count % topology.data_size
    whole = torch.zeros(count, device=topology.device)
    own = whole.new_zeros(count // topology.data_size)

    def talk() -> None:
        dist.all_reduce(whole, group=topology.replica_group)
        dist.all_gather_into_tensor(whole, own, group=topology.replica_group)

    return _median_of(talk, repeats, topology)


def _tensor_communication(trained: _Trained, repeats: int) -> float:
    """As many reductions of a chunk's hidden states as `pipeline.accounting.communication` counts bytes for."""
    topology, config = trained.topology, trained.config
    world, sizes = dist.get_world_size(), config.model
    sent = tensor_bytes(config, world, layers=range(sizes.num_layers), is_first=True, is_last=True)
    tokens = trained.lanes_per_microbatch * config.train.segments_per_window * sizes.segment_length
    hidden = torch.zeros(tokens // config.bptt.chunks_per_window, sizes.hidden_size, device=topology.device)
    # A ring sends 2 (n - 1) / n of a tensor to reduce it for all.
    one = 2 * hidden.nbytes * (topology.tensor_size - 1) // topology.tensor_size
    times = chunks_per_step(config, world) * (sent.forward + sent.backward) / one
    return times * _median_of(lambda: dist.all_reduce(hidden, group=topology.tensor_group), repeats, topology)


def _median_of(talk: Callable[[], object], repeats: int, topology: Topology) -> float:
    talk()
    return statistics.median(_together(talk, topology.device) for _ in range(repeats))


def _simulation(trained: _Trained, repeats: int) -> tuple[Timeline, float]:
    """The operation lists with the mean costs of every stage, and how long forward and backward really took."""
    device = trained.topology.device
    mine: list[list[Event]] = []
    for _ in range(repeats):
        recorder = Recorder({})

        def watch(operation: Operation | None, recorder: Recorder = recorder) -> None:
            wait_for(device)  # else a device's operation would end when it is given
            recorder(operation)

        _together(lambda watch=watch: trained.forward_backward(watch), device)
        mine.append(recorder.events)
    everyone: list[list[list[Event]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    timelines = [Timeline([rank[i] for rank in everyone]) for i in range(repeats)]
    lengths = [timeline.makespan_s for timeline in timelines]
    shown = timelines[lengths.index(statistics.median_low(lengths))]
    costs = Costs([mean_costs(events) for events in shown.events], latency_s=message_latency(shown))
    programs = [[event.operation for event in events] for events in shown.events]
    return simulate(programs, costs), shown.makespan_s


def write_results(path: Path, results: list[LayoutTimes]) -> None:
    """Write results as JSON, for `read_results` in another process."""
    write_whole(path, json.dumps([asdict(result) for result in results]))


def read_results(path: Path) -> list[LayoutTimes]:
    """What `write_results` wrote."""
    return [LayoutTimes(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
