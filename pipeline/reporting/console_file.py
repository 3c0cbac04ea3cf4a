"""`console.log` in a run's folder: what the main process says, and why any rank failed, over all starts of the run."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path

CONSOLE_FILE = "console.log"
_STAMP, _STAMP_LENGTH = "%Y-%m-%d %H:%M:%S", 19


def stamped(line: str) -> tuple[float, str]:
    """Unix time and text of a line, NaN where it has no time."""
    try:
        return time.mktime(time.strptime(line[:_STAMP_LENGTH], _STAMP)), line[_STAMP_LENGTH + 2 :]
    except (ValueError, OverflowError):
        return math.nan, line


class ConsoleFile:
    """Appends lines, each with its time.

    What is said at once is one write to a file that is opened for it: other ranks' lines cannot come in between, and
    whoever moves the file away (logrotate) gets a new one. A full disk ends no run: standard error is told once.

    Args:
        run_dir: folder of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / CONSOLE_FILE
        self._failed = False

    def write(self, text: str) -> None:
        """Append the lines of `text`."""
        stamp = time.strftime(_STAMP)
        lines = "".join(f"{stamp}  {line}".rstrip() + "\n" for line in text.splitlines())
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(descriptor, lines.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            if not self._failed:
                print(f"{self.path} cannot be written: {error}", file=sys.stderr)
            self._failed = True
