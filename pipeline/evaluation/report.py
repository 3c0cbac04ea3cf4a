"""What an evaluation leaves behind: `results.json`, plots, TensorBoard, and tables in the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.files import Place, write_whole
from pipeline.evaluation import plots, task_report
from pipeline.evaluation.scalars import by_length, doubling_spans, mean_over, scalars, sets_by_name, span_name
from pipeline.evaluation.training_curves import training_curves
from pipeline.reporting.console import format_duration, make_console, print_table
from pipeline.reporting.dashboard import read_image, tag
from pipeline.reporting.metrics import METRICS_FILE, TENSORBOARD_FOLDER

RESULTS = "results.json"
DEPTHS_SHOWN = 5
"""More depths than this have no columns of their own in the terminal."""
WAY_NAMES = {
    "on": "memory on",
    "off": "memory off",
    "shuffled": "memory of another document",
    "reset": "memory emptied on the way",
}

Results = dict[str, Any]


def without_nan(value: Any) -> Any:
    """`value` as JSON can hold it: None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(results: Results, folder: Path, run_dir: Place, *, own_folder: bool) -> None:
    """Write `results.json` and the plots into `folder`, and both to TensorBoard.

    Args:
        own_folder: the results do not go into the run's folder; TensorBoard's files then go with them.

    Raises:
        OSError: something cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images: dict[str, Path] = {}
    for name, (path, facts) in sets_by_name(results).items():
        images[f"loss_by_segment/{name}"] = target = folder / f"loss_by_segment_{name}.png"
        curves = {WAY_NAMES[way]: curve(facts, way) for way in facts["ways"]}
        plots.loss_by_segment(target, curves, f"{results['name']}, step {results['step']}\nheld-out loss, {path}")
    if results["passkey"]:
        for control in results["passkey"]["controls"]:
            images[f"passkey/{control}"] = target = folder / f"passkey_{control}.png"
            _heatmap(target, results, control)
        images["passkey/by_length"] = target = folder / "passkey_by_length.png"
        _by_length(target, results)
    images |= _gates(results, folder)
    images |= task_report.plot_tasks(results, folder, WAY_NAMES)
    target = folder / "training_curves.png"
    if (run_dir / METRICS_FILE).is_file() and training_curves(target, run_dir / METRICS_FILE):
        images["training_curves"] = target
    if results["config"]["metrics"]["tensorboard"]:
        parent = folder if own_folder else run_dir
        _tensorboard(results, images, parent / TENSORBOARD_FOLDER / "evaluation")
    # Last, so that results stand for a whole evaluation.
    write_json(folder / RESULTS, results)


def write_json(path: Path, content: Results) -> None:
    """Write `content` so that the file is the old one or all of the new one."""
    write_whole(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def curve(facts: dict[str, Any], way: str) -> plots.Curve:
    """The loss by segment of a set's facts, as it is plotted."""
    return curve_of(facts["ways"][way], facts["by_segment_documents"])


def curve_of(numbers: dict[str, Any], documents: Sequence[int]) -> plots.Curve:
    """The same of anything that has `by_segment` and its interval."""
    low, high = numbers["by_segment_interval"]
    widths = [None if a is None or b is None else (b - a) / 2 for a, b in zip(low, high, strict=True)]
    return numbers["by_segment"], widths, documents


def _cells(results: Results, control: str) -> dict[tuple[int, float], dict[str, Any]]:
    cells = results["passkey"]["cells"] if results["passkey"] else []
    return {(cell["segments"], cell["depth"]): cell for cell in cells if cell["control"] == control}


def _heatmap(path: Path, results: Results, control: str) -> None:
    rows, cells = results["passkey"]["rows"], _cells(results, control)
    depths = sorted({depth for row in rows for depth in row["depths"]})
    grid = [[cells.get((row["segments"], depth), {}).get("exact_match") for row in rows] for depth in depths]
    per_cell = {cell["documents"] for cell in cells.values()}
    title = f"{results['name']}, step {results['step']}\npasskey exact match, {WAY_NAMES[control]}"
    title += f", n = {min(per_cell)}" + (f" to {max(per_cell)}" if len(per_cell) > 1 else "") + " per cell"
    plots.passkey_heatmap(path, grid, [row["tokens"] for row in rows], depths, title)


def _gates(results: Results, folder: Path) -> dict[str, Path]:
    """How the gates of each layer are distributed."""
    title = f"{results['name']}, step {results['step']}"
    images = {}
    if results["memory"]:
        images["gates/memory_share"] = target = folder / "gates_memory_share.png"
        shares = {int(layer): numbers["mix_gate"] for layer, numbers in results["memory"].items()}
        plots.gate_histogram(target, shares, f"{title}\nthe memory's share, one per head")
        if results["config"]["model"]["memory"]["write_gate"] != "none":
            images["gates/write"] = target = folder / "gates_write.png"
            counts = {int(layer): numbers["write_gate_histogram"] for layer, numbers in results["memory"].items()}
            means = {int(layer): float(np.mean(numbers["write_gate"])) for layer, numbers in results["memory"].items()}
            plots.binned_gate_histogram(target, counts, means, f"{title}\nwrite gate, one per token and head")
    return images


def _by_length(path: Path, results: Results) -> None:
    tokens = {row["segments"]: row["tokens"] for row in results["passkey"]["rows"]}
    curves = {}
    for control in results["passkey"]["controls"]:
        scores = by_length(results, control)
        curves[WAY_NAMES[control]] = [
            plots.Score(tokens[n], s["exact_match"], *s["exact_match_interval"], s["answers"])
            for n, s in sorted(scores.items())
        ]
    title = f"{results['name']}, step {results['step']}\npasskey, all depths"
    plots.score_curves(path, curves, title, xlabel="document length (tokens)", sizes=True)


def _tensorboard(results: Results, images: dict[str, Path], folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    # All evaluations of a run share a folder, so that they make one curve. An earlier one of the same step goes.
    step = results["step"]
    suffix = f".evaluation-{step:08d}"
    for earlier in folder.glob(f"*{suffix}"):
        earlier.unlink()
    with SummaryWriter(str(folder), filename_suffix=suffix) as writer:
        for name, value in scalars(results).items():
            writer.add_scalar(tag(name), value, step)
        for name, path in images.items():
            writer.add_image(tag(f"evaluation/{name}"), read_image(path), step, dataformats="HWC")


def exact_match(results: Results, control: str, segments: int) -> float | None:
    """Passkey exact match over all depths of a length."""
    return by_length(results, control).get(segments, {}).get("exact_match")


# Tables


def show(results: Results, folder: Path) -> None:
    """Print one run's tables."""
    console = make_console()
    for path, facts in results["perplexity"].items():
        spans = doubling_spans(len(facts["by_segment_tokens"]))
        header = ["held-out documents", "loss", "95 %", "perplexity", *(f"seg {span_name(span)}" for span in spans)]
        rows = []
        for way, numbers in facts["ways"].items():
            by_span = [mean_over(numbers["by_segment"], facts["by_segment_tokens"], span) for span in spans]
            losses = [number(numbers["loss"]), interval(numbers["loss_interval"]), number(numbers["perplexity"])]
            rows.append([WAY_NAMES[way], *losses, *map(number, by_span)])
        title = f"{path}: loss in nats per token, {facts['documents']} documents, {facts['tokens']:,} tokens"
        print_table(title, rows, header=header, console=console)
        for way, difference in facts["above_on"].items():
            console.print(
                f"{WAY_NAMES[way]}: {signed(difference['loss'])} nats per token against memory on "
                f"(95 %: {interval(difference['loss_interval'], plus=True)})",
                markup=False,
                soft_wrap=True,
            )
    if results["passkey"]:
        _show_passkey(results, console)
    task_report.show_tasks(results, console, WAY_NAMES)
    for note in results["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    took = f"{format_duration(results['seconds'])}, {results['tokens_per_s']:,.0f} tokens/s"
    console.print(f"{took}; numbers and plots are in {folder}", markup=False, soft_wrap=True)


def _show_passkey(results: Results, console: Any) -> None:
    grid = results["passkey"]
    depths = sorted({depth for row in grid["rows"] for depth in row["depths"]})
    if len(depths) > DEPTHS_SHOWN:
        depths = []  # the plots have them
    rows = []
    for row in grid["rows"]:
        name = f"{row['segments']:,} segments, {row['tokens']:,} tokens"
        for control in grid["controls"]:
            scores = by_length(results, control).get(row["segments"])
            if scores is None:
                continue
            cells = _cells(results, control)
            found = [cells.get((row["segments"], depth)) for depth in depths]
            exact = [number(scores["exact_match"], 3), interval(scores["exact_match_interval"], digits=3)]
            by_depth = [number(cell["exact_match"], 2) if cell else "-" for cell in found]
            accuracy = number(scores["token_accuracy"], 3)
            rows.append([name, WAY_NAMES[control], str(scores["documents"]), *exact, accuracy, *by_depth])
            name = ""
    header = ["passkey", "", "n", "exact", "95 %", "tokens", *(f"depth {depth:g}" for depth in depths)]
    print_table("passkey: exact match and token accuracy over all depths", rows, header=header, console=console)


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.4g}"


def signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def interval(ends: Sequence[float | None], plus: bool = False, digits: int = 4) -> str:
    if None in ends:
        return "-"
    low, high = (signed(end) if plus else number(end, digits) for end in ends)
    return f"{low} to {high}"
