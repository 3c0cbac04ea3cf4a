"""Passkey retrieval over a grid of lengths and depths, scored by `pipeline.evaluation.answers`.

A document of L segments has exactly L * S + 1 tokens, so that it fills its segments and the answer ends the last one.
Whole fillers rarely come out even: what is missing is the end of a filler, behind the needle. All documents of all
lengths begin alike, with the introduction and fillers, up to their needles, so that the beginning is computed once.

A needle stands some whole fillers off its depth, as many as its document's seed says: else the needles of a cell would
all lie alike to the segment borders, and one that a border cuts is harder. In long documents depth 1 is the last place
before the segment in which the question begins, so that an answer can only come through the memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.files import place
from data.prepared.shards import PreparedSet
from data.synthetic import PasskeyGenerator
from data.tokenizer.tokenizer import Tokenizer
from pipeline.config.load import ConfigError
from pipeline.config.schema import Config, EvaluateConfig
from pipeline.evaluation.answers import CONTROLS, Cell, score
from pipeline.inference.streaming import Document, repeating_document

FIRST_SEED = 1 << 63
"""Seeds of prepared passkey sets are smaller: no training document has an evaluation's seed."""
LONG = 32
"""Documents of so many segments have no needle in the question's segment: without memory it could be answered there."""
PLACES = 8
"""Places of the needle around its depth, a filler apart; fewer where a document has few fillers."""


@dataclass(frozen=True)
class Row:
    """Documents of one length."""

    segments: int
    depths: tuple[float, ...]
    """Where the needle stands, 0 to 1."""
    documents: int
    """Per depth and seed."""
    seeds: tuple[int, ...]


def grid_wanted(config: Config, overrides: Sequence[str], demanded: bool) -> tuple[bool, str]:
    """Whether an evaluation measures the grid: where it is asked for, or passkeys were trained. A model that has never
    seen one scores 0 everywhere, which says nothing about its memory.

    Args:
        config: of the evaluation.
        overrides: settings given to it.
        demanded: it is asked for, whatever the run says.

    Returns:
        Whether it is measured, and where it is not, why and how to ask for it.

    Raises:
        ConfigError: it is demanded, but its settings are empty.
    """
    evaluate, default = config.evaluate, EvaluateConfig()
    if demanded:
        if not evaluate.passkey_grid and not (evaluate.passkey_lengths and evaluate.passkey_depths):
            raise ConfigError(
                [
                    "--passkey asks for a grid, but evaluate.passkey_grid and evaluate.passkey_lengths (or "
                    "passkey_depths) are empty: give one of them values"
                ]
            )
        return True, ""
    names = [name for name in EvaluateConfig.__dataclass_fields__ if name.startswith("passkey")]
    if any(override.startswith("evaluate.passkey") for override in overrides):
        return True, ""
    if any(getattr(evaluate, name) != getattr(default, name) for name in names):
        return True, ""
    paths = list(dict.fromkeys(entry.path for entry in config.data.sets))
    there = [path for path in paths if (place(path) / "manifest.json").is_file()]
    sources = [entry.spec for path in there for entry in PreparedSet(path).manifest.sources]
    if any(spec.startswith("passkey:") for spec in sources):
        return True, ""
    seen = f"no passkeys were trained ({', '.join(there)})" if there else "no set of data.sets is there to tell"
    return False, f"{seen}: the passkey grid was left out; --passkey asks for it"


def evaluation_seed(text: str) -> int:
    """The seed of the document that `text` describes; no training document has it."""
    return FIRST_SEED + int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


def document_seed(seed: int, segments: int, depth: float, number: int) -> int:
    """Seed of one document; the same cell has the same documents in every grid."""
    return evaluation_seed(f"{seed} {segments} {depth:.6f} {number}")


def passkey_document(
    generator: PasskeyGenerator, segments: int, segment_length: int, depth: float, seed: int
) -> Document:
    """A document that fills `segments` segments.

    Raises:
        ValueError: they do not hold a passkey document even without filler.
    """
    parts = generator.parts(seed)
    total = segments * segment_length + 1
    fillers = parts.fillers(total)
    last = fillers
    if segments >= LONG:
        question = (total - len(parts.question) - len(parts.answer)) // segment_length * segment_length
        last = (question - len(parts.introduction) - len(parts.needle)) // len(parts.filler)
    places = min(PLACES, 1 + fillers // 4)
    first = min(max(round(depth * fillers) - places // 2, 0), last + 1 - places)
    before = first + int(np.random.default_rng([seed, 1]).integers(places))
    rest = total - parts.fixed - fillers * len(parts.filler)
    pieces = [
        (parts.introduction, 1),
        (parts.filler, before),
        (parts.needle, 1),
        (parts.filler[len(parts.filler) - rest :], 1),
        (parts.filler, fillers - before),
        (parts.question, 1),
        (parts.answer, 1),
    ]
    return repeating_document(
        f"passkey-{segments}x{segment_length}-{depth:.4f}-{seed}",
        [(np.array(tokens, dtype=np.int32), times) for tokens, times in pieces],
        [(total - len(parts.answer) + parts.lead, total)],
        shared=len(parts.introduction) + before * len(parts.filler),
    )


def common_beginning(generator: PasskeyGenerator, length: int) -> Document:
    """The introduction and fillers, `length` tokens or a few more."""
    parts = generator.parts(FIRST_SEED)
    introduction, filler = (np.array(x, dtype=np.int32) for x in (parts.introduction, parts.filler))
    return repeating_document("passkey", [(introduction, 1), (filler, 1 + length // len(filler))])


def shortest_length(tokenizer: Tokenizer, segment_length: int) -> int:
    """Segments that a passkey document needs at least."""
    generator = PasskeyGenerator(tokenizer)
    segments = 1
    while True:
        try:
            passkey_document(generator, segments, segment_length, 0.5, FIRST_SEED)
        except ValueError:
            segments += 1
        else:
            return segments


def passkey_cells(rows: Sequence[Row], tokenizer: Tokenizer, segment_length: int) -> list[Cell]:
    """A cell per row and depth, in this order; a cell's documents are seed by seed."""
    generator = PasskeyGenerator(tokenizer)
    beginning = common_beginning(generator, max(row.segments for row in rows) * segment_length + 1)
    cells = []
    for row in rows:
        for depth in row.depths:

            def make(number: int, row: Row = row, depth: float = depth) -> Document:
                turn, number = divmod(number, row.documents)
                seed = document_seed(row.seeds[turn], row.segments, depth, number)
                return passkey_document(generator, row.segments, segment_length, depth, seed)

            documents = row.documents * len(row.seeds)
            shared = min(make(number).shared for number in range(documents))
            cells.append(Cell(make, documents, row.segments, shared, beginning))
    return cells


def passkey_results(
    rows: Sequence[Row], counts: Sequence[np.ndarray], segment_length: int, seed: int
) -> dict[str, Any]:
    """What the grid says.

    Args:
        counts: from `answers.measure`, for the cells of `passkey_cells`.
        seed: of the bootstrap.

    Returns:
        `rows` (`segments`, `tokens`, `depths`, `documents`, `seeds`), `controls` (the names of what was measured),
        `cells` (per length, depth and control the `segments`, `depth`, `control` and what `answers.score` says) and
        `by_length` (the same per length and control, over all depths and seeds).
    """
    cells, by_length = [], []
    left = list(counts)
    for row in rows:
        own, left = left[: len(row.depths)], left[len(row.depths) :]
        for c, control in enumerate(CONTROLS):
            names = {"segments": row.segments, "control": control}
            for depth, found in zip(row.depths, own, strict=True):
                if (scores := score(found[c], seed)) is not None:
                    cells.append(names | {"depth": depth} | scores)
            if (scores := score(np.concatenate([found[c] for found in own]), seed)) is not None:
                by_length.append(names | scores)
    return {
        "rows": [
            {
                "segments": row.segments,
                "tokens": row.segments * segment_length,
                "depths": list(row.depths),
                "documents": row.documents,
                "seeds": list(row.seeds),
            }
            for row in rows
        ],
        "controls": [control for control in CONTROLS if any(cell["control"] == control for cell in cells)],
        "cells": cells,
        "by_length": by_length,
    }
