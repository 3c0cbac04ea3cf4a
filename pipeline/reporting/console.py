"""What rank 0 prints: tables before training, one line or a progress bar during it.

In a terminal the bar is redrawn in place; elsewhere (a log file, a pipe) every report is a plain line of its own,
without colours, so that a log can be searched.
"""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from pipeline.reporting.console_file import ConsoleFile

PLAIN_INTERVAL_S = 15.0
"""Outside a terminal `progress` prints a line at most this often."""
LOG_WIDTH = 160
"""Columns outside a terminal: lines are not broken there."""


def format_count(number: float) -> str:
    """A large number with three digits and a decimal unit: 8.03 B, 134 M, 512."""
    for scale, unit in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= 0.9995 * scale:
            return f"{_three_digits(number / scale)} {unit}"
    return f"{number:g}" if number == int(number) else _three_digits(number)


def format_bytes(number: float) -> str:
    """Bytes with a binary unit: 1.25 GiB, 16.1 MiB."""
    for scale, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(number) >= 0.9995 * scale:
            return f"{_three_digits(number / scale)} {unit}"
    return f"{number:.0f} B"


def format_duration(seconds: float) -> str:
    """Seconds as 8s, 3m12s, 5h07m or 2d03h; `?` when not known."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole % 86400 // 3600, whole % 3600 // 60
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    if minutes:
        return f"{minutes}m{whole % 60:02d}s"
    return f"{whole}s"


def _three_digits(number: float) -> str:
    size = abs(number)
    return f"{number:.0f}" if size >= 99.95 else f"{number:.1f}" if size >= 9.995 else f"{number:.2f}"


FIELDS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("loss/train", lambda value: f"loss {value:.4f}"),
    ("loss/answer", lambda value: f"answer {value:.4f}"),
    ("loss/probe", lambda value: f"probe {value:.4f}"),
    ("optimizer/learning_rate", lambda value: f"lr {value:.1e}"),
    ("optimizer/gradient_norm", lambda value: f"grad {value:.3g}"),
    ("speed/tokens_per_s", lambda value: f"{value:,.0f} tok/s"),
    ("data/padded_share", lambda value: f"padded {100 * value:.3g} %"),
    ("speed/mfu", lambda value: f"mfu {100 * value:.3g} %"),
    ("system/process_bytes", lambda value: f"mem {format_bytes(value)}"),
    ("system/device_allocated_bytes", lambda value: f"device {format_bytes(value)}"),
)
"""The metrics that a line shows, in this order, those of them that are given."""

BAR_FIELDS = ("loss/train", "loss/answer", "loss/probe", "speed/tokens_per_s")
"""Those that a bar shows: with bar and time left they fit a terminal of 100 columns."""


def format_values(values: Mapping[str, float], names: Collection[str]) -> list[str]:
    """The parts of a console line: of the metrics called `names` those that `values` has, in the order of `FIELDS`."""
    return [show(values[name]) for name, show in FIELDS if name in names and name in values]


class Eta:
    """Seconds that are left, from the pace since the first report.

    The time before the first report does not count, since it holds first allocations and compilation; only that report
    itself has nothing else to go by.

    Args:
        total: units of work.
        clock: a monotonic clock in seconds.
        done: what was done before.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.perf_counter, done: int = 0) -> None:
        self._total = total
        self._clock = clock
        self._done = done
        self.begin()

    def begin(self) -> None:
        """Work begins now, not when the object was made."""
        self._start = (self._done, self._clock())
        self._first: tuple[int, float] | None = None

    def update(self, done: int) -> float:
        """Seconds from now to the end with `done` of the total; NaN until there is a pace."""
        now = self._clock()
        if self._first is None and done > self._done:
            self._first = (done, now)
        since_done, since = self._first if self._first is not None and done > self._first[0] else self._start
        if done <= since_done:
            return 0.0 if done >= self._total else math.nan
        return (now - since) / (done - since_done) * (self._total - done)


class RunConsole:
    """Console of a training run, on rank 0 only. Use it as a context manager, or call `close`.

    Args:
        total_steps: steps of the whole run.
        start_step: steps that were done before (a resumed run).
        file: gets all lines as well, plain ones even where a terminal shows a bar.
        console: where to print; None is standard output.
        clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        file: ConsoleFile | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._console = console or make_console()
        self._clock = clock
        self._file = file
        self._total = total_steps
        self._eta = Eta(total_steps, clock, start_step)
        self._bar = None
        if _redraws(self._console):
            self._bar = _make_bar(self._console, TextColumn("{task.fields[status]}", markup=False))
            self._task = self._bar.add_task("step", total=total_steps, completed=start_step, status="")
            self._bar.start()

    def begin(self) -> None:
        """The first step begins now."""
        self._eta.begin()

    def first_step(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Say that training goes, when the first step of this process is done."""
        left = format_duration(self._eta.update(step))
        parts = [f"step {step}/{self._total}", *format_values(values, dict(FIELDS)), f"took {seconds:.3g} s"]
        self.message("  ".join([*parts, f"eta {left} at this pace (the first step is slow)"]))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Report after `step` steps: loss, rate, time left. `values` may hold more metrics than a line shows."""
        eta = f"eta {format_duration(self._eta.update(step))}"
        line = "  ".join([f"step {step}/{self._total}", *format_values(values, dict(FIELDS)), eta])
        if self._bar is None:
            self.message(line)
            return
        status = "  ".join([*format_values(values, BAR_FIELDS), eta])
        self._bar.update(self._task, completed=step, status=status, refresh=True)
        self._write(line)

    def message(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        _print_line(self._console, text)
        self._write(text)

    def table(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        """Print a table, see `print_table`."""
        print_table(title, rows, console=self._console)
        with io.StringIO() as text:
            print_table(title, rows, console=Console(file=text, highlight=False, width=LOG_WIDTH))
            self._write(text.getvalue())

    def _write(self, text: str) -> None:
        if self._file is not None:
            self._file.write(text)

    @contextmanager
    def beside(self, total: int, description: str) -> Iterator[Callable[..., None]]:
        """The progress of something that the run does between two steps: as `progress` shows it, without a word when
        that is short. What comes of it is told otherwise."""
        if self._bar is None:
            yield _PlainProgress(self._console, total, description, self._clock)
            return
        task = self._bar.add_task(description, total=total, status="")
        try:
            yield lambda count=1: self._bar.update(task, advance=count)
        finally:
            self._bar.remove_task(task)

    def close(self) -> None:
        """Leave the bar as it stands and give the terminal back."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> RunConsole:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextmanager
def progress(
    total: int,
    description: str,
    *,
    console: Console | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Callable[..., None]]:
    """Show the progress of `total` units of work.

    Yields `advance(count=1)`, to be called as work gets done. In a terminal a bar; elsewhere a line every
    `PLAIN_INTERVAL_S` seconds and one at the end.
    """
    console = console or make_console()
    if _redraws(console):
        with _make_bar(console, TextColumn("eta {task.fields[eta]}", markup=False)) as bar:
            eta = Eta(total, clock)
            task = bar.add_task(description, total=total, eta="?")
            eta.update(0)

            def advance(count: int = 1) -> None:
                done = int(bar.tasks[task].completed) + count
                bar.update(task, completed=done, eta=format_duration(eta.update(done)))

            yield advance
        return

    plain = _PlainProgress(console, total, description, clock)

    def advance_plain(count: int = 1) -> None:
        plain(count)
        if plain.done >= total:
            _print_line(console, f"{description} {plain.done}/{total}  took {format_duration(plain.elapsed_s)}")

    yield advance_plain


class _PlainProgress:
    """Progress where nothing can be redrawn: a line every `PLAIN_INTERVAL_S` seconds, until all is done."""

    def __init__(self, console: Console, total: int, description: str, clock: Callable[[], float]) -> None:
        self._console, self._total, self._description, self._clock = console, total, description, clock
        self._start = self._last = clock()
        self._eta = Eta(total, clock)
        self._eta.update(0)
        self.done = 0

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._start

    def __call__(self, count: int = 1) -> None:
        self.done += count
        now = self._clock()
        if self.done < self._total and now - self._last >= PLAIN_INTERVAL_S:
            self._last = now
            eta = format_duration(self._eta.update(self.done))
            _print_line(self._console, f"{self._description} {self.done}/{self._total}  eta {eta}")


def print_table(
    title: str, rows: Sequence[Sequence[str]], *, header: Sequence[str] = (), console: Console | None = None
) -> None:
    """Print rows of cells as an aligned table under a title: the first column to the left, the others to the right.

    Args:
        title: a line above the table.
        rows: cells, all rows of one length.
        header: names of the columns; none by default.
        console: where to print; None is standard output.
    """
    console = console or make_console()
    table = Table(box=None, show_header=bool(header), pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for index in range(len(rows[0]) if rows else len(header)):
        name = header[index] if header else ""
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # brackets in a cell are text, not markup
    console.print()
    _print_line(console, title, style="bold")
    console.print(table)


def make_console() -> Console:
    """Standard output: as wide as the terminal, or `LOG_WIDTH` where there is none."""
    console = Console(file=sys.stdout, highlight=False)
    return console if console.is_terminal else Console(file=sys.stdout, highlight=False, width=LOG_WIDTH)


def _redraws(console: Console) -> bool:
    """Whether a bar can be redrawn in place."""
    return console.is_terminal and not console.is_dumb_terminal


def _make_bar(console: Console, last_column: TextColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        last_column,
        console=console,
    )


def _print_line(console: Console, text: str, style: str | None = None) -> None:
    # Square brackets in paths and messages are text, not markup; a long line is not broken.
    console.print(text, style=style, markup=False, soft_wrap=True)
