"""Passkey retrieval over a grid of lengths and depths, with the controls that show where an answer comes from.

A document of L segments has exactly L * S + 1 tokens, so that it fills its segments and the answer ends the last one.
Whole fillers rarely come out even: what is missing is made up with the ends of two fillers, after the introduction and
after the needle (as the task's first authors cut theirs). How long the first of them is differs from document to
document: else the needles of a cell would all lie alike to the segment borders, and one that a border cuts is harder.

The answer is right when greedy decoding gives all of its tokens. One forward pass tells: if every answer token has the
largest logit after the true tokens before it, decoding gives the same tokens one by one; if not, it errs at the first
that has not.

Controls, on the same documents and in the same table:
    off         the local attention gives all of the output, so the segments of a document know nothing of one another
    shuffled    before the segment where the answer begins, each document gets the memory of another one of the batch
                (the next lane), which has read a document as long with another key
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data.lanes import WindowBatch
from data.synthetic import FILLER, INTRODUCTION, QUESTION, PasskeyGenerator
from data.tokenizer import Tokenizer
from pipeline.bootstrap import ratio_intervals, resample_counts, wilson_interval
from pipeline.streaming import Document, Output, Streamer, array_document, roll_lanes

FIRST_SEED = 1 << 63
"""Seeds of prepared passkey sets are smaller: no training document has an evaluation's seed."""


def document_seed(seed: int, segments: int, depth: float, number: int) -> int:
    """Seed of one document; the same cell has the same documents in every grid."""
    text = f"{seed} {segments} {depth:.6f} {number}"
    return FIRST_SEED + int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


def passkey_document(tokenizer: Tokenizer, segments: int, segment_length: int, depth: float, seed: int) -> Document:
    """A document that fills `segments` segments.

    Raises:
        ValueError: they do not hold a passkey document even without filler.
    """
    generator, filler = PasskeyGenerator(tokenizer), tokenizer.encode(FILLER)
    total = segments * segment_length + 1
    shift = int(np.random.default_rng([seed, 1]).integers(len(filler)))
    try:
        made = generator.document(total - shift, depth, seed)
    except ValueError:  # there is no filler to shift by
        shift %= total - len(generator.document(total, depth, seed).tokens) + 1
        made = generator.document(total - shift, depth, seed)
    start = len(tokenizer.encode(INTRODUCTION))
    stop = _needle_end(made.tokens, start, filler, tokenizer.encode(QUESTION))
    pieces = [
        made.tokens[:start],
        filler[len(filler) - shift :],
        made.tokens[start:stop],
        filler[len(filler) - (total - shift - len(made.tokens)) :],
        made.tokens[stop:],
    ]
    added = total - len(made.tokens)
    tokens = np.array([token for piece in pieces for token in piece], dtype=np.int32)
    return array_document(made.key, tokens, [(a + added, b + added) for a, b in made.answers])


def _needle_end(tokens: list[int], start: int, filler: list[int], question: list[int]) -> int:
    """Where the needle ends, in a document whose fillers or needle begin at `start`."""
    while tokens[start : start + len(filler)] == filler:
        start += len(filler)
    while tokens[start : start + len(filler)] != filler and tokens[start : start + len(question)] != question:
        start += 1
    return start


def shortest_length(tokenizer: Tokenizer, segment_length: int) -> int:
    """Segments that a passkey document needs at least."""
    segments = 1
    while True:
        try:
            passkey_document(tokenizer, segments, segment_length, 0.5, FIRST_SEED)
        except ValueError:
            segments += 1
        else:
            return segments


def passkey_grid(
    streamer: Streamer,
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    documents: int,
    seed: int,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Measure every cell; collective. The same result on all ranks.

    Args:
        lengths: in segments; each holds a document (see `shortest_length`).
        depths: where the needle stands, 0 to 1.
        documents: per cell.
        seed: decides the keys.
        advance: called with the tokens of each document batch that is done.

    Returns:
        `lengths`, `lengths_tokens`, `depths`, `documents`, `seed`, `controls` (the names of what was measured), `cells`
        (one per length, depth and control: `exact_match`, `exact_match_interval`, `token_accuracy`,
        `token_accuracy_interval`, `documents`).
    """
    controls = ["on", "off", "shuffled"] if streamer.has_memory else ["on"]
    cells = []
    for segments in lengths:

        def make(depth: float, number: int, segments: int = segments) -> Document:
            own_seed = document_seed(seed, segments, depth, number)
            return passkey_document(tokenizer, segments, streamer.segment_length, depth, own_seed)

        todo = [(depth, number) for depth in depths for number in range(documents)]
        # [control, document, (right tokens, tokens)]
        parts = []
        for batch in streamer.batches(todo):
            made = [make(*which) for which in batch]
            parts.append(_answers(streamer, made, segments, controls, tokenizer.eos_id))
            advance(len(batch) * segments * streamer.segment_length)
        hits = np.concatenate(streamer.share_from_last_stage(parts), axis=1)
        for d, depth in enumerate(depths):
            own = slice(d * documents, (d + 1) * documents)
            for c, control in enumerate(controls):
                if control == "shuffled" and len(todo) == 1:
                    continue  # nobody to exchange with
                cells.append({"segments": segments, "depth": depth, "control": control} | _cell(hits[c, own], seed))
    return {
        "lengths": list(lengths),
        "lengths_tokens": [segments * streamer.segment_length for segments in lengths],
        "depths": list(depths),
        "documents": documents,
        "seed": seed,
        "controls": controls,
        "cells": cells,
    }


def _cell(hits: np.ndarray, seed: int) -> dict[str, Any]:
    """Scores of the documents of a cell from their right and all answer tokens `[documents, 2]`."""
    right, total = hits[:, 0], hits[:, 1]
    exact = int((right == total).sum())
    interval = ratio_intervals(right, total, resample_counts(len(hits), seed))
    return {
        "documents": len(hits),
        "exact_match": exact / len(hits),
        "exact_match_interval": list(wilson_interval(exact, len(hits))),
        "token_accuracy": float(right.sum() / total.sum()),
        "token_accuracy_interval": interval.tolist(),
    }


def _answers(
    streamer: Streamer, documents: list[Document], segments: int, controls: list[str], eos_id: int
) -> np.ndarray | None:
    """Right answer tokens and answer tokens, `[control, document, 2]`; None on ranks without the last stage."""
    length = streamer.segment_length
    # All documents have the same length; where tokens join digits, an answer may begin in an earlier segment.
    question = min((document.answers[0][0] - 1) // length for document in documents)
    memory = streamer.empty_memory(len(documents))
    step = streamer.segments_per_window(len(documents))
    for first in range(0, question, step):
        batch = streamer.window(documents, first, min(step, question - first), eos_id)
        memory = streamer.run(batch, memory).memory
    batch = streamer.window(documents, question, segments - question, eos_id)
    # Without memory a segment's output depends on the segment alone: what comes before need not be run again.
    outputs = {
        "on": lambda: streamer.run(batch, memory, correct=True),
        "off": lambda: streamer.run(batch, memory, correct=True, memory_off=True),
        "shuffled": lambda: streamer.run(batch, roll_lanes(memory), correct=True),
    }
    counted = [_count(batch, outputs[control]()) for control in controls]
    return None if counted[0] is None else np.stack(counted)


def _count(batch: WindowBatch, output: Output) -> np.ndarray | None:
    if output.correct is None:
        return None
    right = (output.correct & batch.answer_mask).sum(dim=(1, 2))
    return np.stack([right.cpu().numpy(), batch.answer_mask.sum(dim=(1, 2)).cpu().numpy()], axis=1)
