"""PNG plots of a run and its evaluations. Every file is written whole; nothing here needs a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from pipeline.figures import (
    TEXT_POINTS,
    Legend,
    break_lines,
    plain,
    save_figure,
    show_some_ticks,
    titled_figure,
)
from pipeline.reporting.metrics import RESERVED_NAMES, layer_metric, layer_name, read_metrics

GATE_BINS = 20
SMOOTH_FROM_POINTS = 60
"""Curves with more points get a running mean over a twentieth of them, drawn over the pale original."""
CELL_TEXT_UP_TO = 22
"""Columns of a heat map up to which its cells carry their number."""
LEGEND_UP_TO = 8
"""Layers (or other members of a family) up to which each has its own entry in a legend; more get a colour bar."""

Series = dict[str, tuple[np.ndarray, np.ndarray]]
"""Per curve its steps and its values."""


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
        _quiet(axes)
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
) -> None:
    """Plot exact match against length, number of pairs or the like, one curve per control or run.

    Args:
        path: PNG file to write.
        curves: per name its points, with 95 % intervals where both ends are known.
        title: what was evaluated.
        xlabel: what x is.
        sizes: x is in tokens, shown as 4K, 1M (powers of 1024).
        logarithmic: the scale of x.
        marks: places on x with what is special about them, drawn where the points reach so far.
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
    axes.set(ylabel="exact match (bars: 95 % interval)", ylim=(-0.04, 1.04))
    plain(axes.set_xlabel(break_lines(xlabel, 6.5, TEXT_POINTS, 2)))
    legend.draw(figure, handles)
    _quiet(axes)
    save_figure(figure, path)


def training_curves(path: str | Path, metrics_jsonl: str | Path) -> None:
    """Plot what a run's `metrics.jsonl` holds: losses, learning rates, gradient norm, tokens per second, and of every
    layer the gates, the memory's part of the output and the size of the memory.

    Panels without data are left out. Metrics go by the names in `pipeline.reporting.metrics`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds none of these metrics, or a broken line.
    """
    series = _series(metrics_jsonl)
    panels = [
        Panel("loss", "nats per token", _named(series, "loss/")),
        Panel(
            "loss by segment of the document", "nats per token", _named(series, "loss_by_segment/"), family="segment"
        ),
        Panel("learning rate", "", _named(series, "optimizer/learning_rate"), smooth=False),
        Panel("gradient norm", "", _named(series, "optimizer/gradient_norm"), scale="log"),
        Panel("throughput", "tokens per second", _named(series, "speed/tokens_per_s"), bottom=0.0),
        Panel("mixing gate, sigmoid(beta)", "mean over heads", _layers(series, "mix_gate"), family="layer"),
        Panel("memory's part of the output", "share", _layers(series, "share_of_output"), family="layer"),
        Panel("write gate", "mean over tokens", _layers(series, "write_gate"), family="layer"),
        Panel("norm of M", "", _layers(series, "norm_M"), family="layer", scale="log"),
    ]
    panels = [panel for panel in panels if panel.curves]
    if not panels:
        raise ValueError(f"{metrics_jsonl} holds no metric to plot")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.6 * columns, 3.0 * rows), layout="constrained")
    for index, panel in enumerate(panels):
        _draw_panel(figure, figure.add_subplot(rows, columns, index + 1), panel)
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


@dataclass
class Panel:
    """One of the plots of `training_curves`."""

    title: str
    unit: str
    curves: Series
    family: str | None = None
    """What the curves are members of, in order (layers, segments); None for curves that differ in kind."""
    smooth: bool = True
    scale: str = "linear"
    bottom: float | None = None
    """Where the y axis begins: noise of a few percent should not fill the panel."""


def _series(metrics_jsonl: str | Path) -> Series:
    """Every scalar of the file, NaN where the value was not finite."""
    points: dict[str, list[tuple[int, float]]] = {}
    for record in read_metrics(metrics_jsonl):
        for name, value in record.items():
            if name in RESERVED_NAMES or isinstance(value, list | dict | str):
                continue
            if of_layer := layer_metric(name):
                name = layer_name(*of_layer)  # a run that began under the first version goes on in one curve
            points.setdefault(name, []).append((record["step"], np.nan if value is None else value))
    return {name: tuple(np.array(pairs, dtype=np.float64).T) for name, pairs in points.items()}


def _named(series: Series, prefix: str) -> Series:
    """The series whose names begin so, under the last part of their names, numbered ones in order."""
    found = {name.rpartition("/")[2]: points for name, points in series.items() if name.startswith(prefix)}
    return dict(sorted(found.items(), key=lambda item: _leading_number(item[0])))


def _layers(series: Series, quantity: str) -> Series:
    """The series of a quantity under the number of their layer, in its order."""
    found = {}
    for name, points in series.items():
        of_layer = layer_metric(name)
        if of_layer is not None and of_layer[0] == quantity:
            found[of_layer[1]] = points
    return {str(layer): found[layer] for layer in sorted(found)}


def _leading_number(name: str) -> int:
    digits = name[: len(name) - len(name.lstrip("0123456789"))]
    return int(digits) if digits else 0


def _draw_panel(figure: Figure, axes: Axes, panel: Panel) -> None:
    names = list(panel.curves)
    if panel.family is None:
        colors = [f"C{index}" for index in range(len(names))]
        labels = [name.replace("_", " ") for name in names]
    else:
        colors = list(colormaps["viridis"](np.linspace(0.0, 0.92, len(names))))  # dark the first, bright the last
        labels = [f"{panel.family} {name}" for name in names]
    for name, label, color in zip(names, labels, colors, strict=True):
        steps, values = panel.curves[name]
        smooth = panel.smooth and len(steps) >= SMOOTH_FROM_POINTS
        if smooth:
            if panel.family is None:
                axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            values = _running_mean(values, len(steps) // 20)
        axes.plot(steps, values, color=color, label=label, linewidth=1.4, marker="." if len(steps) == 1 else None)
    if panel.family is not None and len(names) > LEGEND_UP_TO:
        mappable = ScalarMappable(Normalize(0, (len(names) - 1) / 0.92), "viridis")
        bar = figure.colorbar(mappable, ax=axes, label=panel.family)
        bar.ax.set_ylim(0, len(names) - 1)
        ticks = range(0, len(names), -(-len(names) // 6))
        bar.set_ticks(list(ticks), labels=[names[tick] for tick in ticks])
    elif len(names) > 1:
        # Beside the curves, where it hides none.
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)
    axes.set(title=panel.title, xlabel="step", ylabel=panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if panel.scale == "log" and any((values > 0).any() for _, values in panel.curves.values()):
        axes.set_yscale("log")
    if panel.bottom is not None:
        axes.set_ylim(bottom=panel.bottom)
    _quiet(axes)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over a centred window, cut off at both ends; values that are NaN do not count."""
    known = np.isfinite(values)
    kernel = np.ones(2 * (width // 2) + 1)
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    number = np.convolve(known.astype(np.float64), kernel, mode="same")
    return np.divide(total, number, out=np.full(len(values), np.nan), where=number > 0.5)


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


def _quiet(axes: Axes) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
