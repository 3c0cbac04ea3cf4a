"""A traced step with its progress shown: `infini trace` and `infini plan --trace`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config.schema import Config
    from pipeline.tracing.step import StepTrace


def traced(
    config: Config, world_size: int, rank: int, vocab: int, microbatches: int | None = None, *, statistics: bool = False
) -> StepTrace:
    """Trace a step, and show how far it is.

    Raises:
        ValueError: the step has no more microbatches; tensors of two devices meet; a shape depends on values.
    """
    from pipeline.reporting.console import progress
    from pipeline.tracing.step import enough_microbatches, microbatches_per_step, trace_step

    most = microbatches_per_step(config, world_size)
    if microbatches is not None and microbatches > most:
        raise ValueError(f"--microbatches {microbatches} is more than the {most} that a step has")
    run = microbatches or enough_microbatches(config, world_size)
    with progress(run * config.bptt.chunks_per_window, "chunks") as advance:
        return trace_step(
            config, world_size, rank, vocab, microbatches=run, statistics=statistics, progress=lambda: advance(1)
        )
