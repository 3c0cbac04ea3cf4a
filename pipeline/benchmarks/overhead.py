"""What a run's housekeeping costs a step: waiting for data, metrics, asynchronous saves. A real run, taken apart.

The trainer itself trains on a prepared set. Its calls of the loader and the monitor are put on a clock from outside,
with the device waited for first, so that nobody's bill holds the computation before it. Statistics of the memory are
computed inside the forward pass: their price is what a step that has them takes longer than its neighbours. A save's is
the wait for its snapshot and what the steps take longer while it is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from data.preparation.options import PrepareOptions
from data.preparation.prepare import prepare
from pipeline.benchmarks.alternating import wait_for
from pipeline.benchmarks.contestants import Sizes, own_config
from pipeline.benchmarks.data_rates import write_text
from pipeline.parallel.topology import initialize
from pipeline.training.trainer import Trainer


@dataclass
class Overhead:
    """A run's steps, in seconds."""

    tokens: int
    """Of a step."""
    metrics_interval: int
    memory_interval: int
    """Of the configuration: steps between two intervals' metrics, and between two measurements of the memory."""
    checkpoint_bytes: int = 0
    step_s: list[float] = field(default_factory=list)
    """Steps with nothing beside them, a whole number of metrics intervals."""
    data_s: list[float] = field(default_factory=list)
    """Of each of these, the wait for its window."""
    metrics_s: list[float] = field(default_factory=list)
    """Of each, what the monitor took."""
    statistics_s: list[float] = field(default_factory=list)
    """What steps with statistics took longer than the ones before and behind."""
    save_s: list[float] = field(default_factory=list)
    """What each asynchronous save cost: the stall, and what the steps until it was written took longer."""
    stall_s: list[float] = field(default_factory=list)
    """Of that, the wait for the snapshot."""
    write_s: list[float] = field(default_factory=list)

    @property
    def data_share(self) -> float:
        return sum(self.data_s) / sum(self.step_s)

    @property
    def metrics_share(self) -> float:
        """With the statistics at the interval of the configuration."""
        statistics = max(0.0, median(self.statistics_s)) / self.memory_interval
        return sum(self.metrics_s) / sum(self.step_s) + statistics / median(self.step_s)

    @property
    def save_share(self) -> float:
        """Of a minute, when one save is made in each."""
        return max(0.0, median(self.save_s)) / 60


class _Watched:
    """A trainer whose loader and monitor are on a clock."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.device = trainer.topology.device
        self.data_s = self.metrics_s = 0.0
        self.statistics = False
        trainer.loader.next_batch = self._clocked(trainer.loader.next_batch, "data_s")
        trainer.monitor.after_step = self._clocked(trainer.monitor.after_step, "metrics_s")
        trainer.monitor.wants_statistics = lambda step: self.statistics

    def _clocked(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            wait_for(self.device)
            start = time.perf_counter()
            result = function(*arguments)
            setattr(self, name, getattr(self, name) + time.perf_counter() - start)
            return result

        return call

    def step(self, *, statistics: bool = False) -> float:
        """One step; its seconds."""
        self.statistics = statistics
        wait_for(self.device)
        start = time.perf_counter()
        self.trainer.train_step()
        wait_for(self.device)
        return time.perf_counter() - start


def measure(
    folder: str,
    sizes: Sizes,
    settings: list[str],
    *,
    intervals: int,
    repeats: int,
    megabytes: int,
    report: Callable[[str, float], None],
) -> Overhead:
    """Train on Python source and take the steps apart; for a process of its own.

    Args:
        folder: for the set and the run, on the disk that checkpoints go to.
        sizes: of the model; a step is one window of `sizes.lanes` lanes.
        settings: `key=value`, which win.
        intervals: of the metrics, measured with nothing beside them.
        repeats: saves, and steps with statistics.
        report: called with what was done and its seconds.
    """
    text = write_text(Path(folder) / "text.jsonl", megabytes * 10**6)
    prepare([str(text.path)], Path(folder) / "set", PrepareOptions())
    run = [f"run_dir={folder}/run", f"data.sets=[{{path: {folder}/set}}]", "checkpoint.interval=0"]
    run += ["model.vocab_size=null", "train.steps=1000000", "optimizer.warmup_steps=10"]
    config = own_config(sizes, "delta", "fp32", [*run, *settings])
    trainer = Trainer(config, initialize(tensor=1, pipeline=1, timeout_s=600))
    trainer.start(None)
    watched = _Watched(trainer)
    metrics = config.metrics
    found = Overhead(sizes.tokens * sizes.lanes, metrics.interval, metrics.memory_interval)
    for _ in range(2):
        report("warm-up", watched.step())
    for _ in range(intervals * metrics.interval):
        watched.data_s = watched.metrics_s = 0.0
        found.step_s.append(watched.step())
        found.data_s.append(watched.data_s)
        found.metrics_s.append(watched.metrics_s)
        report("step", found.step_s[-1])
    for _ in range(repeats):
        before, with_them, behind = (watched.step(statistics=wanted) for wanted in (False, True, False))
        found.statistics_s.append(with_them - (before + behind) / 2)
        report("step with statistics", with_them)
    for _ in range(repeats):
        _save(watched, found, report)
    trainer.close()
    return found


def _save(watched: _Watched, found: Overhead, report: Callable[[str, float], None]) -> None:
    """One asynchronous save: steps go on until it is written; as many before it say what they take without one."""
    trainer = watched.trainer
    alone = [watched.step() for _ in range(3)]
    start = time.perf_counter()
    trainer.save()
    stall, during = time.perf_counter() - start, []
    while not (trainer.saver.has_succeeded or trainer.saver.has_failed):
        during.append(watched.step())
    written = trainer.saver.finished()
    if written is None or written.error:
        raise OSError(f"the save failed: {written and written.error}")
    found.checkpoint_bytes = written.bytes
    found.stall_s.append(stall)
    found.write_s.append(written.write_s)
    found.save_s.append(stall + sum(during) - len(during) * median(alone))
    report(f"save, {len(during)} steps meanwhile", written.write_s)
