"""A run as its `metrics.jsonl` tells it, live or ended: for `infini monitor`.

The file is followed: what was read is not read again, and a file that a resumed run has rewritten is read anew. What is
kept of it stays bounded, however long the run.
"""

from __future__ import annotations

import math
import re
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

from data.files import convert
from pipeline.reporting.console_file import CONSOLE_FILE, stamped
from pipeline.reporting.diagnosis import Finding, History, LayerNumbers, add_record, diagnose
from pipeline.reporting.metrics import Start, layer_metric, metric_lines

POINTS = 256
"""Of a curve that are kept: twice as many are thinned out to every other one."""
PACE_INTERVALS = 10
"""What is left is told by the pace of so many of the newest intervals."""
QUIET_TIMES, QUIET_LEAST_S, QUIET_AT_FIRST_S = 5, 60.0, 1800.0
"""A run is silent when no line has come for so many times the usual, and for so long at least; after the last time
while nothing is usual yet, for a first step takes what it takes."""
CONSOLE_TAIL = 8192
"""Bytes at the end of the console's file that are looked at for errors."""
_ERROR = re.compile(r"(\[rank \d+\] )?error: ")
CURVES = ("loss/train", "loss/answer", "loss/probe", "speed/tokens_per_s")


class Curve:
    """The newest value of a metric, and enough of those before it for a small drawing."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._stride, self._seen = 1, 0

    def add(self, value: float) -> None:
        if self._seen % self._stride == 0:
            self.values.append(value)
        self._seen += 1
        if len(self.values) == 2 * POINTS:
            self.values, self._stride = self.values[::2], 2 * self._stride


class RunView:
    """What is known of a run.

    Args:
        path: its `metrics.jsonl`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self._place = (0, 0)
        """Which file, and how much of it was read."""
        self.broken = 0
        """Lines that are no records."""
        self.start: Start | None = None
        """What the newest start of the run says; None in the files of older versions."""
        self.starts = 0
        self.step = 0
        self.time = self.started = math.nan
        """Of the newest line, and of the newest start."""
        self.end: str | None = None
        """Why the run ended; None while it goes on, or when nobody could say so any more."""
        self.values: dict[str, float] = {}
        """The newest value of every metric, NaN where it was no number."""
        self.own_s: list[float] = []
        """Of each rank."""
        self.curves = {name: Curve() for name in CURVES}
        self.saved: tuple[int, float] | None = None
        """Step and time of the newest checkpoint."""
        self.evaluated = 0
        """Step of the newest evaluation."""
        self._pace: deque[tuple[float, int]] = deque(maxlen=PACE_INTERVALS + 1)
        self._layers: dict[int, dict[int, LayerNumbers]] = {}

    def update(self) -> None:
        """Read what has been written since the last time.

        Raises:
            FileNotFoundError, OSError, FileError: the file cannot be read.
        """
        found = self.path.stat()
        if found.st_ino != self._place[0] or found.st_size < self._place[1]:
            self._forget()
            self._place = (found.st_ino, 0)
        for line, record in metric_lines(self.path, self._place[1]):
            if not line.endswith(b"\n"):
                break
            self._place = (self._place[0], self._place[1] + len(line))
            if isinstance(record, str):
                self.broken += 1
            else:
                self._add(record)

    def _add(self, record: dict[str, Any]) -> None:
        self.step, self.time = record["step"], record.get("time", self.time)
        self.end = record.get("end")
        if "start" in record:
            self.start = convert(record["start"], Start, str(self.path))
            self.starts += 1
            self.started = self.time
            self._pace.clear()
        if math.isnan(self.started):
            self.started = self.time
        of_layers = False
        for name, value in record.items():
            of_layers = of_layers or layer_metric(name) is not None
            if "/" in name and (value is None or isinstance(value, int | float)):
                self.values[name] = math.nan if value is None else value
        self.own_s = record.get("ranks/own_s", self.own_s)
        for name in CURVES:
            if isinstance(value := record.get(name), int | float):
                self.curves[name].add(value)
        if "loss/train" in record:
            self._pace.append((self.time, self.step))
        if "checkpoint/write_s" in record:
            self.saved = (self.step, self.time)
        if any(name.startswith("evaluation/") for name in record):
            self.evaluated = self.step
        if of_layers:
            add_record(self._layers, record)
            if len(self._layers) == 2 * POINTS:
                self._layers = dict([*self._layers.items()][1::2])  # the newest stays

    @property
    def history(self) -> History:
        """The memory's numbers, oldest first."""
        return sorted(self._layers.items())

    @property
    def findings(self) -> list[Finding] | None:
        """What is wrong with the memory; None where that cannot be said."""
        return diagnose(self.history, self.start.memory) if self._layers and self.start else None

    @property
    def steps(self) -> int | None:
        """Of the whole run; None in the files of older versions."""
        return self.start.steps if self.start else None

    @property
    def step_s(self) -> float:
        """Seconds per step, by the newest intervals, saves and evaluations included; NaN until there is a pace."""
        if len(self._pace) < 2:
            return self.values.get("speed/step_s", math.nan) if self._pace else math.nan
        (begin, first), (now, last) = self._pace[0], self._pace[-1]
        return (now - begin) / (last - first) if last > first else math.nan

    @property
    def left_s(self) -> float:
        """Seconds to the last step at this pace; NaN where they are not known."""
        return math.nan if self.steps is None else self.step_s * max(self.steps - self.step, 0)

    def silent_s(self, now: float) -> float | None:
        """For how long no line has come where that is more than usual, else None."""
        times = [when for when, _ in self._pace]
        gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
        bound = max(QUIET_TIMES * median(gaps), QUIET_LEAST_S) if gaps else QUIET_AT_FIRST_S
        silent = now - self.time
        return silent if self.end is None and silent > bound else None

    def failures(self) -> list[str]:
        """Why the newest start has failed, where `console.log` beside the file says so."""
        path = self.path.with_name(CONSOLE_FILE)
        try:
            with open(path, "rb") as file:
                file.seek(max(path.stat().st_size - CONSOLE_TAIL, 0))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return []
        told = [(when, text[:300]) for when, text in map(stamped, lines) if _ERROR.match(text)]
        return [text for when, text in told if when + 1 >= self.started]  # whole seconds
