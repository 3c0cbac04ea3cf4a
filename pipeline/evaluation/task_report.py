"""Tables and plots of the synthetic tasks of an evaluation, of one run or several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.config import saved_shape
from pipeline.evaluation import plots
from pipeline.evaluation.scalars import label
from pipeline.reporting.console import print_table

Results = dict[str, Any]

BENCHMARK = "written, benchmark's score"


def short_name(spec: str) -> str:
    """A spec as part of a file's name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in spec)[:120].rstrip("_")


def score_points(facts: Results, control: str, x: str, measure: str = "exact_match") -> dict[str, list[plots.Score]]:
    """Exact match (or another measure) against the axis `x`: a curve per setting of the other swept axes."""
    others = [name for name in facts["swept"] if name != x]
    curves: dict[str, list[plots.Score]] = {}
    for cell in facts["cells"]:
        if cell["control"] == control and measure in cell:
            point = plots.Score(cell["settings"][x], cell[measure], *cell[f"{measure}_interval"], cell["answers"])
            curves.setdefault(label(cell["settings"], others), []).append(point)
    return curves


def capacity_marks(model: Results, x: str) -> dict[float, str]:
    """Where the axis of a capacity curve passes what a matrix of d x d can hold: d independent pairs per head."""
    if x not in ("pairs", "keys") or model["memory"]["rule"] == "none":
        return {}
    _, _, heads, dim = saved_shape(model)
    return {dim: f"d = {dim}: one head's rank", heads * dim: f"{heads} heads x d: a layer's"}


def plot_tasks(results: Results, folder: Path, way_names: dict[str, str]) -> dict[str, Path]:
    """Draw every task that has something to draw against; the files by the names they have in TensorBoard."""
    images = {}
    for spec, facts in results["tasks"].items():
        if not facts["swept"]:
            continue
        title = f"{results['name']}, step {results['step']}\n{spec}"
        target = folder / f"task_{short_name(spec)}.png"
        if facts["swept"] == ["length", "depth"]:
            lengths, depths = facts["axes"]["length"], facts["axes"]["depth"]
            on = {
                (cell["settings"]["length"], cell["settings"]["depth"]): cell["exact_match"]
                for cell in facts["cells"]
                if cell["control"] == "on"
            }
            grid = [[on.get((length, depth)) for length in lengths] for depth in depths]
            plots.passkey_heatmap(target, grid, lengths, depths, f"{title}\nexact match, memory on")
        else:
            x = facts["swept"][-1]
            several = len(facts["swept"]) > 1
            curves = {
                (way_names[control] if not several else name): points
                for control in facts["controls"]
                if not several or control == "on"
                for name, points in score_points(facts, control, x).items()
            }
            written = score_points(facts, "on", x, "benchmark_score")
            for name, points in written.items():
                curves[f"{BENCHMARK}, {name}" if several else BENCHMARK] = points
            marks = capacity_marks(results["config"]["model"], x)
            _draw(target, curves, title, x, marks, measure="exact match or score" if written else "exact match")
        images[f"task/{spec}"] = target
    return images


def show_tasks(results: Results, console: Any, way_names: dict[str, str]) -> None:
    """A table per task."""
    for spec, facts in results["tasks"].items():
        rows, scored = [], any("benchmark_score" in cell for cell in facts["cells"])
        for cell in facts["cells"]:
            between = _between(cell["exact_match_interval"])
            name = label(cell["settings"]) if cell["control"] == facts["controls"][0] else ""
            exact, tokens = f"{cell['exact_match']:.3f}", f"{cell['token_accuracy']:.3f}"
            row = [name, way_names[cell["control"]], str(cell["answers"]), exact, between, tokens]
            if scored:
                own = "benchmark_score" in cell
                row += [f"{cell['benchmark_score']:.3f}" if own else "-"]
                row += [_between(cell["benchmark_score_interval"]) if own else "-"]
            rows.append(row)
        header = ["", "", "n", "exact", "95 %", "tokens", *(["benchmark", "95 %"] if scored else [])]
        print_table(spec, rows, header=header, console=console)


def _between(interval: Sequence[float | None]) -> str:
    low, high = interval
    return "-" if low is None else f"{low:.3f} to {high:.3f}"


def compare_tasks(names: list[str], results: list[Results], folder: Path, way_names: dict[str, str]) -> list[list[str]]:
    """Rows of the table side by side, and a plot per task that all runs have: one curve per run, memory on."""
    rows = []
    for spec, facts in results[0]["tasks"].items():
        runs = [other["tasks"].get(spec) for other in results]
        if any(run is None for run in runs):
            continue
        for cell in facts["cells"]:
            found = [_same(cell, run) for run in runs]
            texts = ["-" if value is None else f"{value:.2f}" for value in found]
            rows.append([f"{facts['task']} {label(cell['settings'])}, {way_names[cell['control']]}", *texts])
        if len(facts["swept"]) == 1:
            (x,) = facts["swept"]
            curves = {name: points for name, run in zip(names, runs, strict=True) for points in _on(run, x)}
            target = folder / f"comparison_task_{short_name(spec)}.png"
            marks = [capacity_marks(other["config"]["model"], x) for other in results]
            of_all = [own for own in marks if own]
            _draw(target, curves, spec, x, of_all[0] if of_all and all(own == of_all[0] for own in of_all) else {})
    return rows


def _draw(
    target: Path,
    curves: dict[str, list[plots.Score]],
    title: str,
    x: str,
    marks: dict[float, str],
    *,
    measure: str = "exact match",
) -> None:
    scale = {"sizes": x == "length", "logarithmic": x != "depth"}
    plots.score_curves(target, curves, title, xlabel=x, marks=marks, measure=measure, **scale)


def _on(facts: Results, x: str) -> list[list[plots.Score]]:
    return list(score_points(facts, "on", x).values())


def _same(cell: Results, other: Results) -> float | None:
    matches = (
        found["exact_match"]
        for found in other["cells"]
        if (found["settings"], found["control"]) == (cell["settings"], cell["control"])
    )
    return next(matches, None)
