"""PNG plots of evaluations. Every file is written whole; nothing here needs a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from pipeline.figures import TEXT_POINTS, Legend, break_lines, plain, quiet, save_figure, show_some_ticks, titled_figure

GATE_BINS = 20
CELL_TEXT_UP_TO = 22
"""Columns of a heat map up to which its cells carry their number."""


class Score(NamedTuple):
    """A share in 0..1 at some x, with its interval and the number of answers behind it."""

    x: float
    value: float
    low: float | None
    high: float | None
    answers: int


Curve = tuple[Sequence[float | None], Sequence[float | None] | None, Sequence[int]]
"""Means, half widths of the confidence interval or None, and the number of documents, all by segment index."""


def loss_by_segment(path: str | Path, curves: Mapping[str, Curve], title: str) -> None:
    """Plot the mean loss at each segment of the documents, one curve for each way to evaluate (memory on, off, ...).

    Below it, how many documents reach each segment: the right end of a curve often rests on few.

    Args:
        path: PNG file to write.
        curves: per name the means (nats per token; None or NaN where there is no document), the half widths of
            their 95 % intervals or None, and the documents behind each.
        title: what was evaluated.
    """
    legend = Legend(list(curves), 8)
    figure = titled_figure(8, 5.0, title, legend)
    grid = figure.add_gridspec(2, 1, height_ratios=(4, 1))
    upper = figure.add_subplot(grid[0])
    lower = figure.add_subplot(grid[1], sharex=upper)
    same_counts = len({tuple(counts) for _, _, counts in curves.values()}) == 1
    for index, (name, (means, widths, counts)) in enumerate(curves.items()):
        color, mean, x = f"C{index}", _floats(means), np.arange(len(means))
        upper.plot(x, mean, color=color, label=name, linewidth=1.6, marker="o" if len(x) <= 40 else None, markersize=4)
        if widths is not None:
            width = _floats(widths)
            upper.fill_between(x, mean - width, mean + width, color=color, alpha=0.18, linewidth=0)
        if index == 0 or not same_counts:
            lower.step(x, counts, where="mid", color="0.35" if same_counts else color, linewidth=1.3)
    has_intervals = any(widths is not None and np.isfinite(_floats(widths)).any() for _, widths, _ in curves.values())
    upper.set(ylabel="loss (nats per token)" + ("\nband: 95 % interval" if has_intervals else ""))
    legend.draw(figure, upper.lines)
    upper.tick_params(labelbottom=False)
    lower.set(xlabel="segment index in the document", ylabel="documents")
    lower.set_ylim(0, 1.15 * max(1, *(max(counts, default=0) for _, _, counts in curves.values())))
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    lower.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
    for axes in (upper, lower):
        quiet(axes)
    save_figure(figure, path)


def passkey_heatmap(
    path: str | Path,
    grid: Sequence[Sequence[float | None]],
    lengths: Sequence[int | str],
    depths: Sequence[float],
    title: str,
) -> None:
    """Plot accuracy over document length and depth of the needle, red 0 to green 1.

    Args:
        path: PNG file to write.
        grid: accuracy in 0..1 as `grid[depth][length]`; None or NaN where nothing was measured (grey).
        lengths: of the documents; numbers are tokens and are shown as 512, 4K, 1M (powers of 1024).
        depths: where the needle stands, 0 (beginning) to 1 (end), in the order of the grid's rows.
        title: what was evaluated.

    Raises:
        ValueError: the grid is not `len(depths)` rows of `len(lengths)` cells.
    """
    values = np.array([_floats(row) for row in grid])
    if values.shape != (len(depths), len(lengths)):
        raise ValueError(f"grid is {values.shape}, must be depths x lengths, {len(depths)} x {len(lengths)}")
    width = min(16.0, max(4.5, 2.4 + 0.62 * len(lengths)))
    figure = titled_figure(width, min(14.0, max(2.2, 1.1 + 0.42 * len(depths))), title)
    axes = figure.add_subplot()
    colors = colormaps["RdYlGn"].with_extremes(bad="0.85")
    image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", cmap=colors, vmin=0.0, vmax=1.0)
    show_some_ticks(axes, range(len(lengths)), [_tokens(length) for length in lengths])
    every = -(-len(depths) // 40)
    axes.set_yticks(range(0, len(depths), every), [f"{100 * depth:g} %" for depth in depths[::every]])
    unit = " (tokens)" if all(isinstance(length, int) for length in lengths) else ""
    axes.set(xlabel=f"document length{unit}", ylabel="depth of the needle")
    if len(lengths) <= CELL_TEXT_UP_TO:
        _cell_texts(axes, values, image)
    figure.colorbar(image, ax=axes, label="accuracy", fraction=0.05, pad=0.02)
    save_figure(figure, path)


def score_curves(
    path: str | Path,
    curves: Mapping[str, Sequence[Score]],
    title: str,
    *,
    xlabel: str,
    sizes: bool = False,
    logarithmic: bool = True,
    marks: Mapping[float, str] | None = None,
    measure: str = "exact match",
) -> None:
    """Plot a score against length, number of pairs or the like, one curve per control or run.

    Args:
        path: PNG file to write.
        curves: per name its points, with 95 % intervals where both ends are known.
        title: what was evaluated.
        xlabel: what x is.
        sizes: x is in tokens, shown as 4K, 1M (powers of 1024).
        logarithmic: the scale of x.
        marks: places on x with what is special about them, drawn where the points reach so far.
        measure: what the score is.
    """
    legend = Legend(list(curves), 7.5)
    figure = titled_figure(7.5, 4.0, title, legend)
    axes = figure.add_subplot()
    handles = []
    answers: dict[float, set[int]] = {}
    for index, (name, points) in enumerate(curves.items()):
        aside = index - (len(curves) - 1) / 2  # curves that agree would hide one another
        x = [point.x * 2 ** (0.03 * aside) if logarithmic else point.x for point in points]
        value = [point.value for point in points]
        low = [point.value if point.low is None else point.low for point in points]
        high = [point.value if point.high is None else point.high for point in points]
        reach = np.abs(np.array([np.array(value) - low, np.array(high) - value]))
        style = {"color": f"C{index}", "marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.4}
        handles.append(axes.errorbar(x, value, yerr=reach, label=name, **style))
        for point in points:
            answers.setdefault(point.x, set()).add(point.answers)
    if logarithmic:
        axes.set_xscale("log", base=2)
    ticks = sorted(answers)
    for x, meaning in (marks or {}).items():
        if ticks[0] <= x <= ticks[-1]:
            axes.axvline(x, color="0.5", linestyle=":", linewidth=1.2)
            note = axes.annotate(
                break_lines(meaning, 2.5, 8, 2),
                (x, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(-3, -3),
                textcoords="offset points",
                rotation=90,
                ha="right",
                va="top",
                fontsize=8,
                color="0.4",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.6, "pad": 0.5},
            )
            plain(note)
    labels = [f"{_tokens(int(x)) if sizes else f'{x:g}'}\nn={max(answers[x])}" for x in ticks]
    show_some_ticks(axes, ticks, labels)
    axes.minorticks_off()
    axes.set(ylabel=f"{measure} (bars: 95 % interval)", ylim=(-0.04, 1.04))
    plain(axes.set_xlabel(break_lines(xlabel, 6.5, TEXT_POINTS, 2)))
    legend.draw(figure, handles)
    quiet(axes)
    save_figure(figure, path)


def gate_histogram(path: str | Path, values: Mapping[int, Sequence[float]], title: str) -> None:
    """Plot how the gates of each layer are distributed over 0..1: one row per layer, colour the share of its gates.

    Args:
        path: PNG file to write.
        values: per layer its gates (one per head, or one per token), all in 0..1, any shape.
        title: which gates.
    """
    edges = np.linspace(0.0, 1.0, GATE_BINS + 1)
    flat = {layer: np.asarray(gates, dtype=np.float64).ravel() for layer, gates in values.items()}
    counts = {layer: np.histogram(gates, bins=edges)[0] for layer, gates in flat.items()}
    _gate_rows(path, counts, {layer: float(gates.mean()) for layer, gates in flat.items()}, title)


def binned_gate_histogram(
    path: str | Path, counts: Mapping[int, Sequence[float]], means: Mapping[int, float], title: str
) -> None:
    """The same from counts per bin (equal bins over 0..1, the same number for every layer) and the means, which bins do
    not tell: a gate that is mostly 0 has a mean far below the middle of the first one."""
    _gate_rows(path, {layer: np.asarray(row, dtype=np.float64) for layer, row in counts.items()}, means, title)


def _gate_rows(path: str | Path, counts: Mapping[int, np.ndarray], means: Mapping[int, float], title: str) -> None:
    layers = sorted(counts)
    rows = np.stack([counts[layer] / max(counts[layer].sum(), 1) for layer in layers])
    bins = rows.shape[1]
    figure = titled_figure(7.5, min(14.0, max(2.2, 1.3 + 0.36 * len(layers))), title)
    axes = figure.add_subplot()
    image = axes.imshow(
        rows,
        aspect="auto",
        cmap="Blues",
        norm=PowerNorm(0.5, 0.0, 1.0),  # a spread of 5 % in each of 20 bins must be seen beside 100 % in one
        extent=(0, 1, len(layers) - 0.5, -0.5),
        interpolation="none",
    )
    # On the lower edge of the row, clear of the numbers.
    axes.plot([means[layer] for layer in layers], np.arange(len(layers)) + 0.38, "^", color="C1", markersize=6)
    if len(layers) <= CELL_TEXT_UP_TO:
        for y, row in enumerate(rows):
            for x, share in enumerate(row):
                if share >= 0.05:
                    color = "white" if share > 0.4 else "black"
                    axes.text(
                        (x + 0.5) / bins, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=color
                    )
    every = -(-len(layers) // 40)
    axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    numbers = "numbers: % of the layer's gates; " if len(layers) <= CELL_TEXT_UP_TO else ""
    axes.set(xlabel=f"gate ({numbers}triangle: mean)", ylabel="layer")
    figure.colorbar(image, ax=axes, label="share", fraction=0.05, pad=0.02, ticks=[0, 0.05, 0.2, 0.5, 1])
    save_figure(figure, path)


def _cell_texts(axes: Axes, values: np.ndarray, image: AxesImage) -> None:
    for (row, column), value in np.ndenumerate(values):
        if not np.isfinite(value):
            axes.text(column, row, "–", ha="center", va="center", fontsize=8, color="0.4")
            continue
        red, green, blue, _ = image.cmap(image.norm(value))
        color = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)


def _tokens(length: int | str) -> str:
    if isinstance(length, str):
        return length
    for scale, unit in ((1024**2, "M"), (1024, "K")):
        if length >= scale:
            return f"{length / scale:.3g}{unit}"
    return str(length)


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
