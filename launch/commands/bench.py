"""`infini bench NAME`: measure a part of the system and write a dated note about it."""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil

from data.files import write_whole

BENCHMARKS = {
    "schedule": "launch.commands.bench_schedule",
    "checkpoint": "launch.commands.bench_checkpoint",
    "generate": "launch.commands.bench_generate",
    "capacity": "launch.commands.bench_capacity",
}
"""Modules with `HELP`, `add_options(parser)` and `measure(args, note)`."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure a part of the system and write a note",
        description="Measure a part of the system on this machine and write a dated note with tables and pictures.",
    )
    names = parser.add_subparsers(title="benchmarks", metavar="NAME", required=True)
    for name, module_name in BENCHMARKS.items():
        module = importlib.import_module(module_name)
        one = names.add_parser(name, help=module.HELP, description=f"{module.HELP[0].upper()}{module.HELP[1:]}.")
        one.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
        one.add_argument("--out", default="docs/benchmarks", metavar="DIR", help="folder of the note (%(default)s)")
        module.add_options(one)
        one.set_defaults(run=run, benchmark=name, measure=module.measure)


def run(args: argparse.Namespace) -> int:
    from launch.processes.quiet import quiet_libraries

    quiet_libraries()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: processes on one machine share its cores
    note = Note(args.benchmark, Path(args.out))
    args.measure(args, note)
    print(f"\nnote: {note.write()}")
    return 0


class Note:
    """A benchmark's note: text in sections, and pictures beside it.

    Args:
        name: of the benchmark.
        folder: where the note goes; made if missing.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.day = datetime.date.today().isoformat()
        self.name, self.folder = name, folder
        self.parts: list[str] = []
        self.start = time.time()
        self.load_at_start = os.getloadavg()[0]
        folder.mkdir(parents=True, exist_ok=True)

    def picture(self, name: str) -> Path:
        """Where to save a picture; it is shown at this place of the note."""
        path = self.folder / f"{self.day}-{self.name}-{name}.png"
        self.parts.append(f"![{name}]({path.name})")
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

    def write(self) -> Path:
        """Write the note whole; returns its path."""
        loads = f"{self.load_at_start:.1f} at the start, {os.getloadavg()[0]:.1f} at the end"
        facts = {
            "date": f"{self.day}, {time.time() - self.start:.0f} s",
            "commit": _commit(),
            "command": shlex.join(["infini", *sys.argv[1:]]),
            "machine": f"{_processor()}, {psutil.cpu_count()} cores, "
            f"{psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.system()} {platform.release()}",
            "load (1 min)": f"{loads}, this benchmark's own processes included",
            "versions": _versions(),
        }
        head = [f"# Benchmark: {self.name}", "\n".join(f"- {key}: {value}" for key, value in facts.items())]
        path = self.folder / f"{self.day}-{self.name}.md"
        write_whole(path, "\n\n".join([*head, *self.parts]) + "\n")
        return path


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


def _versions() -> str:
    from pipeline.parallel.setup import versions

    return ", ".join(f"{name} {version}" for name, version in versions().items())
