"""The file that is a lock: taken once, on a disk or in an object store.

A disk makes a file for one process alone, and lets one at a time write over it. A store does neither for sure: what is
written last stands. So whoever takes a lock there writes it, waits, and has it if it still stands. Two that come at
once see the same, and the later one has it. Only one that has been held up for longer than that pause, between its last
look and its writing, takes a lock that another run has by then; the other sees it when it signs next.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from data.files import Place, StorePath, read_bytes, write_whole

LIMIT = 4096
"""Bytes of it that are read."""
SETTLE_S = 2.0
"""The pause of a store's: some times what a request takes."""


class LockFile(Protocol):
    """Contents are bytes, at most `LIMIT`. Everything raises OSError where disk or store would not have it."""

    path: Place

    def read(self) -> bytes | None:
        """What stands in it; None where it is not there."""

    def take(self, before: bytes | None, contents: bytes) -> bool:
        """Write it, if it says `before` (None: is not there); whether this process has it now."""

    def write(self, contents: bytes) -> None:
        """The owner signs."""

    def remove(self) -> None: ...


class DiskLockFile:
    """In a folder that is made where it is missing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> bytes | None:
        try:
            return read_bytes(self.path, LIMIT)
        except FileNotFoundError:
            return None

    def take(self, before: bytes | None, contents: bytes) -> bool:
        if before is None:
            return self._create(contents)
        with _one_at_a_time(self.path.parent):
            if self.read() != before:
                return False
            self.write(contents)
            return True

    def _create(self, contents: bytes) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "wb") as file:
            file.write(contents)
        return True

    def write(self, contents: bytes) -> None:
        write_whole(self.path, contents)

    def remove(self) -> None:
        self.path.unlink()


class StoreLockFile:
    """An object of a store, which must give back what was written to it last (all that are named in the
    documentation do).

    Args:
        settle_s: as `SETTLE_S`.
    """

    def __init__(self, path: StorePath, *, settle_s: float = SETTLE_S) -> None:
        self.path, self.settle_s = path, settle_s

    def read(self) -> bytes | None:
        try:
            return self.path.head(LIMIT)
        except FileNotFoundError:
            return None

    def take(self, before: bytes | None, contents: bytes) -> bool:
        if self.read() != before:
            return False
        self.write(contents)
        time.sleep(self.settle_s)
        return self.read() == contents

    def write(self, contents: bytes) -> None:
        self.path.write(contents)

    def remove(self) -> None:
        self.path.remove()


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
