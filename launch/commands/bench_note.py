"""The note that a benchmark leaves: Markdown for people, JSON for programs, pictures."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import psutil

from data.files import write_whole
from pipeline.benchmarks.alternating import Spread
from pipeline.benchmarks.record import Measurement, Record, Scalar, Settings, write_record
from pipeline.parallel.setup import versions


class Note:
    """A benchmark's note: text in sections, pictures beside it, and the numbers once more as JSON.

    Args:
        name: of the benchmark.
        folder: where the note goes; made if missing.

    Attributes:
        device: the accelerator that computed, if one did.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.day = datetime.date.today().isoformat()
        self.name, self.folder = name, folder
        self.parts: list[str] = []
        self.measurements: list[Measurement] = []
        self.pictures: list[str] = []
        self.device: str | None = None
        self.start = time.time()
        self.load_at_start = os.getloadavg()[0]
        folder.mkdir(parents=True, exist_ok=True)

    def picture(self, name: str) -> Path:
        """Where to save a picture; it is shown at this place of the note."""
        path = self.folder / f"{self.day}-{self.name}-{name}.png"
        self.parts.append(f"![{name}]({path.name})")
        self.pictures.append(path.name)
        return path

    def text(self, text: str) -> None:
        """Add a paragraph or heading."""
        self.parts.append(text)
        print(f"\n{text}", flush=True)

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        """Add a table, and print it."""
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

        def line(cells: list[str]) -> str:
            first, *others = zip(cells, widths, strict=True)
            return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

        rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
        self.text("\n".join([line(header), rule, *map(line, rows)]))

    def number(self, name: str, unit: str, value: float | Spread | Sequence[float], **of: Scalar) -> None:
        """Add a number to the JSON file, see `Measurement`.

        Args:
            value: one number; or a median with its quartiles; or repeats, whose median and extremes are kept.
        """
        if isinstance(value, Spread):
            measured = {"value": value.median, "low": value.low, "high": value.high, "spread": "quartiles"}
            measured["samples"] = value.samples
        elif isinstance(value, Sequence):
            measured = {"value": median(value), "low": min(value), "high": max(value), "spread": "extremes"}
            measured["samples"] = len(value)
        else:
            measured = {"value": value}
        self.measurements.append(Measurement(name=name, unit=unit, of=of, **measured))

    def write(self, settings: Settings) -> Path:
        """Write the note whole, and the numbers beside it; returns the note's path.

        Args:
            settings: what the benchmark ran with.
        """
        path = self.folder / f"{self.day}-{self.name}.md"
        record = self.record(settings)
        write_record(path.with_suffix(".json"), record)
        machine = record.machine
        facts = {
            "date": f"{self.day}, {record.seconds:.0f} s",
            "commit": record.commit,
            "command": record.command,
            "machine": f"{machine['processor']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
            f"{machine['system']}" + (f", {self.device}" if self.device else ""),
            "load (1 min)": f"{record.load['start']:.1f} at the start, {record.load['end']:.1f} at the end, this "
            "benchmark's own processes included",
            "versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
        }
        numbers = path.with_suffix(".json").name
        facts["numbers"] = f"[{numbers}]({numbers})"
        head = [f"# Benchmark: {self.name}", "\n".join(f"- {key}: {value}" for key, value in facts.items())]
        write_whole(path, "\n\n".join([*head, *self.parts]) + "\n")
        return path

    def record(self, settings: Settings) -> Record:
        """What the JSON file says."""
        machine: dict[str, Scalar] = {
            "processor": _processor(),
            "cores": psutil.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "system": f"{platform.system()} {platform.release()}",
        }
        if self.device:
            machine["device"] = self.device
        return Record(
            benchmark=self.name,
            date=self.day,
            seconds=time.time() - self.start,
            commit=_commit(),
            command=shlex.join(["infini", *sys.argv[1:]]),
            machine=machine,
            load={"start": self.load_at_start, "end": os.getloadavg()[0]},
            versions=versions(),
            settings=settings,
            measurements=self.measurements,
            pictures=self.pictures,
        )


def _commit() -> str:
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + (" with uncommitted changes" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
