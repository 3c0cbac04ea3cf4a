"""What a run does when it is asked to stop, when it hangs, and when its loss jumps."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import psutil
import torch.distributed as dist

from data.files import write_whole
from pipeline.config.schema import ResilienceConfig
from pipeline.parallel.naming import ranks_on_hosts
from pipeline.parallel.silence import give_up_on_silence
from pipeline.training import stopping

Result = TypeVar("Result")

HANG = "infini/hang"
"""Key of the job's store that says that a rank has noticed a hang."""
BEATS = 3
"""Whose progress is not published again for so many times is silent."""
LAUNCH_TIME = "INFINI_LAUNCH_TIME"
"""Environment variable with the Unix time at which the launcher started, restarts included in what it counts."""


def tell_job(name: str, text: str) -> None:
    """Leave a word for the batch job, where there is one; on the main process."""
    folder = os.environ.get(stopping.JOB_FOLDER)
    if folder and dist.get_rank() == 0:
        with contextlib.suppress(OSError):  # it decides without
            write_whole(Path(folder) / name, text + "\n")


class StopRequest:
    """Collects reasons to leave at the next step boundary. `reason` is this process's own; all ranks must agree.

    Signals count from the process's first line on (`pipeline.training.stopping`). A second SIGINT leaves at once.
    `max_minutes` counts from the start of the launcher, or of this process where none says.
    """

    def __init__(self, config: ResilienceConfig, run_dir: Path) -> None:
        self.own_file = run_dir / config.stop_file
        launcher_file = os.environ.get(stopping.STOP_FILE)
        self.files = [self.own_file, *([Path(launcher_file)] if launcher_file else [])]
        try:
            start = float(os.environ.get(LAUNCH_TIME) or psutil.Process().create_time())
        except ValueError:
            raise ValueError(
                f"{LAUNCH_TIME}={os.environ[LAUNCH_TIME]!r} in the environment is no time: unset it"
            ) from None
        self.deadline = None if config.max_minutes is None else start + 60 * config.max_minutes
        self.signals = {signal.SIGTERM, signal.SIGINT, getattr(signal, f"SIG{config.stop_signal}")}
        self._received: signal.Signals | None = None
        self._received_at = 0.0
        self._before: dict[int, object] = {}

    def install(self) -> None:
        """Take over the signals, those that have come already too."""
        for number in self.signals:
            self._before[number] = signal.signal(number, self._on_signal)
        self._received = self._received or next((n for n in stopping.recorded() if n in self.signals), None)
        stopping.release(self.signals)

    def uninstall(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_signal(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._received == signal.SIGINT:
            if now - self._received_at < stopping.ECHO_S:
                return
            os.write(2, b"second interrupt: leaving without saving\n")
            os._exit(130)
        self._received, self._received_at = signal.Signals(number), now

    @property
    def asked(self) -> str | None:
        """Who has asked this process to stop; None when nobody has."""
        if self._received is not None:
            return f"signal {self._received.name}"
        if dist.get_rank() == 0:
            return next((f"stop file {file}" for file in self.files if file.exists()), None)
        return None

    @property
    def reason(self) -> str | None:
        """Why this process wants to stop; None when it does not."""
        if self.deadline is not None and time.time() >= self.deadline:
            return self.asked or "resilience.max_minutes is over"
        return self.asked

    def clear_file(self) -> None:
        """Remove the run folder's stop file, so that the next start does not stop at once."""
        self.own_file.unlink(missing_ok=True)


class HangError(RuntimeError):
    """The run makes no progress."""


class Watchdog:
    """Ends a run that makes no progress, naming the ranks that are behind.

    A thread publishes how far this process is (a count of the phases it has begun, and its operation in the last one)
    in the job's key-value store, again and again, and watches it. When it has not moved for too long, every rank writes
    the stacks of its threads, and the first to notice fails for all of them, saying which ranks are furthest behind,
    and which give no sign of life: their node is gone, or the network to it.

    Args:
        timeout_s: what is too long; 0 is off.
        patient_timeout_s: the same until the first step is done, and while a checkpoint is read or written.
        run_dir: folder for the stacks.
    """

    def __init__(self, timeout_s: float, patient_timeout_s: float, run_dir: Path) -> None:
        self.timeout_s = timeout_s
        self.patient_timeout_s = max(timeout_s, patient_timeout_s)
        self.run_dir = run_dir
        self.warm = False
        """The first step is done: caches are filled, and a step takes what it takes."""
        self._progress = _Progress(0, 0, "start", True, host=socket.gethostname())
        self._moves = self._beat = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch; does nothing with a timeout of 0."""
        if self.timeout_s > 0:
            self._thread = threading.Thread(target=self._watch, name="hang-watchdog", daemon=True)
            self._thread.start()

    def progress(self, step: int, phase: str, *, patient: bool = False) -> None:
        """The process has come to this phase of this step, which may take long when `patient`."""
        self._progress = _Progress(self._progress.count + 1, step, phase, patient, host=self._progress.host)
        self._moves += 1

    def operation(self, name: str) -> None:
        """The process has come to this part of the phase. Ranks need not have the same ones."""
        self._progress = self._progress._replace(operation=name)
        self._moves += 1

    def stop(self) -> None:
        """End the watch."""
        self._done.set()

    @property
    def limit_s(self) -> float:
        """How long nothing may move now."""
        return self.timeout_s if self.warm and not self._progress.patient else self.patient_timeout_s

    def _watch(self) -> None:
        # A copy: the process's own store is locked while the main thread waits in it.
        store = dist.distributed_c10d._get_default_store().clone()
        give_up_on_silence(int(os.environ.get("MASTER_PORT", "0")))
        rank, seen, since = dist.get_rank(), -1, time.monotonic()
        pause = min(5.0, self.timeout_s / 4)
        self._publish(store)
        while not self._done.wait(pause):
            moves = self._moves
            if moves != seen:
                seen, since = moves, time.monotonic()
            self._publish(store)
            if _ask(lambda: store.check([HANG]), False):
                self._write_stacks(rank)
                return
            waited = time.monotonic() - since
            if waited > self.limit_s and not self._done.is_set():
                self._fail(store, rank, waited, pause)

    def _publish(self, store: dist.Store) -> None:
        self._beat += 1
        own = json.dumps(self._progress._replace(beat=self._beat))
        # Without a store another rank has failed, and the run ends for that reason.
        _ask(lambda: store.set(f"infini/progress/{dist.get_rank()}", own), None)

    def _fail(self, store: dist.Store, rank: int, waited_s: float, pause: float) -> None:
        own, moves, late = self._progress, self._moves, self._late(store, pause)
        if self._moves != moves or self._done.is_set():
            return  # it went on meanwhile
        _ask(lambda: store.set(HANG, str(rank)), None)
        where = self._write_stacks(rank)
        self._done.wait(2 * pause)  # the others write theirs
        error = HangError(f"no progress for {waited_s:.0f} s, in {own}; {late}; {where}")
        # What a thread's failure does is the process's affair (`launch.processes.worker` tells it once for all ranks).
        threading.excepthook(threading.ExceptHookArgs((HangError, error, None, threading.current_thread())))
        os._exit(1)

    def _write_stacks(self, rank: int) -> str:
        """Write the stacks of all threads; says where."""
        path = self.run_dir / f"hang-rank{rank}.txt"
        try:
            with open(path, "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            faulthandler.dump_traceback(all_threads=True)
            return f"stacks of all threads above ({error})"
        return f"stacks of all threads in {path.with_name('hang-rank*.txt')}"

    def _late(self, store: dist.Store, pause: float) -> str:
        try:
            before = self._published(store)
            for _ in range(BEATS):
                self._done.wait(pause)
                self._publish(store)  # others may be listening for this one
            now = self._published(store)
        except LookupError as error:
            return f"where the other ranks are is not known ({error})"
        except RuntimeError as error:
            return (
                f"the place where the ranks meet, on {os.environ.get('MASTER_ADDR')}, does not answer: is that node "
                f"gone, or the network to it? ({str(error).splitlines()[0]})"
            )
        if silent := {rank: now[rank].host for rank in before if before[rank].beat == now[rank].beat}:
            return f"no sign of life from {ranks_on_hosts(silent)}: is the node gone, or the network to it?"
        return late_ranks(list(now.values()))

    def _published(self, store: dist.Store) -> dict[int, _Progress]:
        found = {}
        for rank in range(dist.get_world_size()):
            if not store.check([f"infini/progress/{rank}"]):
                raise LookupError(f"rank {rank} has never reported")
            found[rank] = _Progress(*json.loads(store.get(f"infini/progress/{rank}")))
        return found


class _Progress(NamedTuple):
    """Where a rank is."""

    count: int
    """Of the phases that it has begun: the ranks all have the same ones."""
    step: int
    phase: str
    patient: bool
    operation: str = ""
    host: str = ""
    beat: int = 0
    """Rises with every sign of life."""

    def __str__(self) -> str:
        return f"{self.phase} of step {self.step}" + (f" ({self.operation})" if self.operation else "")


def late_ranks(progress: list[_Progress]) -> str:
    """Which ranks are furthest behind, and where. Where all are in one phase, its operations tell them apart."""
    least = min(found.count for found in progress)
    places: dict[str, dict[int, str]] = {}
    for rank, found in enumerate(progress):
        if found.count == least:
            places.setdefault(str(found), {})[rank] = found.host
    late = sum(map(len, places.values())) < len(progress)
    told = [f"{ranks_on_hosts(hosts)} in {place}" for place, hosts in places.items()]
    return ("late: " if late else "all ranks are in the same phase: ") + "; ".join(told)


def _ask(action: Callable[[], Result], otherwise: Result) -> Result:
    """What a call to the store gives, or `otherwise` when the store is gone."""
    try:
        return action()
    except RuntimeError:
        return otherwise


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

    def state_dict(self) -> dict[str, list[float]]:
        """The losses that are compared with, oldest first."""
        return {"recent_losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Compare with these losses from now on."""
        self.losses.clear()
        self.losses.extend(state["recent_losses"])
