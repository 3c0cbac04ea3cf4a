"""Synthetic tasks as evaluations: cells from a spec (`pipeline.config.task_spec`), scored by `evaluation.answers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.synthetic import Generator, build_generator, task_options
from data.tokenizer.tokenizer import Tokenizer
from pipeline.config.task_spec import Settings, Task
from pipeline.evaluation.answers import CONTROLS, Cell, score
from pipeline.evaluation.passkey import evaluation_seed
from pipeline.inference.streaming import Document, array_document


def task_cells(task: Task, tokenizer: Tokenizer, segment_length: int, seed: int) -> list[Cell]:
    """A cell for each of `task.settings`.

    Raises:
        ValueError: an option or the filler does not fit, or a length does not hold a document; before any is made.
    """
    cells = []
    for settings in task.settings:
        options = {name: int(settings[name]) for name in task_options(task.task) if name in settings}
        try:
            generator = build_generator(task.task, tokenizer, options, filler=task.filler, split="valid")
            _document(task, settings, generator, seed, 0, tokenizer.begin_ids)
        except ValueError as error:
            raise ValueError(f"evaluate.tasks: {task.spec!r}: {error}") from None

        def make(number: int, settings: Settings = settings, generator: Generator = generator) -> Document:
            return _document(task, settings, generator, seed, number, tokenizer.begin_ids)

        cells.append(Cell(make, task.documents, -(-(int(settings["length"]) - 1) // segment_length)))
    return cells


def _document(
    task: Task, settings: Settings, generator: Generator, seed: int, number: int, begin_ids: tuple[int, ...]
) -> Document:
    """Depends on the cell's own settings, not on the other cells of the spec."""
    named = ",".join(f"{name}={value}" for name, value in sorted(settings.items()))
    own = evaluation_seed(f"{seed} {task.task} {named} {number}")
    depth = settings.get("depth", float(np.random.default_rng([own, 3]).uniform()))
    begin = len(begin_ids)
    made = generator.document(int(settings["length"]) - begin, depth, own)
    answers = [(start + begin, stop + begin) for start, stop in made.answers]
    return array_document(made.key, np.array([*begin_ids, *made.tokens], dtype=np.int32), answers)


def task_results(task: Task, counts: Sequence[np.ndarray], seed: int) -> dict[str, Any]:
    """What a task's cells say.

    Returns:
        `task`, `filler`, `swept`, `axes`, `controls`, and `cells`: per cell and control its `settings`, `control` and
        what `answers.score` says.
    """
    cells = [
        {"settings": settings, "control": control} | scores
        for settings, found in zip(task.settings, counts, strict=True)
        for c, control in enumerate(CONTROLS)
        if (scores := score(found[c], seed)) is not None
    ]
    return {
        "task": task.task,
        "filler": task.filler,
        "swept": task.swept,
        "axes": {name: list(values) for name, values in task.axes.items()},
        "controls": [control for control in CONTROLS if any(cell["control"] == control for cell in cells)],
        "cells": cells,
    }
