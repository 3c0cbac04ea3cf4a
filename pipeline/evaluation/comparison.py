"""Several evaluated runs side by side: one table, one plot for each set, and paired differences of the losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluation import plots, report, task_report
from pipeline.evaluation.intervals import ratio_intervals, resample_counts
from pipeline.evaluation.report import Results
from pipeline.evaluation.scalars import mean_over
from pipeline.reporting.console import make_console, print_table
from pipeline.reporting.set_names import set_names

COMPARISON = "comparison.json"
RUNS_PER_TABLE = 3
"""More do not fit beside their labels in a terminal: further tables show the first run again, and the next ones."""


def compare(results: list[Results], folder: Path) -> dict[str, Any]:
    """Print and write what several runs' results say next to one another; differences are against the first run.

    Raises:
        OSError: `folder` cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = run_names(results)
    common = [path for path in results[0]["perplexity"] if all(path in other["perplexity"] for other in results)]
    differences = {
        path: {
            name: loss_difference(results[0]["perplexity"][path], other["perplexity"][path], other["seed"])
            for name, other in zip(names[1:], results[1:], strict=True)
        }
        for path in common
    }
    notes = _notes(results)
    content = report.without_nan(
        {"runs": dict(zip(names, results, strict=True)), "loss_above_first": differences, "notes": notes}
    )
    for set_name, path in zip(set_names(common), common, strict=True):
        facts = [other["perplexity"][path] for other in results]
        curves = {name: report.curve(fact, "on") for name, fact in zip(names, facts, strict=True)}
        target = folder / f"comparison_loss_{set_name}.png"
        plots.loss_by_segment(target, curves, f"held-out loss, {path}")
        documents = facts[0]["by_segment_documents"]
        above = {
            name: report.curve_of(found, documents)
            for name, found in differences[path].items()
            if found and "by_segment" in found
        }
        if above:
            target = folder / f"comparison_loss_above_first_{set_name}.png"
            title = f"held-out loss above that of {names[0]}, paired by document, {path}"
            plots.loss_by_segment(target, above, title)
    report.write_json(folder / COMPARISON, content)
    console = make_console()
    rows = _rows(names, results, common, differences)
    rows += task_report.compare_tasks(names, results, folder, report.WAY_NAMES)
    for block in _blocks(len(names)):
        shown = [[row[0], *(row[1 + i] for i in block)] for row in rows]
        print_table("side by side", shown, header=["", *(names[i] for i in block)], console=console)
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(f"comparison in {folder}", markup=False, soft_wrap=True)
    return content


def _blocks(runs: int) -> list[list[int]]:
    """Which runs each table shows."""
    step = RUNS_PER_TABLE - 1
    return [[0, *range(first, min(first + step, runs))] for first in range(1, runs, step)]


def run_names(results: list[Results]) -> list[str]:
    """A different name for each: the run's own, its folder where several share that, numbered where it is the same."""
    names = [other["name"] for other in results]
    names = [other["run"] if names.count(name) > 1 else name for name, other in zip(names, results, strict=True)]
    return [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def loss_difference(first: dict[str, Any], other: dict[str, Any], seed: int) -> dict[str, Any] | None:
    """How much more `other` loses per token than `first`, paired by document; None unless the texts are the same.

    Returns:
        `loss`, `loss_interval` (95 %, bootstrap over documents); and where the texts fall into the same segments, the
        same over the later half of them as `later`, `later_interval`; `by_segment`, `by_segment_interval` (low ends,
        high ends).
    """

    def texts(facts: dict[str, Any]) -> list[tuple[str, int]]:
        return [(document["name"], document["tokens"]) for document in facts["each_document"]]

    if texts(first) != texts(other):
        return None
    tokens = np.array([document["tokens"] for document in first["each_document"]], dtype=np.float64)
    counts = resample_counts(len(tokens), seed)

    def mean(above: np.ndarray, weight: np.ndarray) -> tuple[float, list[float]]:
        return float(above.sum() / weight.sum()), ratio_intervals(above, weight, counts).tolist()

    weight, other_weight = (
        np.array([document["tokens_by_segment"] for document in facts["each_document"]], dtype=np.float64)
        for facts in (first, other)
    )
    if not np.array_equal(weight, other_weight):  # segments of another length
        losses, other_losses = (
            np.array([document["loss"]["on"] for document in facts["each_document"]]) for facts in (first, other)
        )
        return dict(zip(("loss", "loss_interval"), mean((other_losses - losses) * tokens, tokens), strict=True))

    def sums(facts: dict[str, Any]) -> np.ndarray:
        losses = [document["loss_by_segment"]["on"] for document in facts["each_document"]]
        return np.where(weight > 0, weight * np.array(losses, dtype=np.float64), 0.0)

    above = sums(other) - sums(first)

    def over(segments: slice) -> tuple[float, list[float]]:
        return mean(above[:, segments].sum(axis=1), weight[:, segments].sum(axis=1))

    (loss, loss_interval), (later, later_interval) = over(slice(None)), over(slice(weight.shape[1] // 2, None))
    return {
        "loss": loss,
        "loss_interval": loss_interval,
        "later": later,
        "later_interval": later_interval,
        "by_segment": (above.sum(axis=0) / weight.sum(axis=0)).tolist(),
        "by_segment_interval": ratio_intervals(above, weight, counts).tolist(),
    }


def _notes(results: list[Results]) -> list[str]:
    notes = []
    lengths = {other["config"]["model"]["segment_length"] for other in results}
    if len(lengths) > 1:
        notes.append(f"segments have different lengths ({', '.join(map(str, sorted(lengths)))} tokens)")
    if len({other["seed"] for other in results}) > 1:
        notes.append("evaluate.seed differs: the documents are not the same")
    return notes


def _signed(difference: dict[str, Any] | None, key: str) -> str:
    if difference is None or key not in difference:
        return "-"
    return f"{report.signed(difference[key])} ({report.interval(difference[f'{key}_interval'], plus=True)})"


def _rows(names: list[str], results: list[Results], common: list[str], differences: dict[str, Any]) -> list[list[str]]:
    models = [other["config"]["model"] for other in results]
    rows = [
        ["memory rule", *(model["memory"]["rule"] for model in models)],
        ["write gate", *(model["memory"]["write_gate"] for model in models)],
        ["step", *(f"{other['step']:,}" for other in results)],
        ["tokens trained on", *(f"{other['training_tokens']:,}" for other in results)],
    ]
    for path in common:
        facts = [other["perplexity"][path] for other in results]
        for way, label in report.WAY_NAMES.items():
            if any(way in fact["ways"] for fact in facts):
                found = [fact["ways"].get(way, {}).get("loss") for fact in facts]
                rows.append([f"{path}: loss, {label}", *map(report.number, found)])
        later = [
            mean_over(
                fact["ways"]["on"]["by_segment"], fact["by_segment_tokens"], (len(fact["by_segment_tokens"]) // 2, None)
            )
            for fact in facts
        ]
        rows.append([f"{path}: loss, later half of the segments", *map(report.number, later)])
        for key, where in (("loss", ""), ("later", ", later half of the segments")):
            texts = [_signed(differences[path][name], key) for name in names[1:]]
            rows.append([f"{path}: loss above {names[0]}{where} (95 %)", "", *texts])
    grids = [other["passkey"] for other in results]
    for segments in sorted({row["segments"] for grid in grids if grid for row in grid["rows"]}):
        for control, label in report.WAY_NAMES.items():
            if any(grid and control in grid["controls"] for grid in grids):
                found = [report.exact_match(other, control, segments) for other in results]
                rows.append([f"passkey {segments} segments, {label}", *(report.number(x, 2) for x in found)])
    return rows
