"""Tasks of lm-evaluation-harness on a run's checkpoint: a table, and files.

`RUN/evaluation/CHECKPOINT/lm_eval/` gets `results.json` (what the harness says of every task and group, with its
settings and versions) and `samples_TASK.jsonl` (every request with its answer). `lm_eval` is imported when it is used:
it is an extra, and takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data.files import Place, place, write_whole
from pipeline.config.load import ConfigError
from pipeline.evaluation.report import RESULTS, number, without_nan, write_json
from pipeline.evaluation.task_report import short_name
from pipeline.parallel.setup import versions
from pipeline.parallel.topology import on_main
from pipeline.reporting.console import make_console, print_table

FORMAT_VERSION = 1
BOOTSTRAP = 100_000
"""Resamples of a metric's standard error, as the harness has them."""
KEPT = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "n-samples", "higher_is_better")
"""Of what the harness returns."""


@dataclass(frozen=True)
class HarnessOptions:
    """What is asked of the harness."""

    tasks: tuple[str, ...]
    """Names of tasks, groups and tags, or YAML files of tasks."""
    folder: str | None = None
    """With YAML files of further tasks."""
    shots: int | None = None
    """Examples before every question; None is what a task says."""
    limit: int | None = None
    """Documents of each task at most."""


def evaluate_tasks(
    run_dir: str | Path,
    options: HarnessOptions,
    *,
    overrides: Sequence[str] = (),
    checkpoint: str | Path | None = None,
    out: str | Path | None = None,
) -> None:
    """Run tasks of the harness; collective. Results are written and shown by the main process.

    Args:
        run_dir: the run's folder.
        overrides: `key=value` settings of layout and precision.
        checkpoint: a checkpoint's folder; None takes the run's newest.
        out: folder for the results; None is `evaluation/<checkpoint>/lm_eval` in the run's folder.

    Raises:
        ValueError: a task is unknown, or settings and checkpoint do not fit.
        OSError: something cannot be read or written.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    from pipeline.evaluation.lm_harness import InfiniLM

    model = InfiniLM(checkpoint or run_dir, overrides=overrides)
    manager = TaskManager(include_path=options.folder)
    if unknown := [name for name in options.tasks if not (name in manager.all_tasks or Path(name).is_file())]:
        raise ConfigError(
            [
                f"--lm-eval {name}: no task, group or tag of lm-eval {version('lm-eval')}"
                + (f" or in {options.folder}" if options.folder else "; --lm-eval-tasks names a folder with YAML files")
                for name in unknown
            ]
        )
    found = lm_eval.simple_evaluate(
        model,
        tasks=list(options.tasks),
        num_fewshot=options.shots,
        limit=options.limit,
        # Resampled where the result is used.
        bootstrap_iters=BOOTSTRAP if model.topology.is_main else 0,
        task_manager=manager,
    )
    on_main(lambda: _write(found, model, options, place(run_dir), out))


def _write(found: dict[str, Any], model: Any, options: HarnessOptions, run_dir: Place, out: str | Path | None) -> None:
    reader, topology = model.generator.reader, model.topology
    folder = Path(out) if out is not None else run_dir / "evaluation" / reader.folder.name / "lm_eval"
    folder.mkdir(parents=True, exist_ok=True)
    for task, samples in found["samples"].items():
        lines = [json.dumps(_plain(sample), allow_nan=False) + "\n" for sample in samples]
        write_whole(folder / f"samples_{short_name(task)}.jsonl", "".join(lines))
    results = {
        "format_version": FORMAT_VERSION,
        "run": str(run_dir),
        "name": reader.config.name,
        "checkpoint": str(reader.folder),
        "step": reader.summary.step,
        "training_tokens": reader.summary.tokens,
        "layout": {"tensor": topology.tensor_size, "pipeline": topology.pipeline_size, "data": topology.data_size},
        "asked": {"tasks": options.tasks, "folder": options.folder, "shots": options.shots, "limit": options.limit},
        "software": versions() | {"lm-eval": version("lm-eval")},
        "seeds": {name: found["config"][name] for name in ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")},
    }
    # Last, so that results stand for a whole evaluation.
    write_json(folder / RESULTS, results | _plain({name: found[name] for name in KEPT if name in found}))
    _show(found, results, folder)


def _plain(value: Any) -> Any:
    """As JSON holds it, with what it does not know (functions in a task's settings) as the harness writes it."""
    from lm_eval.utils import handle_non_serializable

    return without_nan(json.loads(json.dumps(value, default=handle_non_serializable)))


def _show(found: dict[str, Any], results: dict[str, Any], folder: Path) -> None:
    console = make_console()
    print_table(
        f"{results['name']} step {results['step']}, lm-eval {results['software']['lm-eval']}",
        table_rows(found),
        header=["task", "shots", "n", "metric", "", "value", "standard error"],
        console=console,
    )
    console.print(f"numbers and answers are in {folder}", markup=False, soft_wrap=True)


def table_rows(found: dict[str, Any]) -> list[list[str]]:
    """A row per task (and group) and metric, of what the harness returns."""
    rows = []
    for task, metrics in found["results"].items():
        shots = found["n-shot"].get(task, "")
        documents = found["n-samples"].get(task, {}).get("effective", "")
        for key, value in metrics.items():
            metric, comma, scheme = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{scheme}")
            rows.append(
                [
                    task if not rows or rows[-1][0] != task else "",
                    str(shots),
                    str(documents),
                    metric,
                    "" if scheme == "none" else scheme,
                    number(float(value)),
                    number(error) if isinstance(error, int | float) else "-",
                ]
            )
    return rows
