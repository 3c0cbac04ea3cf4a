"""Horizontal bars with quartiles, a panel for each group: the picture of benchmarks that compare rates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.ticker import EngFormatter, MaxNLocator

from pipeline.benchmarks.alternating import Spread
from pipeline.figures import break_lines, quiet, save_figure, titled_figure

LABEL_INCHES, POINTS = 1.6, 8


def draw_bars(path: Path, title: str, panels: Mapping[str, Mapping[str, Spread]], form: str = ",.0f") -> None:
    """Save a picture.

    Args:
        panels: by the panel's title, rates by what they belong to.
        form: of the medians, which stand beside the bars.
    """
    most = max(len(rates) for rates in panels.values())
    figure = titled_figure(5.0 * len(panels), 0.8 + 0.42 * most, title)
    for axes, (name, rates) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        places, spreads = range(len(rates)), list(rates.values())
        off = [[rate.median - rate.low for rate in spreads], [rate.high - rate.median for rate in spreads]]
        axes.barh(places, [rate.median for rate in spreads], xerr=off, color="#9db7de", ecolor="#333333", capsize=2)
        right = max(rate.high for rate in spreads)
        for place, rate in zip(places, spreads, strict=True):
            axes.annotate(f"{rate.median:{form}}", (rate.high + 0.02 * right, place), va="center", fontsize=POINTS)
        axes.set_xlim(0, 1.25 * right)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.tick_params(axis="x", labelsize=POINTS)
        axes.set_yticks(places, [break_lines(label, LABEL_INCHES, POINTS, 3) for label in rates], fontsize=POINTS)
        axes.invert_yaxis()
        axes.set_title(name, fontsize=10)
        quiet(axes)
    save_figure(figure, path)
