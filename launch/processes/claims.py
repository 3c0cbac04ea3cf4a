"""Which process of a launch says why it has failed: the first one, and no other.

A claim is a file that a failing rank makes before it closes its connections; the others see it and leave without a
word. For a rank that a signal has killed, its node's launcher makes it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from launch.processes.world import attempt_id
from pipeline.training.elastic import CLAIM_FOLDER, tell_launcher, told_by_ranks

WATCH_INTERVAL_S = 1.0
GRACE_S = 3.0
"""A rank that is still blocked this long after another one's failure is ended: its collective would never return."""


class Claim:
    """A file that the first rank to fail makes: one of them can.

    It lies where all ranks of the launch look: in the launcher's private folder, if that serves all of them; else in
    the run folder, which all nodes share. There it stays behind, empty and hidden: over a network's cache another
    node's rank may look late, and would give its broken connection for the reason. Where neither is there (ranks
    that srun has started, before they know the run folder), it lies in a private folder of this node that the claiming
    rank removes again.
    """

    def __init__(self, run_dir: Path | None) -> None:
        launcher = os.environ.get(CLAIM_FOLDER)
        one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
        self.own: Path | None = None
        in_launcher = launcher is not None and os.path.isdir(launcher)
        if in_launcher and (one_node or run_dir is None):
            self.folder = Path(launcher)
        elif run_dir is not None:
            self.folder = run_dir
        else:
            self.folder = self.own = Path(tempfile.gettempdir(), f"infini-{os.getuid()}-{attempt_id()}")
        self.path = _unused(self.folder / f".first-error-{attempt_id()}")
        tell_launcher(_pointer(os.environ), str(self.path.absolute()))

    def take(self) -> bool:
        """True for exactly one of the ranks that call it; for several only where the folder cannot be written."""
        if self.own is not None:
            with contextlib.suppress(OSError):
                self.own.mkdir(0o700)
            if not _is_private(self.own):
                return True
        try:
            return _make(self.path)
        except OSError:
            return True  # rather two reasons than none

    def is_taken(self) -> bool:
        return os.path.lexists(self.path) and (self.own is None or _is_private(self.own))

    def is_taken_within(self, patience_s: float) -> bool:
        """Wait for another process's claim."""
        deadline = time.monotonic() + patience_s
        while not (taken := self.is_taken()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return taken

    def release(self) -> None:
        """Remove what would stay in the folder for temporary files, once the other ranks have seen it."""
        if self.own is None:
            return
        time.sleep(WATCH_INTERVAL_S + GRACE_S)
        with contextlib.suppress(OSError):
            self.path.unlink()
            self.own.rmdir()


def claim_for(rank: Mapping[str, str], launcher: Path) -> bool | None:
    """Claim in place of a rank that has ended without a word: whether nobody had done so before. None when that cannot
    be known, as of one that had not come so far.

    Args:
        rank: its environment.
        launcher: the launcher's folder, where the ranks leave the place of their claim as soon as they know it.
    """
    path = told_by_ranks(launcher, _pointer(rank))
    try:
        return None if path is None else _make(Path(path))
    except OSError:
        return None


def _pointer(rank: Mapping[str, str]) -> str:
    return f"claim-{rank.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _make(path: Path) -> bool:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    return True


def _unused(base: Path) -> Path:
    """The claim's name in this launch. Stale ones, of an earlier launch under the same name, are counted past and not
    removed: removing would race with another rank's claim."""
    # The kernel gives a process's start to a second.
    start = psutil.Process().create_time() - 1
    for generation in itertools.count():
        path = base.with_name(f"{base.name}-{generation}")
        try:
            if path.lstat().st_mtime >= start:
                return path
        except OSError:
            return path


def _is_private(folder: Path) -> bool:
    """Whether it is a folder of this user's that no other user can write to."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
