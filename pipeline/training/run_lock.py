"""One run at a time in a run folder: a lock that says whose it is, and that the dead do not keep.

The lock is a file, `.lock`, which its owner writes again every few seconds. On the owner's own machine a new run sees
at once whether the owner still lives. From another one it watches whether the file changes: no clocks are compared, so
they need not agree. Only the main process has to do with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil

from data.files import FileError, decode_json, read_bytes, write_whole
from pipeline.config.load import ConfigError
from pipeline.training.elastic import this_attempt

NAME = ".lock"
LIMIT = 4096
"""Bytes of it that are read."""
BEAT_S = 10.0
"""Between two signs of life."""
WATCH_S = 45.0
"""A lock that does not change for so long has no owner: some beats, and what a shared disk's cache keeps back."""


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
    """Another run has taken the run folder."""


class RunLock:
    """The lock of a run folder.

    Args:
        beat_s, watch_s: as `BEAT_S` and `WATCH_S`.
    """

    def __init__(self, run_dir: Path, *, beat_s: float = BEAT_S, watch_s: float = WATCH_S) -> None:
        self.path = run_dir / NAME
        self.beat_s, self.watch_s = beat_s, watch_s
        process, attempt = psutil.Process(), this_attempt()
        self.own = Holder(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            machine=_machine(),
            pid=process.pid,
            started=process.create_time(),
            job=os.environ.get("SLURM_JOB_ID"),
            launch=attempt.launch if attempt else None,
        )
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock and keep it alive; says what it waits for, and whose it was.

        Raises:
            ConfigError: another run has it.
            OSError: the folder cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            found = self._read()
            if found is None:
                continue
            contents, holder = found
            alive = holder.lives_here() if holder else None
            if holder and holder.launch and holder.launch == self.own.launch:
                alive = False
            if alive is None:
                alive = self._changes(contents, holder)
            if alive:
                raise ConfigError(
                    [
                        f"run_dir: {self.path.parent} is in use by {holder or 'another run'}; wait for its end, or "
                        "choose another run_dir"
                    ]
                )
            if self._take_over(contents):
                print(f"{self.path}: {holder or 'its owner'} is gone, its lock is taken over", flush=True)
                break
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give it back, if this process has it."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            with contextlib.suppress(OSError):
                if self._is_own():
                    self.path.unlink()

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "wb") as file:
            file.write(_encoded(self.own))
        return True

    def _read(self) -> tuple[bytes, Holder | None] | None:
        """What stands in it, and whose it is if that can be read; None when it is gone."""
        try:
            contents = read_bytes(self.path, LIMIT)
            return contents, decode_json(contents, Holder, str(self.path))
        except FileNotFoundError:
            return None
        except FileError:
            return contents, None  # just made, or cut short

    def _changes(self, contents: bytes, holder: Holder | None) -> bool:
        """Watch whether it is written again."""
        print(
            f"{self.path.parent} is locked by {holder or 'another run'}: watching for {self.watch_s:.0f} s whether "
            "that still lives",
            flush=True,
        )
        deadline = time.monotonic() + self.watch_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.beat_s))
            found = self._read()
            if found is None:
                return False
            if found[0] != contents:
                return True
        return False

    def _take_over(self, contents: bytes) -> bool:
        """Write over the lock that says `contents`, unless another run has done so by now."""
        with _one_at_a_time(self.path.parent):
            found = self._read()
            if found is None or found[0] != contents:
                return False
            write_whole(self.path, _encoded(self.own))
            return True

    def _is_own(self) -> bool:
        found = self._read()
        return found is not None and found[1] is not None and found[1].token == self.own.token

    def _beat(self) -> None:
        beat = 0
        while not self._done.wait(self.beat_s):
            beat += 1
            with contextlib.suppress(OSError):  # a disk that is full or away for a while
                found = self._read()
                if found is not None and found[1] is not None and found[1].token != self.own.token:
                    self._lose(found[1])
                    return
                write_whole(self.path, _encoded(msgspec.structs.replace(self.own, beat=beat)))

    def _lose(self, holder: Holder) -> None:
        error = LockLostError(
            f"{self.path.parent} has been taken over by {holder}: this process gave no sign of life for "
            f"{self.watch_s:.0f} s; it leaves, or both would write there"
        )
        threading.excepthook(threading.ExceptHookArgs((LockLostError, error, None, threading.current_thread())))
        os._exit(1)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """One process at a time is inside for a folder; where its file system has no such locks (NFS has none for folders)
    two may be, and the one that is written over sees it at its next sign of life."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _encoded(holder: Holder) -> bytes:
    return (json.dumps(msgspec.to_builtins(holder)) + "\n").encode()


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"
