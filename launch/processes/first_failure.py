"""What a launcher does when the first of its ranks has failed: it lets that one's reason out before it ends the others.

torchrun's agent looks at its ranks ten times a second; as soon as one has failed it sends TERM to the others, and KILL
after a time. Two reasons would be lost so: that of a rank which ends without a word, by a signal or by a library's
exit, and that of one which is still writing its own when another has already followed it.
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from launch.processes.claims import GRACE_S, WATCH_INTERVAL_S, claim_for
from launch.processes.passing import SignalPasser
from launch.processes.worker import FOLLOWED
from pipeline.reporting.console_file import ConsoleFile
from pipeline.training.elastic import RUN_FOLDER, told_by_ranks

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import PContext

KILL_S = 15
"""Blocked ranks are killed after this time, in place of torchrun's 30 s: one that is starting does not die of TERM, and
may wait for one that is dead."""
SPEAK_S = 2 * (WATCH_INTERVAL_S + GRACE_S)
"""When a rank has followed, the one that failed is given this time to end: its reason may go to a slow disk."""


class FirstFailure:
    """Stands before torchrun's way of ending ranks.

    Args:
        logs: the launcher's folder.
        passer: knows what signals the ranks had from the launcher.
        close: torchrun's way, `PContext.close`.
    """

    def __init__(self, logs: Path, passer: SignalPasser, close: Callable[..., None]) -> None:
        self.code: int | None = None
        """The exit code when the launch's first failure is that of one of these ranks which could not say so itself."""
        self._logs, self._passer, self._close = logs, passer, close
        self._ranks: PContext | None = None

    def close(self, ranks: PContext, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        """End these ranks, of which one has failed, or all have ended, or they are to be started again."""
        if ranks is not self._ranks:  # a second time they have been ended by this
            self._ranks, self.code = ranks, None
            self._await_reason()
            self._speak_for_the_dead()
        self._close(ranks, death_sig, min(timeout, KILL_S))

    def _codes(self) -> dict[int, int | None]:
        """Exit codes so far, by place on this node."""
        return {place: handler.proc.poll() for place, handler in self._ranks.subprocess_handlers.items()}

    def _await_reason(self) -> None:
        deadline = time.monotonic() + SPEAK_S
        while time.monotonic() < deadline:
            codes = self._codes().values()
            followed = FOLLOWED in codes and all(code in (None, 0, FOLLOWED) for code in codes)
            if not followed or None not in codes:
                return
            time.sleep(0.05)

    def _speak_for_the_dead(self) -> None:
        for place, code in self._codes().items():
            if code in (None, 0, FOLLOWED) or self._passer.ending in (signal.SIGINT, -code):
                continue
            rank = self._ranks.envs[place]
            claimed = claim_for(rank, self._logs)
            if claimed is False or (code > 0 and not claimed):
                continue
            if code > 0:
                how, self.code = f"ended with code {code}, and has not said why", code
            else:
                name = signal.Signals(-code).name
                how, self.code = f"was killed by {name}", 128 - code
                how += "; the kernel does that when memory runs out" if name == "SIGKILL" else ""
            text = f"rank {rank['RANK']} on {socket.gethostname()} {how}"
            print(f"infini: error: {text}", file=sys.stderr, flush=True)
            if run_dir := told_by_ranks(self._logs, RUN_FOLDER):
                ConsoleFile(Path(run_dir)).write(f"error: {text}")
            return
