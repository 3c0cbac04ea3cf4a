"""`infini bench overhead`: what waiting for data, metrics and asynchronous saves cost a training run."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from launch.arguments import positive_int
from launch.commands.bench_options import (
    add_machine,
    add_segment_length,
    add_sizes,
    check_multiple,
    check_sizes,
    choose_device,
    hide_devices,
    machine_in_words,
    model_sizes,
)
from launch.processes.world import be_alone

if TYPE_CHECKING:
    from launch.commands.bench_note import Note
    from pipeline.benchmarks.overhead import Overhead

HELP = "what waiting for data, metrics and asynchronous saves cost a training step"
BOUNDS = {"data": 0.01, "metrics": 0.01, "saves": 0.02}
"""Of a run's time, at most; a save in every minute."""
QUICK = {"hidden": 32, "layers": 1, "heads": 2, "ffn": 86, "tokens": 128, "segment_length": 32, "intervals": 1}
QUICK |= {"repeats": 1, "megabytes": 1, "set": ["metrics.interval=2"]}


def add_options(parser: argparse.ArgumentParser) -> None:
    sizes = add_sizes(parser, hidden=256, layers=8, heads=4, ffn=683)
    sizes.add_argument("--tokens", type=positive_int, default=2048, metavar="N", help="of a window (%(default)s)")
    sizes.add_argument("--lanes", type=positive_int, default=1, metavar="G", help="windows of a step (%(default)s)")
    add_segment_length(sizes)
    parser.add_argument(
        "--intervals", type=positive_int, default=3, metavar="N", help="of the metrics that are measured (%(default)s)"
    )
    parser.add_argument(
        "--repeats", type=positive_int, default=5, metavar="N", help="saves and steps with statistics (%(default)s)"
    )
    parser.add_argument("--megabytes", type=positive_int, default=4, metavar="N", help="of text (%(default)s)")
    parser.add_argument("--folder", metavar="DIR", help="folder on the disk to save to (default: a temporary one)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the run")
    add_machine(parser)


def measure(args: argparse.Namespace, note: Note) -> None:
    """Raises: ValueError: sizes that do not divide."""
    from pipeline.benchmarks.measuring import in_fresh_process

    if args.quick:
        vars(args).update(QUICK)
    check_sizes(args)
    check_multiple(args, "tokens", "segment_length")
    hide_devices(args)
    be_alone()
    sizes = model_sizes(args, vocab=256)
    with tempfile.TemporaryDirectory(prefix="infini-bench-", dir=args.folder) as folder:
        found, where, note.device = in_fresh_process(_run, args, sizes, folder)
    report(found, args, where, note)
    _draw(note.picture("shares"), found)


def _run(args: argparse.Namespace, sizes, folder: str) -> tuple[Overhead, str, str | None]:
    """In a process of its own: a run leaves signal handlers and threads behind."""
    import contextlib
    import sys

    from model.device import device_name
    from pipeline.benchmarks.measuring import Progress
    from pipeline.benchmarks.overhead import measure

    device = choose_device(args)
    progress = Progress(0)
    with contextlib.redirect_stdout(sys.stderr):  # the run's own lines
        found = measure(
            folder,
            sizes,
            args.set,
            intervals=args.intervals,
            repeats=args.repeats,
            megabytes=args.megabytes,
            report=progress,
        )
    return found, machine_in_words(device, args.threads), device_name(device)


def report(found: Overhead, args: argparse.Namespace, where: str, note: Note) -> None:
    """Write the table, and its numbers."""
    note.text(
        f"A run of the trainer on a prepared set: {args.layers} layers, hidden size {args.hidden}, rule delta, "
        f"{found.tokens:,} tokens a step, float32, {where}; {len(found.step_s)} steps. Data: the wait for the next "
        f"window. Metrics: the monitor's time in every step, with what is written every {found.metrics_interval} "
        f"steps, and the statistics of the memory every {found.memory_interval} steps (what a step that computes them "
        "takes longer than those before and behind). Saves: the stall and what steps take longer while a checkpoint of "
        f"{found.checkpoint_bytes / 2**20:,.0f} MiB is written, as a share of a minute."
    )
    values = {"data": found.data_s, "metrics": found.metrics_s, "statistics": found.statistics_s}
    values |= {"save": found.save_s, "stall": found.stall_s, "write": found.write_s, "step": found.step_s}
    for name, seconds in values.items():
        note.number(f"{name}_time", "s", seconds)
    shares = shares_of(found)
    rows = []
    for name, share in shares.items():
        note.number("share", "1", share, cost=name)
        note.number("bound", "1", BOUNDS[name], cost=name)
        verdict = "yes" if share <= BOUNDS[name] else "NO"
        rows.append([name, f"{100 * share:.2f} %", f"{100 * BOUNDS[name]:g} %", verdict])
    note.table(["cost", "share of the time", "bound", "held"], rows)
    rows = [
        [name, *(f"{1e3 * x:,.2f}" for x in _middle(seconds)), str(len(seconds))] for name, seconds in values.items()
    ]
    note.table(["seconds of", "median ms", "least", "most", "times"], rows)


def _middle(seconds: list[float]) -> tuple[float, float, float]:
    from statistics import median

    return median(seconds), min(seconds), max(seconds)


def shares_of(found: Overhead) -> dict[str, float]:
    """By the names of `BOUNDS`."""
    return {"data": found.data_share, "metrics": found.metrics_share, "saves": found.save_share}


def _draw(path: Path, found: Overhead) -> None:
    from pipeline.figures import quiet, save_figure, titled_figure

    figure = titled_figure(6.0, 2.4, "housekeeping, share of the time")
    axes = figure.subplots()
    shares = shares_of(found)
    axes.barh(range(len(shares)), [100 * share for share in shares.values()], color="#9db7de")
    for place, (name, share) in enumerate(shares.items()):
        bound = 100 * BOUNDS[name]
        axes.plot([bound, bound], [place - 0.4, place + 0.4], color="#b04040")
        axes.annotate(f" {100 * share:.2f} %", (0, place), va="center", fontsize=8)
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()
    axes.set_xlabel("% (red: the bound)")
    quiet(axes)
    save_figure(figure, path)
