"""One run at a time in a run folder, and in a store: a lock that says whose it is, and that the dead do not keep.

The lock is a file, `.lock`, which its owner writes again every few seconds. On the owner's own machine a new run sees
at once whether the owner still lives. From another one it watches whether the file changes: no clocks are compared, so
they need not agree. Only the main process has to do with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path

import msgspec
import psutil

from data.files import FileError, decode_json
from pipeline.config.load import ConfigError
from pipeline.training.elastic import this_attempt
from pipeline.training.lock_file import LockFile

NAME = ".lock"
BEAT_S = 10.0
"""Between two signs of life."""
WATCH_S = 45.0
"""A lock that does not change for so long has no owner: some beats, and what a shared disk's cache keeps back."""
_LEAVING_S = 5.0
"""So long a run that ends waits for a disk or store that is at a sign of life."""


class Holder(msgspec.Struct, frozen=True):
    """Whose the lock is."""

    token: str
    """Another one for every owner."""
    host: str
    machine: str
    """Where its process number counts: a boot of a machine, and the numbers' namespace there."""
    pid: int
    started: float
    """Unix time."""
    job: str | None = None
    """Slurm's number."""
    launch: str | None = None
    """Of a launch that may start its ranks again on other nodes: the earlier ones have ended by then."""
    beat: int = 0

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {since}"

    def lives_here(self) -> bool | None:
        """Whether the process is there; None when it is not this machine's to say."""
        if self.machine != _machine():
            return None
        try:
            process = psutil.Process(self.pid)
            # The number may be somebody else's by now.
            same = abs(process.create_time() - self.started) < 2
            return same and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.Error:
            return False


class LockLostError(RuntimeError):
    """Another run has taken the run folder, or the store."""


class RunLock:
    """The lock of a run folder, or of a store.

    Args:
        file: the lock.
        setting: the configuration's word for its folder.
        own: who takes it.
        beat_s, watch_s: as `BEAT_S` and `WATCH_S`.
    """

    def __init__(
        self,
        file: LockFile,
        setting: str,
        own: Holder | None = None,
        *,
        beat_s: float = BEAT_S,
        watch_s: float = WATCH_S,
    ) -> None:
        self.file, self.setting, self.own = file, setting, own or this_process()
        self.beat_s, self.watch_s = beat_s, watch_s
        self.gone: str | None = None
        """Token of the dead owner whose place was taken."""
        self._beats = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def folder(self) -> str:
        return str(self.file.path.parent)

    def acquire(self, gone: str | None = None) -> None:
        """Take the lock and keep it alive; says what it waits for, and whose it was.

        Args:
            gone: token of an owner that is known to be dead.

        Raises:
            ConfigError: another run has it.
            OSError: the folder cannot be written (`StoreError`: the store does not answer).
        """
        while True:
            contents = self.file.read()
            holder = _holder(contents)
            if contents is not None and self._is_alive(contents, holder, gone):
                raise ConfigError(
                    [
                        f"{self.setting}: {self.folder} is in use by {holder or 'another run'}; wait for its end, or "
                        f"choose another {self.setting}"
                    ]
                )
            if self.file.take(contents, _encoded(self.own)):
                break
        if contents is not None and (holder is None or holder.token != self.own.token):
            self.gone = holder and holder.token
            print(f"{self.file.path}: {holder or 'its owner'} is gone, its lock is taken over", flush=True)
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    def confirm(self) -> None:
        """Make sure that this run has the lock, which is taken now where the store did not answer before.

        A process that finds another run's name in it ends at once.

        Raises:
            ConfigError, OSError: as `acquire`.
        """
        if self._thread is None:
            self.acquire()
        else:
            self._sign()

    def release(self) -> None:
        """Give it back, if this process has it."""
        self._done.set()
        if self._thread is None:
            return
        self._thread.join(_LEAVING_S)
        if not self._thread.is_alive():
            with contextlib.suppress(OSError, FileError):
                if self._is_own():
                    self.file.remove()

    def _is_alive(self, contents: bytes, holder: Holder | None, gone: str | None) -> bool:
        """Whether there is somebody behind what stands in the lock."""
        if holder is None:
            return self._changes(contents, holder)
        if holder.token in (self.own.token, gone) or (holder.launch and holder.launch == self.own.launch):
            return False
        alive = holder.lives_here()
        return self._changes(contents, holder) if alive is None else alive

    def _changes(self, contents: bytes, holder: Holder | None) -> bool:
        """Watch whether it is written again."""
        print(
            f"{self.folder} is locked by {holder or 'another run'}: watching for {self.watch_s:.0f} s whether "
            "that still lives",
            flush=True,
        )
        watched = 0.0
        while watched < self.watch_s:
            pause = min(1.0, self.beat_s)
            time.sleep(pause)
            # What the disk or the store takes for an answer does not count: the owner may be waiting for it, too.
            watched += pause
            found = self.file.read()
            if found != contents:
                return found is not None
        return False

    def _is_own(self) -> bool:
        holder = _holder(self.file.read())
        return holder is not None and holder.token == self.own.token

    def _beat(self) -> None:
        while not self._done.wait(self.beat_s):
            with contextlib.suppress(OSError, FileError):  # a disk that is full or away for a while
                self._sign()

    def _sign(self) -> None:
        """Give a sign of life; the end of a process whose lock another run has."""
        holder = _holder(self.file.read())
        if holder is not None and holder.token != self.own.token:
            self._lose(holder)
        self._beats += 1
        self.file.write(_encoded(msgspec.structs.replace(self.own, beat=self._beats)))

    def _lose(self, holder: Holder) -> None:
        error = LockLostError(
            f"{self.folder} has been taken over by {holder}: this process gave no sign of life for "
            f"{self.watch_s:.0f} s; it leaves, or both would write there"
        )
        threading.excepthook(threading.ExceptHookArgs((LockLostError, error, None, threading.current_thread())))
        os._exit(1)


def this_process() -> Holder:
    """An owner that nobody has been."""
    process, attempt = psutil.Process(), this_attempt()
    return Holder(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        machine=_machine(),
        pid=process.pid,
        started=process.create_time(),
        job=os.environ.get("SLURM_JOB_ID"),
        launch=attempt.launch if attempt else None,
    )


def _holder(contents: bytes | None) -> Holder | None:
    """Whose a lock is by what stands in it; None where that cannot be read: it was just made, or cut short."""
    try:
        return None if contents is None else decode_json(contents, Holder, NAME)
    except FileError:
        return None


def _encoded(holder: Holder) -> bytes:
    return (json.dumps(msgspec.to_builtins(holder)) + "\n").encode()


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"
