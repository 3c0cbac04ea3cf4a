"""A few steps of a run in `torch.profiler`: what each rank did when, as a trace for Perfetto and TensorBoard.

The profiler looks on: the steps compute what they would compute without it. They take longer, so `ThroughputMeter`
leaves them out, on all ranks alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline.config.schema import ProfileConfig
from pipeline.schedule.operations import Operation

FOLDER = "profile"
"""In the run folder. TensorBoard's profiler plugin looks for `*.pt.trace.json.gz` below its logdir."""


class ProfileWindow:
    """The steps of a run that are profiled, and this rank's part in it.

    Args:
        config: `start` of null profiles nothing.
        run_dir: folder of the run.
        rank: this process.
        done: steps before this start of the run.
    """

    def __init__(self, config: ProfileConfig, run_dir: Path, rank: int, done: int) -> None:
        self.steps = range(0)
        """In the trace."""
        self.note: str | None = None
        """What is to be said about it before training."""
        self.written = False
        """The window is over; steps that are taken again after a roll-back are not traced."""
        self._warm_up = -1
        if config.start is not None:
            self.steps = range(max(config.start, done + 1), config.start + config.steps)
            self._warm_up = self.steps.start - 1 if self.steps.start > done + 1 else -1
            if not self.steps:
                self.note = f"metrics.profile: step {config.start + config.steps - 1} is behind, nothing is traced"
            elif self.steps.start > config.start:
                self.note = f"metrics.profile: step {config.start} is behind, the trace begins with {self.steps.start}"
        self._takes_part = rank in config.ranks
        self._profiler: torch.profiler.profile | None = None
        self._operation: torch.profiler.record_function | None = None
        self._records = False
        names = f"steps{self.steps.start:06d}-{self.steps.stop - 1:06d}.rank{rank:05d}"
        self.path = run_dir / FOLDER / f"{names}.pt.trace.json.gz"

    def __contains__(self, step: int) -> bool:
        """Whether the step is in the trace, or warms the profiler up."""
        return not self.written and (step in self.steps or step == self._warm_up)

    @property
    def told(self) -> str:
        """Where the traces are, in words."""
        return (
            f"profiled steps {self.steps.start} to {self.steps.stop - 1}: {self.path.parent} "
            "(open it in Perfetto, ui.perfetto.dev, or with TensorBoard's profiler plugin)"
        )

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around each step."""
        if not (self._takes_part and step in self):
            yield
            return
        if self._profiler is None:
            self._start(warm_up=step == self._warm_up)
        self._records = step in self.steps
        with self.span(f"step {step}"):
            yield
        self._records = False
        self._profiler.step()

    def span(self, name: str) -> contextlib.AbstractContextManager:
        """A named span of the trace; nothing outside of it."""
        return torch.profiler.record_function(name) if self._records else contextlib.nullcontext()

    def operation(self, operation: Operation | None) -> None:
        """The schedule comes to an operation, or (None) to its end."""
        if self._operation is not None:
            self._operation.__exit__(None, None, None)
            self._operation = None
        if self._records and operation is not None:
            name = f"{operation.kind.value}, microbatch {operation.microbatch}, chunk {operation.chunk}"
            self._operation = torch.profiler.record_function(name)
            self._operation.__enter__()

    def close(self) -> None:
        """Write what there is: a run may stop inside the window."""
        profiler, self._profiler = self._profiler, None
        self.written = True
        if profiler is None:
            return
        profiler.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.path))

    def _start(self, *, warm_up: bool) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        schedule = torch.profiler.schedule(wait=0, warmup=int(warm_up), active=len(self.steps) + 1, repeat=1)
        self._profiler = torch.profiler.profile(activities=activities, schedule=schedule)
        self._profiler.start()
