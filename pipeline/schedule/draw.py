"""Draws timelines of the pipeline, simulated or measured, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pipeline.figures import TITLE_LINES, TITLE_POINTS, break_lines, lines_inches, plain, save_figure
from pipeline.schedule.operations import Kind
from pipeline.schedule.simulate import Timeline

COLORS = {
    Kind.FORWARD: "#4c78a8",
    Kind.REPLAY: "#72b7b2",
    Kind.BACKWARD: "#f2a541",
    Kind.SEND_FORWARD: "#1b3a5c",
    Kind.SEND_BACKWARD: "#a63d2f",
}
NAMES = {
    Kind.FORWARD: "forward",
    Kind.REPLAY: "replay",
    Kind.BACKWARD: "backward",
    Kind.SEND_FORWARD: "send forward",
    Kind.SEND_BACKWARD: "send backward",
}
WIDTH_INCHES = 15.0
LABEL_INCHES = 0.075
"""A character of a label needs so much width; boxes that are narrower stay empty."""


def draw_timelines(path: str | Path, timelines: Sequence[tuple[str, Timeline]]) -> None:
    """Draw timelines below each other on one time axis: a row per stage, a box per computation, a bar per transfer.

    Boxes say microbatch.chunk where that fits.

    Args:
        path: PNG file to write.
        timelines: titles and timelines.
    """
    rows = [len(timeline.events) for _, timeline in timelines]
    longest_s = max(timeline.makespan_s for _, timeline in timelines)
    scale, unit = (1e3, "ms") if longest_s < 1 else (1.0, "s")
    titles = [_title(title, timeline, scale, unit) for title, timeline in timelines]
    height = 0.9 + sum(
        0.5 + lines_inches(title, TITLE_POINTS) + 0.55 * n for title, n in zip(titles, rows, strict=True)
    )
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    axes = figure.subplots(len(timelines), 1, sharex=True, squeeze=False, height_ratios=[0.5 + n for n in rows])[:, 0]
    kinds = {event.operation.kind for _, timeline in timelines for events in timeline.events for event in events}
    for ax, title, (_, timeline) in zip(axes, titles, timelines, strict=True):
        plain(ax.set_title(title, fontsize=TITLE_POINTS))
        _draw(ax, timeline, scale, inches_per_s=0.9 * WIDTH_INCHES / longest_s)
        ax.set_xlim(0, 1.005 * scale * longest_s)
    axes[-1].set_xlabel(f"time ({unit})")
    shown = [kind for kind in COLORS if kind in kinds]
    figure.legend(
        handles=[Patch(color=COLORS[kind], label=NAMES[kind]) for kind in shown],
        loc="outside lower right",
        ncols=len(shown),
        frameon=False,
    )
    save_figure(figure, path)


def _title(name: str, timeline: Timeline, scale: float, unit: str) -> str:
    numbers = f"{scale * timeline.makespan_s:.4g} {unit}, bubbles {100 * timeline.bubble_share:.1f} %"
    return break_lines(f"{name}: {numbers}", 0.85 * WIDTH_INCHES, TITLE_POINTS, TITLE_LINES)


def _draw(ax, timeline: Timeline, scale: float, inches_per_s: float) -> None:
    origin = min(event.start_s for events in timeline.events for event in events)
    for stage, events in enumerate(timeline.events):
        for operation, start_s, end_s in events:
            if operation.kind not in COLORS:
                continue
            send = operation.kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)
            bottom, height = (stage + 0.36, 0.1) if send else (stage - 0.36, 0.7)
            left, width = scale * (start_s - origin), scale * (end_s - start_s)
            color = COLORS[operation.kind]
            # A transfer of microseconds shows as a line of its own colour.
            edge = color if send else "white"
            ax.broken_barh(
                [(left, width)], (bottom, height), facecolor=color, edgecolor=edge, linewidth=0.4 + 0.4 * send
            )
            label = f"{operation.microbatch}.{operation.chunk}"
            if not send and (end_s - start_s) * inches_per_s > LABEL_INCHES * len(label):
                ax.text(
                    left + width / 2, stage, label, ha="center", va="center", fontsize=7, color="white", clip_on=True
                )
    ax.set_yticks(range(len(timeline.events)), [f"stage {stage}" for stage in range(len(timeline.events))])
    ax.set_ylim(len(timeline.events) - 0.5, -0.5)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.tick_params(left=False)
