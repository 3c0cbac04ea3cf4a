"""`infini bench checkpoint`: how long a save holds up the training, and how fast it writes."""

from __future__ import annotations

import argparse
import tempfile
from statistics import median
from typing import TYPE_CHECKING

from launch.arguments import positive_int
from launch.processes.world import be_alone

if TYPE_CHECKING:
    from launch.commands.bench_note import Note
    from pipeline.benchmarks.checkpoint import SaveCosts

HELP = "stall per save, synchronous and asynchronous, and the write rate against plain file writing"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", metavar="DIR", help="folder on the disk to measure (default: a temporary one)")
    parser.add_argument("--repeats", type=positive_int, default=5, metavar="N", help="saves of each kind (%(default)s)")


def measure(args: argparse.Namespace, note: Note) -> None:
    from launch.commands.bench_bars import draw_bars
    from pipeline.benchmarks.alternating import spread
    from pipeline.benchmarks.checkpoint import measure
    from pipeline.benchmarks.measuring import in_fresh_process

    be_alone()
    with tempfile.TemporaryDirectory(prefix="infini-bench-", dir=args.folder) as folder:
        costs = in_fresh_process(measure, folder, 64 if args.quick else 512, args.repeats)
    report(costs, note)
    rates = {"plain file": costs.plain_s, "synchronous": costs.write_s[False], "asynchronous": costs.write_s[True]}
    draw_bars(
        note.picture("writing"),
        f"writing {costs.bytes / 2**20:,.0f} MiB",
        {
            "MiB/s": {name: spread([costs.bytes / 2**20 / s for s in seconds]) for name, seconds in rates.items()},
            "training waits, s": {name: spread(costs.stall_s[name == "asynchronous"]) for name in list(rates)[1:]},
        },
        form=",.2f",
    )


def report(costs: SaveCosts, note: Note) -> None:
    """Write the tables."""
    size = costs.bytes / 2**20
    note.text("## Saving and plain writing on the same disk")
    note.text(
        f"One process, {costs.parameters:,} parameters, {size:,.0f} MiB per checkpoint (float32 masters, both moments "
        f"and the memory). Per row the median of {len(costs.plain_s)}, in brackets the smallest and the largest; the "
        "kinds take turns. Writing includes fsync, reading the files again for their SHA-256, and the rename. The "
        "plain file is written in blocks of 8 MiB and synced."
    )
    note.number("parameters", "1", costs.parameters)
    note.number("checkpoint", "bytes", costs.bytes)
    note.number("step_time", "s", costs.step_s, writing=False)
    note.number("plain_write_time", "s", costs.plain_s)
    for mode in (False, True):
        note.number("stall_time", "s", costs.stall_s[mode], asynchronous=mode)
        note.number("write_time", "s", costs.write_s[mode], asynchronous=mode)
    if costs.step_during_write_s:
        note.number("step_time", "s", costs.step_during_write_s, writing=True)
    plain = median(costs.plain_s)
    rows = [["plain file", "-", _spread(costs.plain_s), f"{size / plain:,.0f}", "1.00"]]
    for mode, name in ((False, "synchronous"), (True, "asynchronous")):
        write = median(costs.write_s[mode])
        rows.append(
            [
                name,
                _spread(costs.stall_s[mode]),
                _spread(costs.write_s[mode]),
                f"{size / write:,.0f}",
                f"{plain / write:.2f}",
            ]
        )
    note.table(["save", "training waits, s", "writing, s", "MiB/s", "of the plain rate"], rows)
    during = costs.step_during_write_s
    stalls = {mode: median(stalls) for mode, stalls in costs.stall_s.items()}
    note.text(
        f"An asynchronous save holds the training up {stalls[False] / stalls[True]:.1f} times less. A step takes "
        f"{_spread(costs.step_s)} s while nothing is written, and {_spread(during)} s during a write ({len(during)} "
        "steps): writer and training share this machine's cores."
    )


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{median(values):.3f} ({min(values):.3f} - {max(values):.3f})"
