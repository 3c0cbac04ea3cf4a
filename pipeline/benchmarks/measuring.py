"""How benchmarks measure: memory and time of a function, in this process or in one of its own."""

from __future__ import annotations

import datetime
import multiprocessing
import pickle
import resource
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import psutil
import torch

from pipeline.accounting.live_bytes import LiveBytes


def tracked_peak(function: Callable[[], Any]) -> int:
    """Peak bytes of the tensors that `function` makes, gradients that exist already not counted."""
    with LiveBytes() as live:
        function()
    return live.peak


def timed(function: Callable[[], Any], repeats: int = 3) -> dict[str, float]:
    """Run `function` a few times.

    Returns:
        `wall_s` and `cpu_s` (of this process) of the quickest run each, and `rss_bytes`, by how much the resident set
        grew at most; the process must never have been larger than it is at the start.
    """
    grown = peak_growth()
    runs = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        runs.append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        "wall_s": min(wall for wall, _ in runs),
        "cpu_s": min(cpu for _, cpu in runs),
        "rss_bytes": grown(),
    }


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_growth() -> Callable[[], int]:
    """A function that says by how many bytes the resident set has grown at most since this call.

    The process must never have been larger than it is now.
    """
    before = psutil.Process().memory_info().rss
    return lambda: max(peak_rss_bytes() - before, 0)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a forked process, whose memory peaks are its own.

    The caller must not have joined a process group.

    Raises:
        RuntimeError: it failed, with its traceback.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        succeeded, result = pickle.loads(ours.recv_bytes())
    except EOFError:
        process.join()
        raise RuntimeError(f"the measuring process died with exit code {process.exitcode}") from None
    process.join()
    if not succeeded:
        raise RuntimeError(f"a measurement failed:\n{result}")
    return result


def _call(pipe, function: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    try:
        answer = (True, function(*arguments))
    except Exception:
        answer = (False, traceback.format_exc())
    # Plain pickle: the one that pipes use shares tensors' memory, which ends with this process.
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()


class Progress:
    """A line on standard error per piece of work: how much is done, how fast, and when all of it will be.

    Args:
        total: pieces of work in all; 0 where nobody knows.
        amount: what a piece counts, for the rate; 0 shows none.
        unit: of `amount`.
        interval_s: between two lines at least; the last piece always has one.
    """

    def __init__(self, total: int, amount: float = 0.0, unit: str = "", interval_s: float = 0.0) -> None:
        self.total, self.amount, self.unit, self.interval_s = total, amount, unit, interval_s
        self.done, self.start = 0, time.monotonic()
        self.told = self.start

    def __call__(self, name: object, seconds: float) -> None:
        """A piece is done, and took so long."""
        self.done += 1
        now = time.monotonic()
        if now - self.told < self.interval_s and self.done != self.total:
            return
        self.told = now
        count = f"{self.done}/{self.total}" if self.total else str(self.done)
        rate = f", {self.amount / seconds:,.0f} {self.unit}/s" if self.amount else ""
        left_s = (now - self.start) / self.done * (self.total - self.done)
        left = f", {datetime.timedelta(seconds=round(left_s))} left" if self.done < self.total else ""
        print(f"  {count} {name}: {seconds:.2f} s{rate}{left}", file=sys.stderr, flush=True)
