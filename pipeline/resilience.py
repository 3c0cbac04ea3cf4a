"""What a run does when it is asked to stop, when it hangs, and when its loss jumps."""

from __future__ import annotations

import faulthandler
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch.distributed as dist

from pipeline.config import ResilienceConfig

LAUNCHER_STOP_FILE = "INFINI_STOP_FILE"
"""Environment variable with the path of a second stop file, which belongs to the launcher: a batch script makes it
beside sending a signal, for ranks that are still starting up and would miss that."""
LAUNCH_TIME = "INFINI_LAUNCH_TIME"
"""Environment variable with the Unix time at which the launcher started, restarts included in what it counts."""


class StopRequest:
    """Collects reasons to leave at the next step boundary. `reason` is this process's own; all ranks must agree.

    Signals count from `install` on. A second SIGINT leaves at once. `max_minutes` counts from the start of the
    launcher, or of this process where none says.
    """

    def __init__(self, config: ResilienceConfig, run_dir: Path) -> None:
        self.own_file = run_dir / config.stop_file
        launcher_file = os.environ.get(LAUNCHER_STOP_FILE)
        self.files = [self.own_file, *([Path(launcher_file)] if launcher_file else [])]
        start = float(os.environ.get(LAUNCH_TIME) or psutil.Process().create_time())
        self.deadline = None if config.max_minutes is None else start + 60 * config.max_minutes
        self.signals = {signal.SIGTERM, signal.SIGINT, getattr(signal, f"SIG{config.stop_signal}")}
        self._received: signal.Signals | None = None
        self._before: dict[int, object] = {}

    def install(self) -> None:
        """Take over the signals."""
        for number in self.signals:
            self._before[number] = signal.signal(number, self._on_signal)

    def uninstall(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            os.write(2, b"second interrupt: leaving without saving\n")
            os._exit(130)
        self._received = signal.Signals(number)

    @property
    def reason(self) -> str | None:
        """Why this process wants to stop; None when it does not."""
        if self._received is not None:
            return f"signal {self._received.name}"
        if self.deadline is not None and time.time() >= self.deadline:
            return "resilience.max_minutes is over"
        if dist.get_rank() == 0:
            return next((f"stop file {file}" for file in self.files if file.exists()), None)
        return None

    def clear_file(self) -> None:
        """Remove the run folder's stop file, so that the next start does not stop at once."""
        self.own_file.unlink(missing_ok=True)


class Watchdog:
    """Aborts a run that makes no progress, naming the ranks that are behind.

    A thread publishes how far this process is (a count of steps and phases) in the job's key-value store and watches
    it. When it has not moved for `timeout_s`, it writes every thread's stack, says which ranks are furthest behind,
    and ends the process; the launcher ends the others.
    """

    def __init__(self, timeout_s: float, run_dir: Path) -> None:
        self.timeout_s = timeout_s
        self.run_dir = run_dir
        self._progress: tuple[int, str] = (0, "start")
        self._count = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch; does nothing with a timeout of 0."""
        if self.timeout_s > 0:
            self._thread = threading.Thread(target=self._watch, name="hang-watchdog", daemon=True)
            self._thread.start()

    def progress(self, step: int, phase: str) -> None:
        """The process has come to this phase of this step."""
        self._progress = (step, phase)
        self._count += 1

    def stop(self) -> None:
        """End the watch."""
        self._done.set()

    def _watch(self) -> None:
        store = dist.distributed_c10d._get_default_store()
        rank, seen, since = dist.get_rank(), -1, time.monotonic()
        pause = min(5.0, self.timeout_s / 4)
        while not self._done.wait(pause):
            count, (step, phase) = self._count, self._progress
            if count != seen:
                seen, since = count, time.monotonic()
                self._publish(store, rank, count, step, phase)
            elif time.monotonic() - since > self.timeout_s and not self._done.is_set():
                self._abort(store, rank)

    def _publish(self, store: dist.Store, rank: int, count: int, step: int, phase: str) -> None:
        try:
            store.set(f"infini/progress/{rank}", f"{count} {step} {phase}")
        except RuntimeError:
            pass  # the store is gone: another rank has failed, and the run ends for that reason

    def _abort(self, store: dist.Store, rank: int) -> None:
        path = self.run_dir / f"hang-rank{rank}.txt"
        with open(path, "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        step, phase = self._progress
        sys.stderr.write(
            f"[rank {rank}] no progress for {self.timeout_s:g} s, in {phase} of step {step}; {self._late(store)}; "
            f"stacks of all threads in {path}\n"
        )
        faulthandler.dump_traceback(all_threads=True)
        os._exit(1)

    def _late(self, store: dist.Store) -> str:
        progress = {}
        for rank in range(dist.get_world_size()):
            try:
                if not store.check([f"infini/progress/{rank}"]):
                    return f"rank {rank} has never reported"
                count, step, phase = store.get(f"infini/progress/{rank}").decode().split(maxsplit=2)
            except RuntimeError as error:
                return f"where the other ranks are is not known ({error})"
            progress[rank] = (int(count), int(step), phase)
        least = min(count for count, _, _ in progress.values())
        if all(count == least for count, _, _ in progress.values()):
            return "all ranks are at the same point"
        late = [f"rank {r} in {phase} of step {step}" for r, (count, step, phase) in progress.items() if count == least]
        return "late: " + ", ".join(late)


class SpikeDetector:
    """Tells loss spikes from noise by a robust z-score: the distance from the median in units of 1.4826 x MAD."""

    def __init__(self, window: int, threshold: float) -> None:
        self.threshold = threshold
        self.least = max(10, window // 10)
        self.losses: deque[float] = deque(maxlen=window)

    def score(self, loss: float) -> float:
        """How far `loss` lies above the recent ones; 0 while there are too few of them."""
        if len(self.losses) < self.least:
            return 0.0
        median = statistics.median(self.losses)
        deviation = 1.4826 * statistics.median(abs(x - median) for x in self.losses)
        return (loss - median) / max(deviation, 1e-3 * abs(median), 1e-12)

    def add(self, loss: float) -> None:
        """Remember the loss of a step that was applied."""
        self.losses.append(loss)

    def restore(self, losses: Iterable[float]) -> None:
        """Compare with these losses, oldest first, from now on."""
        self.losses.clear()
        self.losses.extend(losses)
