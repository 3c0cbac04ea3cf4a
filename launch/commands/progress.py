"""How far long work is: a bar with rate and time left in a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_PLAIN_INTERVAL_S = 10.0

Shown = Callable[[str, int, int, int], None]
"""Called with (phase, done, in all, tokens so far); 0 in all: there is no telling."""
MEGABYTES = (1e6, "MB")


@contextmanager
def progress(units: Mapping[str, tuple[float, str]] | None = None) -> Iterator[Shown]:
    """Show phases on the standard error output.

    Args:
        units: by phase, what is counted: how many make one, and its name. Bytes, shown in MB, where it is not given.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    units = units or {}
    console = Console(stderr=True)
    started: dict[str, float] = {}
    if not console.is_terminal:
        printed = time.perf_counter()

        def report_line(phase: str, done: int, total: int, tokens: int) -> None:
            nonlocal printed
            now = time.perf_counter()
            # A phase that cannot tell how far it is says so at once, and nothing more.
            printed = printed if total or phase in started else float("-inf")
            began = started.setdefault(phase, now)
            if now - printed >= _PLAIN_INTERVAL_S:
                printed = now
                left = (now - began) * (total - done) / done if done else 0.0
                if not total:
                    console.print(f"{phase} ...", highlight=False)
                    return
                size, unit = units.get(phase, MEGABYTES)
                form = ",.1f" if size > 1 else ",.0f"
                so_far = f"{done / size:{form}}/{total / size:{form}} {unit}" + (
                    f"  {tokens:,} tokens" if tokens else ""
                )
                console.print(f"{phase}  {so_far}  {left:,.0f} s left", highlight=False)

        yield report_line
        return

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report_bar(phase: str, done: int, total: int, tokens: int) -> None:
            if phase not in tasks:
                started[phase] = time.perf_counter()
                for before in bars.tasks:
                    if before.total is None:  # it could not tell how far it was, but it is over
                        bars.update(before.id, total=1, completed=1)
                tasks[phase] = bars.add_task(phase, total=total or None, rate="")
            if not total:
                return
            elapsed = max(time.perf_counter() - started[phase], 1e-3)
            size, unit = units.get(phase, MEGABYTES)
            rate = f"{done / size / elapsed:,.1f} {unit}/s" + (f", {tokens / elapsed:,.0f} tokens/s" if tokens else "")
            bars.update(tasks[phase], completed=min(done, total), rate=rate)

        yield report_bar
