"""All checkpoints that a run has kept, evaluated one after the other: a curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.files import Place, place
from pipeline.checkpoint.folder import CheckpointError, whole_checkpoints
from pipeline.evaluation import scalars
from pipeline.evaluation.evaluate import evaluate_checkpoint, join
from pipeline.evaluation.report import Results, write_json
from pipeline.evaluation.training_curves import Series, evaluation_curves
from pipeline.parallel.topology import on_main
from pipeline.reporting.console import make_console
from pipeline.reporting.evaluation_metrics import told

CURVE = "curve.json"


def evaluate_checkpoints(
    run_dir: str | Path, *, overrides: Sequence[str] = (), out: str | Path | None = None, **options: Any
) -> list[Results]:
    """Evaluate every whole checkpoint of a run, and write `curve.json` and `curve.png`; collective.

    Args:
        run_dir, overrides: see `evaluate_run`.
        options: see `evaluate_checkpoint`.
        out: folder for the curve, and in it a folder for each checkpoint's results; None is `evaluation` in the run's.

    Returns:
        The results, by step.

    Raises:
        CheckpointError: there is none, or one is damaged.
    """
    run_dir = place(run_dir)
    folder = run_dir / "evaluation" if out is None else Path(out)
    config, topology = join(run_dir, overrides)
    results = []
    for path in on_main(lambda: _checkpoints(run_dir)):
        own = None if out is None else folder / path.name
        results.append(evaluate_checkpoint(config, topology, run_dir, path, overrides=overrides, out=own, **options))
    on_main(lambda: _report(results, folder))
    return results


def _checkpoints(run_dir: Place) -> list[Place]:
    """A run's checkpoints, by step.

    Raises:
        CheckpointError: there is none.
    """
    if not (found := whole_checkpoints(run_dir / "checkpoints")):
        raise CheckpointError(f"{run_dir}: no checkpoint here")
    return found


def _report(results: Sequence[Results], folder: Path) -> None:
    by_step = {found["step"]: scalars.scalars(found) for found in results}
    names = dict.fromkeys(name for values in by_step.values() for name in values)
    series: Series = {}
    for name in names:
        points = [(step, values[name]) for step, values in by_step.items() if name in values]
        series[name] = tuple(np.array(points, dtype=np.float64).T)
    folder.mkdir(parents=True, exist_ok=True)
    evaluation_curves(folder / "curve.png", series)
    write_json(folder / CURVE, {"run": results[0]["run"], "by_step": by_step})
    console = make_console()
    for step, values in by_step.items():
        console.print(f"step {step:,}: {'; '.join(told(values))}", markup=False, soft_wrap=True)
    console.print(f"curve in {folder}", markup=False, soft_wrap=True)
