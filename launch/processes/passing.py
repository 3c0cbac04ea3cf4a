"""A launcher's way with signals: it hands them to its ranks, and none is lost on the way."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import psutil

from pipeline.training.stopping import ECHO_S, ENDING, PASSED_ON

MEETING_S, RESTART_S = 3.0, 60.0
"""Ranks may be about to start when a signal comes: so long it waits for them. When they have been there, they may have
ended, and the launcher will too; else it starts them again."""


class SignalPasser:
    """Passes signals on to the child processes while it is entered, in a thread: the main one may be inside a call.

    Meanwhile they are blocked in the main thread, and so in every process that it starts: a rank gets what came before
    its handlers stood as soon as it says so (`pipeline.training.stopping.record`), instead of dying of it.

    TERM is passed on however often it comes (Slurm may send two within milliseconds, and another one when the grace
    time is over): who wants to kill has KILL. A second interrupt does kill the ranks.

    Args:
        logs: folder of the launcher's own, in which something lies when the ranks have been started. It is removed
            when the process ends because there are none to pass a signal on to.
    """

    def __init__(self, logs: Path) -> None:
        self.ending: int | None = None
        """The last signal that ends."""
        self._logs = logs
        self._arrived: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._interrupted_at: float | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)

    def __enter__(self) -> SignalPasser:
        # A library's thread that was there before still lets signals in: the handler is for those.
        self._before = {number: signal.signal(number, self._from_elsewhere) for number in PASSED_ON}
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()
        while signal.sigtimedwait(PASSED_ON, 0):
            pass  # meant for ranks that have ended
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _from_elsewhere(self, number: int, frame: FrameType | None) -> None:
        self._arrived.put(number)

    def _watch(self) -> None:
        while not self._done.is_set():
            found = signal.sigtimedwait(PASSED_ON, 0.1)
            if found is not None:
                self._arrived.put(found.si_signo)
            while not self._arrived.empty():
                self._pass_on(signal.Signals(self._arrived.get()))

    def _pass_on(self, number: signal.Signals) -> None:
        if not (children := self._children(number)):
            return
        if number in ENDING:
            self.ending = number
        kill = False
        if number == signal.SIGINT:
            now = time.monotonic()
            kill = self._interrupted_at is not None and now - self._interrupted_at > ECHO_S
            self._interrupted_at = self._interrupted_at or now
        for child in children:
            try:
                child.send_signal(signal.SIGKILL if kill else number)
            except psutil.NoSuchProcess:
                pass

    def _children(self, number: signal.Signals) -> list[psutil.Process]:
        """The ranks. Where there are none yet, the launcher waits for them, or leaves because of a signal that ends."""
        started = any(self._logs.iterdir())
        process, deadline = psutil.Process(), time.monotonic() + (RESTART_S if started else MEETING_S)
        while not (children := process.children()) and not self._done.wait(0.05):
            if number in ENDING and time.monotonic() > deadline:
                print(f"infini: {number.name}, and no ranks are there: left", file=sys.stderr, flush=True)
                shutil.rmtree(self._logs, ignore_errors=True)
                os._exit(128 + number)
        return children
