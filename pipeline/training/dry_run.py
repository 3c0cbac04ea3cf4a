"""A run's largest step, made on the run's own processes before hours are spent: does it fit, and is the plan right?

Twice the step with all lanes full, since Adam's moments come with the first; statistics of the memory in it; then an
evaluation, where the run makes some, and a save. Nothing of the run begins: no window is read, the run folder is not
touched, and the checkpoint goes to a hidden folder beside it, on the same disk, which is removed.
"""

from __future__ import annotations

import contextlib
import resource
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist

from model.device import device_memory_bytes, device_memory_peaks, host_knows
from pipeline.accounting.footprint import per_rank_bytes
from pipeline.checkpoint.writer import take_snapshot
from pipeline.config.derived import tokens_per_step
from pipeline.config.schema import Config
from pipeline.parallel.links import link_notes
from pipeline.parallel.memory_statistics import gather_statistics
from pipeline.parallel.setup import vocabulary, written_for
from pipeline.parallel.topology import Topology, on_main, shutdown
from pipeline.reporting.console import format_bytes, format_duration, print_table, progress
from pipeline.training.batches import full_batch
from pipeline.training.run import enter
from pipeline.training.trainer import Trainer

STEPS = 2
TOLERANCE = 0.1
"""By how much a rank may differ from the plan unmentioned."""
SHOWN_RANKS = 16
"""Of more ranks, the fullest of every stage are shown."""


class OutOfMemoryError(ValueError):
    """A rank has not enough memory for the run."""


class RankPeak(NamedTuple):
    """What one rank needed, in bytes: of tensors on its device; on a CPU, by how much the process grew."""

    rank: int
    host: str
    stage: int
    planned: int
    steps: int
    """At the peak of the steps."""
    evaluation: int
    """At the peak with an evaluation, where the run makes some; else that of the steps."""
    save: int
    """At the peak of everything, the save included."""
    taken: int
    """What the allocator took of the device in all; on a CPU the whole process."""
    available: int | None
    """What the device has; None on a CPU."""

    @property
    def ratio(self) -> float:
        """Of what was needed to what was planned."""
        return self.steps / self.planned


class DryRun(NamedTuple):
    """What a dry run found, the same on all processes."""

    peaks: list[RankPeak]
    step_s: float
    """Of the last step, on the slowest rank."""
    evaluation_s: float
    """0 where the run makes none."""
    save_s: float


def dry_run(config: Config) -> int:
    """As one of the processes of a run: measure, and print the result on the main process; returns the exit code 0.

    Raises:
        OutOfMemoryError: on this rank.
        OSError: the checkpoint cannot be written.
    """
    topology = enter(config)
    for note in link_notes(topology):
        print(note)
    found = measure(config, topology)
    if topology.is_main:
        report(config, found)
    shutdown()
    return 0


def measure(config: Config, topology: Topology) -> DryRun:
    """Make the steps and the save; collective. Raises as `dry_run`."""
    masked = not host_knows(topology.device)
    stages = per_rank_bytes(config, dist.get_world_size(), vocabulary(config), masked=masked)
    planned = stages[topology.pipeline_rank].total
    meter = _Meter(topology.device, planned)
    place = on_main(lambda: _beside(Path(config.run_dir)))
    with meter.explaining("building the model and its optimizer"):
        saving = replace(config.checkpoint, store=None)
        trainer = Trainer(replace(config, run_dir=str(place), checkpoint=saving), topology)
        trainer.optimizer.initialize(config.train.seed)
    try:
        step_s = _take_steps(trainer, meter)
        steps = meter.peak()
        evaluation_s = _evaluate(trainer, meter)
        evaluation = steps if trainer.evaluation is None else meter.peak()
        save_s = _save(trainer, meter)
    finally:
        if topology.is_main:  # no collective: an exception may be on its way
            shutil.rmtree(place, ignore_errors=True)
    trainer.close()
    own = RankPeak(
        rank=dist.get_rank(),
        host=socket.gethostname(),
        stage=topology.pipeline_rank,
        planned=planned,
        steps=steps,
        evaluation=evaluation,
        save=meter.peak(),
        taken=meter.taken,
        available=meter.available,
    )
    everyone: list[tuple[RankPeak, float, float, float]] = [(own, step_s, evaluation_s, save_s)] * dist.get_world_size()
    dist.all_gather_object(everyone, everyone[0])
    peaks, *seconds = zip(*everyone, strict=True)
    return DryRun(list(peaks), *map(max, seconds))


def _beside(run_dir: Path) -> Path:
    """A folder that is not there yet, hidden, on the run folder's disk."""
    there = next(parent for parent in run_dir.absolute().parents if parent.is_dir())
    return there / f".{run_dir.name}.dry-run-{secrets.token_hex(4)}"


def _take_steps(trainer: Trainer, meter: _Meter) -> float:
    """The steps; seconds of the last one."""
    config, topology = trainer.config, trainer.topology
    batch = full_batch(config, trainer.lane_range[1] - trainer.lane_range[0], topology.device)
    remembers = config.model.memory.rule != "none"
    for step in range(1, STEPS + 1):
        start = time.perf_counter()
        with meter.explaining(f"forward and backward passes of step {step}"):
            result = trainer.forward_backward(batch, statistics=remembers)
        with meter.explaining(f"the update of step {step}"):
            sums, outcome, _ = trainer.update(batch, result)  # the host reads the device here
            if remembers:
                gather_statistics(result.statistics, topology, config.model)
        if not outcome.applied:
            raise RuntimeError(
                f"the dry run's step {step} was discarded: loss {sums['loss'] / sums['weight']:.4g}, gradient norm "
                f"{outcome.gradient_norm:.4g}"
            )
        trainer.memory.value = result.memory
    return time.perf_counter() - start


def _evaluate(trainer: Trainer, meter: _Meter) -> float:
    """An evaluation as the run makes them; seconds of it."""
    if trainer.evaluation is None:
        return 0.0
    start = time.perf_counter()
    with meter.explaining("an evaluation (evaluate.interval)"):
        trainer.evaluation.rehearse(trainer.optimizer, lambda total: _shown_evaluation(total, trainer.topology))
    return time.perf_counter() - start


def _shown_evaluation(total: int, topology: Topology) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    if topology.is_main:
        return progress(total, "evaluating, tokens")
    return contextlib.nullcontext(lambda tokens: None)


def _save(trainer: Trainer, meter: _Meter) -> float:
    """A checkpoint of what the steps have made; seconds of it."""
    start = time.perf_counter()
    summary = written_for(trainer.config, trainer.topology, trainer.vocab_size, trainer.loader.tokenizer[0])
    with meter.explaining("the copy of a checkpoint"):
        trainer.saver.save(lambda: take_snapshot(trainer.parts, summary, owns_lanes=trainer.topology.owns_lanes))
        trainer.saver.wait()
    error = trainer.saver.finished().error
    if error is not None:
        raise OSError(error)
    return time.perf_counter() - start


class _Meter:
    """This process's memory from here on.

    A device counts what its tensors take. A CPU has no such count: the resident set, less what it is now.
    """

    def __init__(self, device: torch.device, planned: int) -> None:
        self.device, self.planned = device, planned
        self.available = device_memory_bytes(device)
        self.taken = self._most = 0
        self._before = psutil.Process().memory_info().rss
        device_memory_peaks(device)  # what came before does not count

    def peak(self) -> int:
        """Bytes at the most so far."""
        if self.device.type == "cpu":
            self.taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return max(self.taken - self._before, 0)
        peaks = device_memory_peaks(self.device)
        self.taken = max(self.taken, peaks["reserved"])
        self._most = max(self._most, peaks["allocated"])
        return self._most

    @contextlib.contextmanager
    def explaining(self, doing: str) -> Iterator[None]:
        """Raises:
        OutOfMemoryError: the memory did not suffice for what is done inside.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            # The CPU's allocator and the libraries of a device have no class of their own for it.
            told = str(error).splitlines()[0] if str(error) else type(error).__name__
            words = ("out of memory", "can't allocate memory", "MemoryError")
            if not any(word.lower() in told.lower() for word in words):
                raise
            of = f" of the device's {format_bytes(self.available)}" if self.available else ""
            raise OutOfMemoryError(
                f"out of memory in {doing}, of {format_bytes(self.planned)} planned for this rank{of} ({told}); "
                "`infini plan CONFIG --search` lists layouts that fit; bptt.recompute and bptt.chunks_per_window save "
                "activations"
            ) from error


def report(config: Config, found: DryRun) -> None:
    """Print what a dry run found."""
    on_device = found.peaks[0].available is not None
    interval = config.evaluate.interval
    besides = "" if interval is None else ", an evaluation"
    shown = _shown(found.peaks)
    rows = [
        [
            f"{peak.rank:,} ({peak.host})",
            str(peak.stage),
            format_bytes(peak.planned),
            format_bytes(peak.steps),
            f"{100 * (peak.ratio - 1):+.1f} %",
            *([] if interval is None else [format_bytes(peak.evaluation)]),
            format_bytes(peak.save),
            format_bytes(peak.taken) + (f" of {format_bytes(peak.available)}" if on_device else ""),
        ]
        for peak in shown
    ]
    which = "" if len(shown) == len(found.peaks) else f", the fullest of every stage of {len(found.peaks):,} ranks"
    print_table(
        f"{config.name}: {STEPS} of the largest steps{besides}, and a save{which}",
        rows,
        header=(
            *("rank", "stage", "planned", "steps", "difference"),
            *([] if interval is None else ["with evaluation"]),
            *("with save", "taken" if on_device else "process"),
        ),
    )
    tokens = tokens_per_step(config)
    print(
        f"step {STEPS} took {format_duration(found.step_s)}: {tokens / found.step_s:,.0f} tokens/s; "
        f"the save took {format_duration(found.save_s)}"
    )
    if interval is not None:
        print(
            f"the evaluation took {format_duration(found.evaluation_s)}; one every {interval:,} steps takes "
            f"{100 * found.evaluation_s / (interval * found.step_s):.3g} % of the steps' time besides"
        )
    off = [peak for peak in found.peaks if abs(peak.ratio - 1) > TOLERANCE]
    if off:
        worst = max(off, key=lambda peak: max(peak.ratio, 1 / max(peak.ratio, 1e-9)))
        print(
            f"THE PLAN IS OFF by more than {100 * TOLERANCE:g} % on {len(off):,} of {len(found.peaks):,} ranks: rank "
            f"{worst.rank} (stage {worst.stage}) needed {worst.ratio:.2f} times what was planned"
        )
    else:
        print(f"every rank is within {100 * TOLERANCE:g} % of the plan")
    if not on_device:
        print("a CPU has no count of its tensors: by how much the process grew holds libraries and heap as well")
    print("the run fits; nothing of it was begun")


def _shown(peaks: Sequence[RankPeak]) -> list[RankPeak]:
    if len(peaks) <= SHOWN_RANKS:
        return list(peaks)
    fullest: dict[int, RankPeak] = {}
    for peak in sorted(peaks, key=lambda peak: peak.steps):
        fullest[peak.stage] = peak
    return [fullest[stage] for stage in sorted(fullest)]
