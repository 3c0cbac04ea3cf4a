"""Figures whose texts fit: titles and legends are broken into lines, and the figure grows by what they take.

Names come from users: runs, folders, specs of tasks. Matplotlib neither breaks nor shrinks a text, and lets it run out
of the picture. No text is read as mathematics, whatever `$` it holds.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text
from matplotlib.textpath import TextToPath

from data.files import writing

DPI = 130
TITLE_POINTS, TEXT_POINTS = 12, 10
MARGIN_INCHES = 0.15
LINE = 1.25
"""Height of a line in font sizes."""
TITLE_LINES, LABEL_LINES = 6, 3
"""A longer text loses its middle: what tells names apart stands at their ends more often than not."""
PIECE = re.compile(r"[^\s/_,=.\-]*[\s/_,=.\-]+|[^\s/_,=.\-]+")
"""Where a text may be broken: behind blanks and what joins the parts of a name."""
HANDLE_INCHES = 0.6
"""The sign before a legend's label, and the gap behind it."""


@functools.lru_cache(maxsize=4096)
def text_inches(text: str, points: float) -> float:
    """The width of a line."""
    width, _, _ = TextToPath().get_text_width_height_descent(text, FontProperties(size=points), ismath=False)
    return 1.03 * width / 72  # the rasterised font is a little wider


def break_lines(text: str, inches: float, points: float, most: int) -> str:
    """`text` in lines that are no wider than `inches`, at most `most` for each of its own lines."""
    return "\n".join(line for part in text.split("\n") for line in _broken(part, inches, points, most))


def _broken(text: str, inches: float, points: float, most: int) -> list[str]:
    inches -= text_inches("…", points)
    lines = [""]
    for piece in PIECE.findall(text):
        if text_inches(lines[-1] + piece.rstrip(), points) <= inches:
            lines[-1] += piece
            continue
        if text_inches(piece.rstrip(), points) <= inches:
            lines.append(piece)
            continue
        for character in piece:
            if text_inches(lines[-1] + character, points) > inches:
                lines.append("")
            lines[-1] += character
    lines = [line.rstrip() for line in lines]
    if len(lines) > most:
        head, tail = lines[: most - most // 2], lines[-(most // 2) :] if most > 1 else []
        head[-1] += "…"
        lines = head + tail
    return lines or [""]


def lines_inches(text: str, points: float) -> float:
    """The height of a text of some lines."""
    return (1 + text.count("\n")) * LINE * points / 72


class Legend:
    """A legend below the plot, in as many columns as its labels leave room for."""

    def __init__(self, labels: Sequence[str], width: float) -> None:
        room = width - 2 * MARGIN_INCHES - HANDLE_INCHES
        # Matplotlib leaves out what begins with an underscore.
        visible = [f" {label}" if label.startswith("_") else label for label in labels]
        self.labels = [break_lines(label, room, TEXT_POINTS, LABEL_LINES) for label in visible]
        self.columns = next(n for n in range(len(labels), 0, -1) if n == 1 or self._width(n) <= width)
        columns = self._in_columns(self.columns)
        self.inches = max(sum(lines_inches(label, TEXT_POINTS) + 0.07 for label in column) for column in columns) + 0.1

    def _in_columns(self, count: int) -> list[list[str]]:
        """The labels as Matplotlib shares them out over columns: the first ones have one more where it does not come
        out even."""
        rows, longer = divmod(len(self.labels), count)
        ends = itertools.accumulate(rows + (column < longer) for column in range(count))
        return [self.labels[first:last] for first, last in itertools.pairwise([0, *ends])]

    def _width(self, count: int) -> float:
        """Of a legend of so many columns."""
        total = 2 * MARGIN_INCHES
        for column in self._in_columns(count):
            lines = "\n".join(column).split("\n")
            total += max(text_inches(line, TEXT_POINTS) for line in lines) + HANDLE_INCHES + 0.3
        return total

    def draw(self, figure: Figure, handles: Sequence[Artist]) -> None:
        """`handles` in the order of the labels."""
        legend = figure.legend(
            handles, self.labels, loc="outside lower center", ncols=self.columns, frameon=False, fontsize=TEXT_POINTS
        )
        for text in legend.get_texts():
            text.set_parse_math(False)


def titled_figure(width: float, height: float, title: str, legend: Legend | None = None) -> Figure:
    """A figure whose plots have `width` x `height` inches, and above them its title."""
    title = break_lines(title, width - 2 * MARGIN_INCHES, TITLE_POINTS, TITLE_LINES)
    height += lines_inches(title, TITLE_POINTS) + (legend.inches if legend else 0.0)
    figure = Figure(figsize=(width, height), layout="constrained")
    plain(figure.suptitle(title, fontsize=TITLE_POINTS))
    return figure


def plain(text: Text) -> Text:
    """A text that is what it says."""
    text.set_parse_math(False)
    return text


def show_some_ticks(axes: Axes, places: Sequence[float], labels: Sequence[str], points: float = TEXT_POINTS) -> None:
    """Ticks of the x axis at `places`, ascending, with those of the labels that have room beside each other."""
    figure = axes.get_figure()
    low, high = (float(x) for x in axes.get_xlim())
    transform = axes.get_xaxis().get_transform()
    scaled = transform.transform(np.array([low, high, *places]))
    # The axis is narrower than the figure by what stands beside it.
    room = 0.75 * figure.get_figwidth()
    at = (scaled[2:] - scaled[0]) / (scaled[1] - scaled[0]) * room
    shown, end = [], -np.inf
    for place, label in zip(at, labels, strict=True):
        half = max(text_inches(line, points) for line in label.split("\n")) / 2
        if fits := place - half > end:
            end = place + half + 0.08
        shown.append(label if fits else "")
    axes.set_xticks(list(places), shown, fontsize=points)


def save_figure(figure: Figure, path: str | Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as file:
        figure.savefig(file, format="png", dpi=DPI)


def quiet(axes: Axes) -> None:
    """A pale grid, and no frame above and on the right."""
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
