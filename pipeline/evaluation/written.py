"""Tasks whose benchmark lets a model write after a question and looks into what it wrote: RULER and BABILong.

Greedy decoding with the memory on. The controls are those of the answers (`pipeline.evaluation.answers`): there is no
decoding without memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.evaluation.answers import Cell
from pipeline.evaluation.intervals import ratio_intervals, resample_counts, wilson_interval
from pipeline.inference.generate import Generator


@dataclass(frozen=True)
class Writing:
    """What a model goes on from, and how it is scored."""

    prompt: np.ndarray
    """Tokens."""
    new_tokens: int
    score: Callable[[str], float]
    """Of the text that was written, 0 to 1."""


def tokens_to_read(cells: Sequence[Cell], segment_length: int) -> int:
    """Of all prompts, about."""
    return sum(cell.documents * cell.segments * segment_length for cell in cells if cell.writes is not None)


def written_scores(
    generator: Generator, cells: Sequence[Cell], advance: Callable[[int], None]
) -> list[np.ndarray | None]:
    """Let the model write after every document of the cells that ask for it; collective, the same on all processes.

    Args:
        generator: with all copies of the model, which take different documents.
        advance: called with numbers of tokens that are done, of all copies by this one's measure.

    Returns:
        Per cell the scores `[documents]`; None where nothing is written.
    """
    streamer = generator.model.streamer
    topology, lanes = streamer.topology, streamer.max_lanes
    bounds = np.cumsum([0, *(cell.documents for cell in cells)])
    scores, turn = np.zeros(int(bounds[-1])), 0
    for cell, start in zip(cells, bounds[:-1].tolist(), strict=True):
        for first in range(0, cell.documents if cell.writes is not None else 0, lanes):
            turn += 1
            if turn % topology.data_size != topology.data_rank:
                continue
            batch = [cell.writes(number) for number in range(first, min(first + lanes, cell.documents))]
            made = generator.generate([writing.prompt for writing in batch], max_new_tokens=batch[0].new_tokens)
            for row, (writing, completion) in enumerate(zip(batch, made, strict=True), start=start + first):
                scores[row] = writing.score(completion.text)
            advance(len(batch) * cell.segments * streamer.segment_length * topology.data_size)
    scores = streamer.add_up(scores)
    return [
        None if cell.writes is None else scores[a:b]
        for cell, a, b in zip(cells, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    ]


def benchmark_score(scores: np.ndarray, seed: int) -> dict[str, Any]:
    """`benchmark_score`, the mean, and its 95 % `benchmark_score_interval`.

    The interval is Wilson's where every score is 0 or 1 (resamples of zeros alone are all alike), else from a bootstrap
    over documents.
    """
    if np.isin(scores, (0, 1)).all():
        interval = list(wilson_interval(int(scores.sum()), len(scores)))
    else:
        interval = ratio_intervals(scores, np.ones(len(scores)), resample_counts(len(scores), seed)).tolist()
    return {"benchmark_score": float(scores.mean()), "benchmark_score_interval": interval}
