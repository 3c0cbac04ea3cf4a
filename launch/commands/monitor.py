"""`infini monitor`: a run on one screen, live or ended, from what it has written."""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.arguments import number

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.reporting.run_view import RunView

PLAIN_WIDTH = 120
"""Columns outside of a terminal."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "monitor",
        help="watch a run: progress, loss, speed, slow ranks, the memory's health",
        description="Show a run on one screen, from its metrics.jsonl alone: progress and time left, loss, tokens per "
        "second, the slowest rank, the last checkpoint, evaluations, and the memory's numbers with what is healthy. "
        "In a terminal the screen is drawn anew until the run ends or Ctrl-C; a pipe gets it once, as plain text.",
    )
    parser.add_argument("folder", metavar="RUN", help="folder of a run, or a metrics.jsonl")
    parser.add_argument("--once", action="store_true", help="print and exit")
    parser.add_argument(
        "--refresh",
        type=number(0.1, 3600),
        default=2.0,
        metavar="SECONDS",
        help="between two looks at the run (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from pipeline.reporting.run_screen import screen
    from pipeline.reporting.run_view import RunView

    view = RunView(metrics_file(Path(args.folder)))
    view.update()
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    if console.is_terminal and not console.is_dumb_terminal and not args.once:
        _watch(view, console, args.refresh)
    with console.capture() as captured:
        console.print(screen(view, time.time()))
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))
    return 0


def metrics_file(path: Path) -> Path:
    """The `metrics.jsonl` of a run's folder, or the file itself.

    Raises:
        ValueError: there is none.
    """
    from pipeline.reporting.metrics import METRICS_FILE

    if path.is_file():
        return path
    if (path / METRICS_FILE).is_file():
        return path / METRICS_FILE
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: name the folder of a run, or its {METRICS_FILE}")
    runs = sorted(str(found.parent) for found in path.glob(f"*/{METRICS_FILE}"))
    raise ValueError(
        f"{path} holds no {METRICS_FILE}: no run has begun there"
        + (f"; runs in it: {', '.join(runs[:4])}{', ...' if len(runs) > 4 else ''}" if runs else "")
    )


def _watch(view: RunView, console: Console, refresh_s: float) -> None:
    """Draw the screen until the run ends, or whoever watches has seen enough."""
    from rich.live import Live

    from pipeline.reporting.run_screen import screen

    with contextlib.suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(screen(view, time.time()), refresh=True)
            if view.end is not None:
                return
            time.sleep(refresh_s)
            view.update()
