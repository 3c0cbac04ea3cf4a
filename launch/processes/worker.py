"""One rank of a run: the first to fail says why and all leave at once, so that the reason stands last and nobody hangs.

When a rank dies, the others fail with 'connection closed by peer' a moment later, or wait in a collective that never
ends. The reason is therefore the error of the rank that fails first: it takes a claim (`_Claim`) before it closes its
connections. The others see the claim and leave without a word, even out of a collective.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import psutil

from data.files import write_whole
from launch.processes.quiet import quiet_libraries
from launch.processes.world import attempt_id
from pipeline.training.stopping import STOPPED

Result = TypeVar("Result")

FOLLOWED = 75
"""Exit code of a rank that leaves because another one has failed."""
INTERRUPTED = 130
"""Exit code of a rank that an interrupt ends; it says nothing, since one from the terminal reaches all of them."""
CLAIM_FOLDER = "INFINI_CLAIM_FOLDER"
"""Environment variable with a folder of the launcher's that nobody else can write, and that goes with the launcher."""

STOPPED_MARK = "stopped"
"""File in that folder: the ranks were told to stop."""

WATCH_INTERVAL_S = 1.0
GRACE_S = 3.0
"""A rank that is still blocked this long after another one's failure is ended: its collective would never return."""


def run_rank(function: Callable[[], Result], run_dir: Path | None) -> Result:
    """Return `function()`; when it fails, report as one rank among many and end the process.

    `join_world` must have run. In a world of one the exception is passed on. `function` must not close process groups
    while an exception passes through it, nor start a collective: the other ranks would fail first, or be waited for.
    An exception that ends one of the process's threads ends the rank as well: its main thread may wait, for ever, for a
    rank that waits for that thread.

    Args:
        run_dir: folder for `error-rank<r>.txt`, the first failing rank's traceback; None while it is not known yet.
    """
    quiet_libraries()
    if os.environ["WORLD_SIZE"] == "1":
        try:
            return function()
        except Exception as error:
            _write_traceback(error, run_dir)
            raise
    rank = _Rank(run_dir)
    done = threading.Event()
    threading.Thread(target=rank.watch, args=(done,), name="failure-watch", daemon=True).start()
    threading.excepthook = rank.on_thread_failure
    try:
        return function()
    except BaseException as error:  # an interrupt and a library's sys.exit leave the other ranks behind as well
        rank.fail(error)
    finally:
        done.set()


def told(code: int) -> int:
    """The exit code for a rank that returns `code`. torchrun takes every one but 0 for a failure: of a run that was
    told to stop, our launcher is told besides."""
    if code != STOPPED or "TORCHELASTIC_RUN_ID" not in os.environ:
        return code
    if folder := os.environ.get(CLAIM_FOLDER):
        Path(folder, STOPPED_MARK).touch()
    return 0


class _Rank:
    """What this process does about its own failure, and about another rank's."""

    def __init__(self, run_dir: Path | None) -> None:
        self.run_dir = run_dir
        self.claim = _Claim(run_dir)
        self._failing = threading.Lock()

    def fail(self, error: BaseException) -> NoReturn:
        """Say why, if no other rank has failed before, and end the process."""
        if not self._failing.acquire(blocking=False):
            threading.Event().wait()  # another of this process's threads is at it: it must come to its end
        if not self.claim.take():
            _leave(FOLLOWED)
        if not isinstance(error, KeyboardInterrupt):
            _say_why(error, self.run_dir)
        self.claim.release()
        _leave(_exit_code(error))

    def on_thread_failure(self, failure: threading.ExceptHookArgs) -> None:
        if failure.exc_type is not SystemExit:  # to Python a thread's way of ending well
            self.fail(failure.exc_value or failure.exc_type())

    def watch(self, done: threading.Event) -> None:
        """End the process when another rank has claimed its failure."""
        while not done.wait(WATCH_INTERVAL_S):
            if self.claim.is_taken() and not done.wait(GRACE_S) and not self._failing.locked():
                _leave(FOLLOWED)


class _Claim:
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
        if launcher and os.path.isdir(launcher) and (one_node or run_dir is None):
            self.folder = Path(launcher)
        elif run_dir is not None:
            self.folder = run_dir
        else:
            self.folder = self.own = Path(tempfile.gettempdir(), f"infini-{os.getuid()}-{attempt_id()}")
        self.path = _unused(self.folder / f".first-error-{attempt_id()}")

    def take(self) -> bool:
        """True for exactly one of the ranks that call it; for several only where the folder cannot be written."""
        try:
            if self.own is None:
                self.folder.mkdir(parents=True, exist_ok=True)
            else:
                with contextlib.suppress(FileExistsError):
                    self.own.mkdir(0o700)
                if not _is_private(self.own):
                    return True
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            return False
        except OSError:
            return True  # rather two reasons than none
        return True

    def is_taken(self) -> bool:
        return os.path.lexists(self.path) and (self.own is None or _is_private(self.own))

    def release(self) -> None:
        """Remove what would stay in the folder for temporary files, once the other ranks have seen it."""
        if self.own is None:
            return
        time.sleep(WATCH_INTERVAL_S + GRACE_S)
        with contextlib.suppress(OSError):
            self.path.unlink()
            self.own.rmdir()


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


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return 2 if isinstance(error, ValueError | OSError) else 1


def _say_why(error: BaseException, run_dir: Path | None) -> None:
    expected = isinstance(error, ValueError | OSError) and str(error)
    written = _write_traceback(error, run_dir)
    reason = str(error) if expected else f"{type(error).__name__}: {error}"
    lines = [f"[rank {os.environ['RANK']}] error: {reason}"]
    if os.environ.get("INFINI_DEBUG") == "1" or not (written or expected):
        lines.insert(0, "".join(traceback.format_exception(error)).rstrip())
    if written:
        lines.append(f"(traceback in {written})")
    with contextlib.suppress(OSError, ValueError):  # whoever read the output may have gone
        # One write: the lines of other ranks cannot come in between.
        sys.stderr.write("\n".join(lines) + "\n")


def _write_traceback(error: BaseException, run_dir: Path | None) -> Path | None:
    """Where the error's traceback now stands, or None: an error report must not fail for want of disk."""
    if run_dir is None:
        return None
    path = run_dir / f"error-rank{os.environ['RANK']}.txt"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(traceback.format_exception(error)))
    except OSError:
        return None
    return path


def _leave(code: int) -> NoReturn:
    """End the process without clean-up: destroying a process group waits for ranks that are no longer there."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
