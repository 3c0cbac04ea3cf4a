"""One rank of a run: the first to fail says why and all leave at once, so that the reason stands last and nobody hangs.

When a rank dies, the others fail with 'connection closed by peer' a moment later, or wait in a collective that never
ends. The reason is therefore the error of the rank that fails first: it takes a claim (`launch.processes.claims`)
before it closes its connections. The others see the claim and leave without a word, even out of a collective. A rank
that is killed can take none: who loses the connection to it gives its launcher time to do so.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from launch.processes.claims import CLAIM_FOLDER, GRACE_S, WATCH_INTERVAL_S, Claim
from launch.processes.quiet import quiet_libraries
from pipeline.reporting.console_file import ConsoleFile
from pipeline.training.elastic import REGROUP, RUN_FOLDER, tell_launcher
from pipeline.training.stopping import STOPPED

Result = TypeVar("Result")

FOLLOWED = 75
"""Exit code of a rank that leaves because another one has failed."""
INTERRUPTED = 130
"""Exit code of a rank that an interrupt ends; it says nothing, since one from the terminal reaches all of them."""
STOPPED_MARK, REGROUPED_MARK, NOT_NEEDED = "stopped", "regrouped", "not-needed"
"""Files in the launcher's folder: the ranks were told to stop; they have saved, to be started again on more nodes;
those that wait in reserve may leave."""
_MARKS = {0: (NOT_NEEDED,), STOPPED: (NOT_NEEDED, STOPPED_MARK), REGROUP: (NOT_NEEDED, REGROUPED_MARK)}
"""What a rank's code leaves there."""
LOOKS_PER_S = 1000
"""Of all ranks together, for another one's claim: the nodes share the disk on which it is."""
LOST_PEER_S = 10.0
"""So long a rank that has lost the connection to another one waits for the reason: the other's launcher looks at its
ranks ten times a second, but may have to share its processor, and a network's disk keeps things back."""
_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|socket (closed|error)|timed out|remote process exited|"
    r"(failed|unable) to (recv|send|connect)|gloo/|nccl",
    re.IGNORECASE,
)
"""What the communication libraries say, all of them as RuntimeErrors."""
_ADDRESS = re.compile(r"\[?\b(\d+\.\d+\.\d+\.\d+|[0-9a-f]*:[0-9a-f:]+:[0-9a-f]+)\]?(?::|<)\d+")
"""Of gloo's `[10.0.0.2]:4711` and NCCL's `10.0.0.2<4711>`."""


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
            if written := _write_traceback(error, run_dir):
                ConsoleFile(written.parent).write(f"error: {_reason(error)}")
            raise
    if run_dir is not None:
        tell_launcher(RUN_FOLDER, str(run_dir.absolute()))
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
    told to stop, or makes room for more nodes, our launcher is told besides."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or code not in _MARKS:
        return code
    if folder := os.environ.get(CLAIM_FOLDER):
        mark_end(Path(folder), code)
    return 0


def mark_end(launcher: Path, code: int) -> None:
    """Tell in the launcher's folder how its ranks have ended without a failure: 0, `STOPPED` or `REGROUP`."""
    for mark in _MARKS[code]:
        (launcher / mark).touch()


def marked_end(launcher: Path) -> int:
    """The exit code of a launcher whose ranks have ended without a failure: 0 or `STOPPED`."""
    return STOPPED if (launcher / STOPPED_MARK).exists() else 0


class _Rank:
    """What this process does about its own failure, and about another rank's."""

    def __init__(self, run_dir: Path | None) -> None:
        self.run_dir = run_dir
        self.claim = Claim(run_dir)
        self._failing = threading.Lock()

    def fail(self, error: BaseException) -> NoReturn:
        """Say why, if no other rank has failed before, and end the process."""
        if not self._failing.acquire(blocking=False):
            threading.Event().wait()  # another of this process's threads is at it: it must come to its end
        alone = _has_lost_a_peer(error)
        if (alone and self.claim.is_taken_within(LOST_PEER_S)) or not self.claim.take():
            _leave(FOLLOWED)
        if not isinstance(error, KeyboardInterrupt):
            _say_why(error, self.run_dir, lost_peer=alone)
        self.claim.release()
        _leave(_exit_code(error))

    def on_thread_failure(self, failure: threading.ExceptHookArgs) -> None:
        if failure.exc_type is not SystemExit:  # to Python a thread's way of ending well
            self.fail(failure.exc_value or failure.exc_type())

    def watch(self, done: threading.Event) -> None:
        """End the process when another rank has claimed its failure."""
        pause_s = max(WATCH_INTERVAL_S, int(os.environ["WORLD_SIZE"]) / LOOKS_PER_S)
        while not done.wait(pause_s):
            if self.claim.is_taken() and not done.wait(GRACE_S) and not self._failing.locked():
                _leave(FOLLOWED)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, ConnectionError):  # another start may succeed
        return 1
    return 2 if isinstance(error, ValueError | OSError) else 1


def _has_lost_a_peer(error: BaseException) -> bool:
    """Whether it tells of another process's end, or of a network's, and not of this one's own failure."""
    library = isinstance(error, RuntimeError) and not type(error).__module__.startswith("pipeline.")
    return library and _LOST_PEER.search(str(error)) is not None


def _peer(reason: str) -> str:
    """The node whose address a library's error gives."""
    if (found := _ADDRESS.search(reason)) is None:
        return "another rank"
    try:
        return f"{socket.gethostbyaddr(found[1])[0]} ({found[1]})"
    except OSError:
        return found[1]


def _short(reason: str) -> str:
    """A library's first line, without its place in the source and its advice; the traceback's file has all of it."""
    return re.sub(r"\[/\S*\] |\.? This is typically caused .*", "", reason.splitlines()[0])


def _say_why(error: BaseException, run_dir: Path | None, lost_peer: bool = False) -> None:
    written, reason = _write_traceback(error, run_dir), _reason(error)
    if lost_peer:
        reason = (
            f"on {socket.gethostname()}: the connection to {_peer(reason)} was lost, and no rank has said why within "
            f"{LOST_PEER_S:.0f} s: is its node gone, or the network between? ({_short(reason)})"
        )
    lines = [f"[rank {os.environ['RANK']}] error: {reason}"]
    if os.environ.get("INFINI_DEBUG") == "1" or not (written or _is_expected(error)):
        lines.insert(0, "".join(traceback.format_exception(error)).rstrip())
    if written:
        lines.append(f"(traceback in {written})")
        ConsoleFile(written.parent).write("\n".join(lines))
    with contextlib.suppress(OSError, ValueError):  # whoever read the output may have gone
        # One write: the lines of other ranks cannot come in between.
        sys.stderr.write("\n".join(lines) + "\n")


def _is_expected(error: BaseException) -> bool:
    return isinstance(error, ValueError | OSError) and bool(str(error))


def _reason(error: BaseException) -> str:
    return str(error) if _is_expected(error) else f"{type(error).__name__}: {error}"


def _write_traceback(error: BaseException, run_dir: Path | None) -> Path | None:
    """Where the error's traceback now stands, or None: an error report must not fail for want of disk."""
    if run_dir is None:
        return None
    path = run_dir / f"error-rank{os.environ['RANK']}.txt"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:  # behind those of earlier starts
            file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}\n{''.join(traceback.format_exception(error))}")
    except OSError:
        return None
    return path


def _leave(code: int) -> NoReturn:
    """End the process without clean-up: destroying a process group waits for ranks that are no longer there."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
