"""Synthetic tasks as evaluations: cells from a spec (`pipeline.config.task_spec`), scored by `evaluation.answers`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from data.synthetic import Generator, SyntheticDocument, build_generator, source_option, task_options
from data.tokenizer.tokenizer import Tokenizer
from pipeline.config.task_spec import Settings, Task
from pipeline.evaluation.answers import CONTROLS, Cell, score
from pipeline.evaluation.passkey import evaluation_seed
from pipeline.evaluation.written import Writing, benchmark_score
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
            generator = build_generator(task.task, tokenizer, options, source=task.source, split="valid")
            first = _made(task, settings, generator, seed, tokenizer.begin_ids, 0)
        except ValueError as error:
            raise ValueError(f"evaluate.tasks: {task.spec!r}: {error}") from None

        made = partial(_made, task, settings, generator, seed, tokenizer.begin_ids)
        writes = None if first.written is None else partial(_writing, made, tokenizer.begin_ids)
        make = partial(_document, made, tokenizer.begin_ids)
        cells.append(Cell(make, task.documents, -(-(int(settings["length"]) - 1) // segment_length), writes=writes))
    return cells


def _made(
    task: Task, settings: Settings, generator: Generator, seed: int, begin_ids: tuple[int, ...], number: int
) -> SyntheticDocument:
    """Depends on the cell's own settings, not on the other cells of the spec."""
    named = ",".join(f"{name}={value}" for name, value in sorted(settings.items()))
    own = evaluation_seed(f"{seed} {task.task} {named} {number}")
    depth = settings.get("depth", float(np.random.default_rng([own, 3]).uniform()))
    return generator.document(int(settings["length"]) - len(begin_ids), depth, own)


def _writing(made: Callable[[int], SyntheticDocument], begin_ids: tuple[int, ...], number: int) -> Writing:
    document = made(number)
    prompt = [*begin_ids, *document.tokens[: document.written.kept], *document.written.question]
    return Writing(np.array(prompt, dtype=np.int64), document.written.new_tokens, document.written.score)


def _document(made: Callable[[int], SyntheticDocument], begin_ids: tuple[int, ...], number: int) -> Document:
    document, begin = made(number), len(begin_ids)
    answers = [(start + begin, stop + begin) for start, stop in document.answers]
    return array_document(document.key, np.array([*begin_ids, *document.tokens], dtype=np.int32), answers)


def task_results(
    task: Task, counts: Sequence[np.ndarray], seed: int, written: Sequence[np.ndarray | None] = ()
) -> dict[str, Any]:
    """What a task's cells say.

    Args:
        counts: of `answers.measure`.
        written: of `written.written_scores`; empty where the model did not write.

    Returns:
        `task`, `filler` (or `questions`), `swept`, `axes`, `controls`, and `cells`: per cell and control its
        `settings`, `control` and what `answers.score` says; with the memory on, what `written.benchmark_score` says.
    """
    cells = [
        {"settings": settings, "control": control}
        | scores
        | ({} if own is None or control != "on" else benchmark_score(own, seed))
        for settings, found, own in zip(task.settings, counts, written or [None] * len(counts), strict=True)
        for c, control in enumerate(CONTROLS)
        if (scores := score(found[c], seed)) is not None
    ]
    return {
        "task": task.task,
        source_option(task.task) or "filler": task.source,
        "swept": task.swept,
        "axes": {name: list(values) for name, values in task.axes.items()},
        "controls": [control for control in CONTROLS if any(cell["control"] == control for cell in cells)],
        "cells": cells,
    }
