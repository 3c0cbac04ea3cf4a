"""One rank of a run: the first to fail says why and all leave at once, so that the reason stands last and nobody hangs.

When a rank dies, the others fail with 'connection closed by peer' a moment later. The reason is therefore the error of
the rank that fails first: it takes a claim file in the run folder (which all nodes share) before it closes its
connections. The others see the claim and leave without a word.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import psutil

from launch.quiet import quiet_libraries
from launch.world import attempt_id

Result = TypeVar("Result")

FOLLOWED = 75
"""Exit code of a rank that leaves because another one has failed."""

WATCH_INTERVAL_S = 1.0
GRACE_S = 3.0
"""A rank that is still blocked this long after another one's failure is ended: its collective would never return."""


def run_rank(function: Callable[[], Result], run_dir: Path | None) -> Result:
    """Return `function()`; when it fails, report as one rank among many and end the process.

    `join_world` must have run. In a world of one the exception is passed on. `function` must not close process groups
    while an exception passes through it: the other ranks would fail first. An exception that ends one of the process's
    threads ends the rank as well: its main thread may wait, for ever, for a rank that waits for that thread.

    Args:
        run_dir: folder for `error-rank<r>.txt`, the first failing rank's traceback; None while it is not known yet.
    """
    quiet_libraries()
    alone = os.environ["WORLD_SIZE"] == "1"
    done = threading.Event()
    if run_dir is not None and not alone:
        threading.Thread(target=_watch, args=(run_dir, done), name="failure-watch", daemon=True).start()
    if not alone:
        threading.excepthook = lambda failure: _fail(failure.exc_value, run_dir)
    try:
        return function()
    except KeyboardInterrupt:
        if alone:
            raise
        _leave(130)
    except Exception as error:
        if alone:
            _write_traceback(error, run_dir)
            raise
        _fail(error, run_dir)
    finally:
        done.set()


def _fail(error: BaseException, run_dir: Path | None) -> NoReturn:
    if not _claim(run_dir):
        _leave(FOLLOWED)
    _say_why(error, run_dir)
    _leave(2 if isinstance(error, ValueError | OSError) else 1)


def _say_why(error: BaseException, run_dir: Path | None) -> None:
    expected = isinstance(error, ValueError | OSError)
    written = _write_traceback(error, run_dir)
    reason = str(error) if expected else f"{type(error).__name__}: {error}"
    lines = [f"[rank {os.environ['RANK']}] error: {reason}"]
    if os.environ.get("INFINI_DEBUG") == "1" or not (written or expected):
        lines.insert(0, "".join(traceback.format_exception(error)).rstrip())
    if written:
        lines.append(f"(traceback in {written})")
    # One write: the lines of other ranks cannot come in between.
    sys.stderr.write("\n".join(lines) + "\n")


def _write_traceback(error: BaseException, run_dir: Path | None) -> Path | None:
    """Where the error's traceback now stands, or None: an error report must not fail for want of disk."""
    if run_dir is None:
        return None
    path = run_dir / f"error-rank{os.environ['RANK']}.txt"
    temporary = path.with_suffix(".tmp")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        temporary.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        return None
    return path


def _claim_path(run_dir: Path | None) -> Path:
    """The claim file of this launch. Stale ones, of an earlier launch under the same name, are counted past and not
    removed: removing would race with another rank's claim."""
    base = (run_dir or Path(tempfile.gettempdir())) / f".first-error-{attempt_id()}"
    # The kernel gives a process's start to a second.
    start = psutil.Process().create_time() - 1
    for generation in itertools.count():
        path = base.with_name(f"{base.name}-{generation}")
        try:
            if path.stat().st_mtime >= start:
                return path
        except OSError:
            return path


def _claim(run_dir: Path | None) -> bool:
    """True for exactly one of the ranks that call it; for several only where the folder cannot be written."""
    path = _claim_path(run_dir)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:
        return True  # rather two reasons than none
    return True


def _watch(run_dir: Path, done: threading.Event) -> None:
    path = _claim_path(run_dir)
    while not done.wait(WATCH_INTERVAL_S):
        if path.exists():
            time.sleep(GRACE_S)
            if not done.is_set():
                _leave(FOLLOWED)


def _leave(code: int) -> NoReturn:
    """End the process without clean-up: destroying a process group waits for ranks that are no longer there."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
