"""`infini bench NAME`: measure a part of the system and write a dated note about it."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.benchmarks.record import Settings

BENCHMARKS = {
    "step": "launch.commands.bench_step",
    "length": "launch.commands.bench_length",
    "data": "launch.commands.bench_data",
    "overhead": "launch.commands.bench_overhead",
    "scaling": "launch.commands.bench_scaling",
    "context": "launch.commands.bench_context",
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
        description="Measure a part of the system on this machine and write a dated note with tables and pictures, and "
        "a JSON file with the numbers beside it.",
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
    from launch.commands.bench_note import Note

    note = Note(args.benchmark, Path(args.out))
    args.measure(args, note)
    path = note.write(settings_of(args))
    print(f"\nnote: {path}\nnumbers: {path.with_suffix('.json')}")
    return 0


def settings_of(args: argparse.Namespace) -> Settings:
    """The options that a benchmark ran with, by their names: the defaults included, and what --quick made of them."""
    none = {"run", "benchmark", "measure", "command", "debug", "out"}
    return {name: value for name, value in vars(args).items() if name not in none}
