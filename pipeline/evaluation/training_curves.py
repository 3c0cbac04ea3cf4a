"""PNG plot of how a run trained: what its `metrics.jsonl` holds, over the steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.figures import quiet, save_figure
from pipeline.reporting.evaluation_metrics import SHORT_WAYS, parse
from pipeline.reporting.metrics import RESERVED_NAMES, layer_metric, layer_name, read_metrics

SMOOTH_FROM_POINTS = 60
"""Curves with more points get a running mean over a twentieth of them, drawn over the pale original."""
LEGEND_UP_TO = 8
"""Layers (or other members of a family) up to which each has its own entry in a legend; more get a colour bar."""

Series = dict[str, tuple[np.ndarray, np.ndarray]]
"""Per curve its steps and its values."""


def training_curves(path: str | Path, metrics_jsonl: str | Path) -> bool:
    """Plot what a run's `metrics.jsonl` holds: losses, learning rates, gradient norm, tokens per second, and of every
    layer the gates, the memory's part of the output and the size of the memory.

    Panels without data are left out. Metrics go by the names in `pipeline.reporting.metrics`.

    Returns:
        False where it holds none of these metrics yet; nothing is written then.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds a broken line.
    """
    series = _series(metrics_jsonl)
    panels = [
        Panel("loss", "nats per token", _named(series, "loss/")),
        Panel("loss by set", "nats per token", _named(series, "loss_by_set/")),
        *_evaluations(series),
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
    if not any(panel.curves for panel in panels):
        return False
    _draw(path, panels)
    return True


def evaluation_curves(path: str | Path, series: Series) -> None:
    """Plot what evaluations have found over the steps.

    Args:
        series: by the names of `pipeline.evaluation.scalars`.
    """
    _draw(path, _evaluations(series))


def _evaluations(series: Series) -> list[Panel]:
    losses, right = {}, {}
    for name, points in series.items():
        if found := parse(name):
            curves = losses if found.is_loss else right
            curves[f"{found.what}, {SHORT_WAYS[found.way]}"] = points
    if len(right) > LEGEND_UP_TO:
        right = {name: points for name, points in right.items() if name.endswith(", on")}
    return [
        Panel("held-out loss", "nats per token", losses, smooth=False),
        Panel("questions answered right", "share", right, smooth=False, bottom=0.0),
    ]


def _draw(path: str | Path, panels: list[Panel]) -> None:
    panels = [panel for panel in panels if panel.curves]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.6 * columns, 3.0 * rows), layout="constrained")
    for index, panel in enumerate(panels):
        _draw_panel(figure, figure.add_subplot(rows, columns, index + 1), panel)
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
    quiet(axes)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over a centred window, cut off at both ends; values that are NaN do not count."""
    known = np.isfinite(values)
    kernel = np.ones(2 * (width // 2) + 1)
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    number = np.convolve(known.astype(np.float64), kernel, mode="same")
    return np.divide(total, number, out=np.full(len(values), np.nan), where=number > 0.5)
