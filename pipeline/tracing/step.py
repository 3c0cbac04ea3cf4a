"""One training step of the real code, traced: on a pretended accelerator, as a pretended rank of a pretended world.

Forward, recomputation and backward of as many microbatches as it takes until a step only repeats itself, the sums of
the step, the reduction of the gradients and the optimizer's step, by the code that trains.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from data.lanes.window import ProbeBatch, WindowBatch
from model.decoder import DecoderStage
from model.rules.state import Memory, take_lanes
from pipeline.accounting.live_bytes import LiveBytes
from pipeline.accounting.planner import microbatches_per_step
from pipeline.config import derived
from pipeline.config.schema import Config
from pipeline.parallel.optimizer import ZeroOptimizer
from pipeline.parallel.setup import build_stage
from pipeline.parallel.topology import Topology
from pipeline.schedule.executor import Executor
from pipeline.schedule.operations import Kind, Operation, configured_schedule
from pipeline.tracing.host_reads import listed
from pipeline.tracing.ledger import Collective, HostRead, Launch, Ledger, Traffic
from pipeline.tracing.world import group_labels, pretended_world
from pipeline.training.agreement import agreed_weight
from pipeline.training.batch_sums import own_sums
from pipeline.training.batches import full_batch

PARAMETERS, GRADIENTS, OPTIMIZER, STATE, BATCH = "parameters", "gradients", "optimizer", "memory state", "batch"
ACTIVATIONS, UPDATE = "activations", "update"
"""What live bytes are made of; `update` is what the optimizer's step needs for a moment."""

PASSES = ("forward", "recomputation", "backward")
"""The phases of a chunk; what else is launched once a step is in the phases sums, gradients and optimizer."""

Progress = Callable[[], None]
"""Called after every chunk's backward."""


@dataclass(frozen=True)
class StepTrace:
    """What one rank does in one step."""

    rank: int
    stage: int
    layers: int
    chunks: int
    """Run, forward and backward."""
    microbatches: int
    """Run: what follows in a longer step repeats them."""
    microbatches_per_step: int
    parameter_count: int
    setup_peak_bytes: int
    """While stage and optimizer are built, before the first step."""
    peak_bytes: int
    """In the step."""
    at_peak: dict[str, int]
    """What the peak is made of."""
    launches: Counter[Launch]
    dtype_copies: Counter[tuple[str, str]]
    collectives: dict[Collective, Traffic]
    reads: Counter[HostRead]
    unread_copies: Counter[HostRead]
    seconds: float = field(compare=False)

    @property
    def unlisted_reads(self) -> list[HostRead]:
        """Those that nobody has given a reason for."""
        return [read for read in self.reads if listed(read.place) is None]

    def in_layers(self, phase: str | None = None, operation: str | None = None) -> float:
        """Launches per layer and chunk; of one phase or one operation alone."""
        return self._count(True, phase, operation) / (self.layers * self.chunks)

    def beside_layers(self, phase: str | None = None) -> float:
        """Launches per chunk of embedding, output, loss and what is between the chunks."""
        return self._count(False, phase, None) / self.chunks

    def _count(self, in_layers: bool, phase: str | None, operation: str | None) -> int:
        return sum(
            count
            for launch, count in self.launches.items()
            if launch.in_layers == in_layers and phase in (None, launch.phase) and operation in (None, launch.operation)
        )


def enough_microbatches(config: Config, world_size: int) -> int:
    """Microbatches after which a step only repeats itself: as many as the first stage runs forward before it goes back,
    and one more, since the gradients are there from then on."""
    chunks = config.bptt.chunks_per_window
    ahead = -(-(config.parallel.pipeline - 1 + chunks) // chunks)
    return min(microbatches_per_step(config, world_size), ahead + 1)


def first_rank(config: Config, world_size: int, stage: int) -> int:
    """The first rank of a pipeline stage: stages are the outermost axis of the process grid."""
    return stage * (world_size // config.parallel.pipeline)


def trace_step(
    config: Config,
    world_size: int,
    rank: int,
    vocab: int,
    *,
    microbatches: int | None = None,
    statistics: bool = False,
    update: bool = True,
    progress: Progress | None = None,
) -> StepTrace:
    """Trace a step of a rank.

    Args:
        config: validated for `world_size` processes.
        vocab: tokens of the tokenizer.
        microbatches: how many to run; None for as many as peak and averages need.
        statistics: the step also measures the memory.
        update: also reduce the gradients and move the parameters; without, there is no optimizer at all.

    Raises:
        MixedDevicesError: tensors of two devices meet.
        HostReadError: a shape depends on values.
    """
    start = time.perf_counter()
    with pretended_world(config, rank, world_size) as topology:
        live = LiveBytes(topology.device.type)
        ledger = Ledger(topology.device.type, group_labels(topology))
        with live:
            run = TracedRun(config, world_size, vocab, topology, live, update=update)
            setup_peak = live.peak
            live.forget_peak()
            run.microbatches = microbatches or enough_microbatches(config, world_size)
            with ledger, ledger.watching(run.stage.layers):
                run.step(ledger, statistics=statistics, observer=_Observer(ledger, progress))
            at_peak = live.peak_by_label
            # What the microbatches that are left out would have carried out by then.
            in_all = microbatches_per_step(config, world_size)
            at_peak[STATE] += at_peak[STATE] * (in_all - run.microbatches) // in_all
    return StepTrace(
        rank=rank,
        stage=topology.pipeline_rank,
        layers=len(run.stage.layers),
        chunks=run.microbatches * config.bptt.chunks_per_window,
        microbatches=run.microbatches,
        microbatches_per_step=in_all,
        parameter_count=run.parameter_count,
        setup_peak_bytes=setup_peak,
        peak_bytes=at_peak.total(),
        at_peak={name: size for name, size in at_peak.items() if size},
        launches=ledger.launches,
        dtype_copies=ledger.dtype_copies,
        collectives=ledger.collectives,
        reads=ledger.reads,
        unread_copies=ledger.unread_copies,
        seconds=time.perf_counter() - start,
    )


def _as_written(config: Config) -> Config:
    """`config` without the compiler, which makes nothing for a device that does not exist, and with the mask in place
    of FlexAttention, which it makes."""
    return replace(config, model=replace(config.model, compile=False, packed_attention="auto"))


class TracedRun:
    """The parts of a run that a step needs, in a pretended world."""

    def __init__(
        self, config: Config, world_size: int, vocab: int, topology: Topology, live: LiveBytes, *, update: bool
    ) -> None:
        self.config, self.topology, self.live = config, topology, live
        self.lanes_per_microbatch = derived.lanes_per_microbatch(config, world_size)
        self.microbatches = microbatches_per_step(config, world_size)
        live.label = PARAMETERS
        with topology.device:
            self.stage = build_stage(_as_written(config), topology, vocab)
        live.forget_peak()  # initial values are drawn on the CPU
        self.parameter_count = sum(p.numel() for p in self.stage.parameters())
        self.optimizer: ZeroOptimizer | None = None
        if update:
            live.label = OPTIMIZER
            self.optimizer = ZeroOptimizer(self.stage, topology, config)
            self.optimizer.set_steps_taken(1, 1)  # the moments, which a first step makes behind its peak
            for _, parameter in self.optimizer.named:
                live.relabel(self.optimizer.partitions.held(parameter), PARAMETERS)  # ZeRO has moved them
        _label_gradients(self.stage, live)
        lanes = derived.lanes_per_rank(config, world_size)
        live.label = BATCH
        self.batch = full_batch(config, lanes, topology.device)
        live.label = STATE
        self.memory: Memory = self.stage.empty_memory(lanes, topology.device)
        self.executor = Executor(
            self.stage, topology, chunks=config.bptt.chunks_per_window, carry_gradient=config.bptt.gradient == "full"
        )

    def step(self, ledger: Ledger, *, statistics: bool, observer: Callable[[Operation | None], None]) -> None:
        """What `Trainer.train_step` does with `microbatches` microbatches, from the batch on."""
        config, topology = self.config, self.topology
        lanes = self.microbatches * self.lanes_per_microbatch
        batch, memory = _first_lanes(self.batch, lanes), take_lanes(self.memory, slice(0, lanes))
        schedule = configured_schedule(config, stage=topology.pipeline_rank, microbatches=self.microbatches)
        self.live.label = ACTIVATIONS
        ledger.phase = "sums"
        agreed_weight(batch, topology, step=1)
        with self._accumulate(ledger):
            result = self.executor.run(
                schedule,
                batch,
                memory,
                lanes_per_microbatch=self.lanes_per_microbatch,
                gate_scale=config.train.write_gate_penalty,
                statistics=statistics,
                observer=observer,
            )
            ledger.phase = "sums"
            sums = own_sums(batch, result, topology, sliding=config.model.local_context == "sliding")
            self.live.label = UPDATE
            ledger.phase = "gradients"
        if self.optimizer:
            ledger.phase = "optimizer"
            self.optimizer.step(config.optimizer.lr, sums)

    @contextmanager
    def _accumulate(self, ledger: Ledger):
        if self.optimizer is None:
            yield
            return
        with self.optimizer.accumulate():
            yield


class _Observer:
    """Follows the schedule: the ledger's phase, and the progress."""

    def __init__(self, ledger: Ledger, progress: Progress | None) -> None:
        self.ledger, self.progress = ledger, progress
        self.backward = False

    def __call__(self, operation: Operation | None) -> None:
        kind = operation.kind if operation else None
        self.ledger.phase = {Kind.REPLAY: "recomputation", Kind.BACKWARD: "backward"}.get(kind, "forward")
        if self.progress and self.backward:
            self.progress()
        self.backward = kind is Kind.BACKWARD


def _first_lanes(batch: WindowBatch, lanes: int) -> WindowBatch:
    """The batch's first lanes, as views."""

    def cut(part):
        return {k: v[:lanes] if isinstance(v, Tensor | list) else v for k, v in vars(part).items()}

    return WindowBatch(**cut(batch) | {"probes": batch.probes and ProbeBatch(**cut(batch.probes))})


def _label_gradients(stage: DecoderStage, live: LiveBytes) -> None:
    """Count gradients as what they are as soon as they are the parameters'."""

    def own(parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            live.relabel(parameter.grad, GRADIENTS)

    for parameter in stage.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(own)
