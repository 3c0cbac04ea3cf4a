"""Forward and backward of one window without data and optimizer, as often as wanted: what most benchmarks time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from data.lanes.loader import WindowBatch
from model.rules.state import Memory
from pipeline.config.schema import Config
from pipeline.parallel.setup import build_stage
from pipeline.parallel.topology import Topology
from pipeline.schedule.executor import Executor, StepResult
from pipeline.schedule.operations import Operation, configured_schedule


def random_batch(config: Config, *, segments: int | None = None) -> WindowBatch:
    """A window of random tokens in every lane, the same on every rank; each lane is the beginning of one document.

    Args:
        segments: of the window; None takes `train.segments_per_window`.
    """
    lanes, length = config.train.lanes, config.model.segment_length
    segments = config.train.segments_per_window if segments is None else segments
    generator = torch.Generator().manual_seed(config.train.seed)
    text = torch.randint(0, config.model.vocab_size, (lanes, segments * length + 1), generator=generator)
    shape = (lanes, segments, length)
    reset = torch.zeros(lanes, segments, dtype=torch.bool)
    reset[:, 0] = True
    return WindowBatch(
        tokens=text[:, :-1].reshape(shape),
        labels=text[:, 1:].reshape(shape),
        loss_weight=torch.ones(shape),
        answer_mask=torch.zeros(shape, dtype=torch.bool),
        reset=reset,
        position_in_document=(torch.arange(segments) * length).expand(lanes, segments),
        lane_ids=torch.arange(lanes),
        padded_tokens=0,
        documents=[[] for _ in range(lanes)],
    )


class Step:
    """One rank's part of a step that can be repeated; gradients add up in the parameters.

    Args:
        config: decides model, window, chunks and recomputation; data parallelism is not used.
    """

    def __init__(self, config: Config, topology: Topology) -> None:
        self.config, self.topology = config, topology
        self.stage = build_stage(config, topology, config.model.vocab_size)

    def schedule(self, config: Config) -> list[Operation]:
        """This stage's operations for `config`."""
        microbatches = config.train.lanes // self.lanes_per_microbatch
        return configured_schedule(config, stage=self.topology.pipeline_rank, microbatches=microbatches)

    @property
    def lanes_per_microbatch(self) -> int:
        return 1 if self.topology.pipeline_size > 1 else self.config.train.lanes

    def run(
        self,
        batch: WindowBatch,
        config: Config,
        observer: Callable | None = None,
        memory: Memory | None = None,
        weight: float | None = None,
    ) -> StepResult:
        """Forward and backward of `batch`.

        Args:
            config: the step's own configuration, in which window length, chunks and window recomputation may differ.
            memory: carried in; None for an empty one.
            weight: of all losses of the window, where this rank has a part of it; None for those of `batch`.
        """
        executor = Executor(self.stage, self.topology, chunks=config.bptt.chunks_per_window, carry_gradient=True)
        if memory is None:
            memory = self.stage.empty_memory(config.train.lanes, self.topology.device)
        return executor.run(
            self.schedule(config),
            batch,
            memory,
            lanes_per_microbatch=self.lanes_per_microbatch,
            loss_scale=1 / (float(batch.loss_weight.sum()) if weight is None else weight),
            observer=observer,
        )
