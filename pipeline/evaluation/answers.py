"""Whether a model answers what documents ask, with the controls that show where an answer comes from.

An answer is right when greedy decoding gives all of its tokens. One forward pass tells: if every answer token has the
largest logit after the true tokens before it, decoding gives the same tokens one by one; if not, it errs at the first
that has not.

Controls, on the same documents:
    off         the local attention gives all of the output, so the segments of a document know nothing of one another
                (with a sliding context of `num_layers` segments before, which are run without memory as well)
    shuffled    before the segment where the first answer begins, each document gets the memory of another one of its
                item (the next lane), which has read a document of the same kind with other answers

Long documents are dear, so only what is asked for is computed: the output matrix in the segments of the answers, and
the beginning that documents have in common once, in one lane, whose memory is then given to all of their lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.lanes.loader import WindowBatch
from model.rules.state import Memory, roll_lanes, spread_lanes
from pipeline.evaluation.intervals import ratio_intervals, resample_counts, wilson_interval
from pipeline.inference.streaming import Document, Output, Streamer

CONTROLS = ("on", "off", "shuffled")
SMALLEST_SPLIT = 4
"""A cell with so many documents is at least two items, so that two ranks share the work of a long row."""
COUNTS = 4
"""What is counted of a document: right answer tokens, answer tokens, right answers, answers."""


@dataclass(frozen=True)
class Cell:
    """Documents of one kind that are scored together."""

    make: Callable[[int], Document]
    """The document of a number below `documents`."""
    documents: int
    segments: int
    """Of the longest one."""
    shared: int = 0
    """First tokens that all of them have in common with `beginning`; no answer is among them."""
    beginning: Document | None = None
    """Cells with the same one compute it together."""
    writes: Callable[[int], Any] | None = None
    """From the number of a document, what the model writes after its question (`pipeline.evaluation.written`)."""


@dataclass(frozen=True)
class _Item:
    """Documents [first, last) of a cell: the lanes of one batch."""

    cell: int
    first: int
    last: int
    fork: int
    """Segments that are taken from the common beginning."""
    tokens: int
    """What is left to run, all lanes together."""


@dataclass(frozen=True)
class Plan:
    """Who runs what."""

    cells: Sequence[Cell]
    items: list[list[_Item]]
    """Per data-parallel rank, in the order of their forks: the common beginning is then run through once."""
    tokens: int
    """That all ranks together run, common beginnings included."""


def plan(streamer: Streamer, cells: Sequence[Cell]) -> Plan:
    """Split the cells into items and give each data-parallel rank about as many tokens to run."""
    length = streamer.segment_length
    items = []
    for number, cell in enumerate(cells):
        parts = -(-cell.documents // streamer.max_lanes)
        parts = max(parts, 2) if cell.documents >= SMALLEST_SPLIT else parts
        bounds = [round(i * cell.documents / parts) for i in range(parts + 1)]
        fork = cell.shared // length
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):
            items.append(_Item(number, first, last, fork, (last - first) * (cell.segments - fork) * length))
    ranks: list[list[_Item]] = [[] for _ in range(streamer.topology.data_size)]
    for item in sorted(items, key=lambda item: -item.tokens):
        min(ranks, key=lambda own: sum(other.tokens for other in own)).append(item)
    tokens = sum(item.tokens for item in items)
    for own in ranks:
        own.sort(key=lambda item: item.fork)
        furthest: dict[int, int] = {}
        for item in own:
            furthest[id(cells[item.cell].beginning)] = item.fork
        tokens += sum(furthest.values()) * length
    return Plan(cells, ranks, tokens)


def measure(streamer: Streamer, work: Plan, eos_id: int, advance: Callable[[int], None]) -> list[np.ndarray]:
    """Run the plan; collective, the same result on all ranks.

    Args:
        advance: called with numbers of tokens that are done, of all ranks by this one's measure.

    Returns:
        Per cell `[control, document, COUNTS]`, in the order of `CONTROLS`; zeros where a control was not measured.
    """
    cells = work.cells
    bounds = np.cumsum([0, *(cell.documents for cell in cells)])
    counts = np.zeros((len(CONTROLS), int(bounds[-1]), COUNTS))
    own = work.items[streamer.topology.data_rank]
    beginnings: dict[int, _Beginning] = {}
    scale = streamer.topology.data_size
    for item in own:
        cell = cells[item.cell]
        documents = [cell.make(number) for number in range(item.first, item.last)]
        memory = streamer.empty_memory(len(documents))
        if item.fork:
            known = beginnings.setdefault(id(cell.beginning), _Beginning(streamer, cell.beginning, eos_id))
            memory = spread_lanes(known.until(item.fork, lambda tokens: advance(tokens * scale)), len(documents))
        rows = slice(int(bounds[item.cell]) + item.first, int(bounds[item.cell]) + item.last)
        found = _answer(streamer, documents, item.fork, memory, eos_id, lambda tokens: advance(tokens * scale))
        if found is not None:
            counts[:, rows] = found
    counts = streamer.add_up(counts)
    return [counts[:, a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


class _Beginning:
    """The memory of what documents have in common, as far as it has been read."""

    def __init__(self, streamer: Streamer, document: Document, eos_id: int) -> None:
        self._streamer, self._document, self._eos_id = streamer, document, eos_id
        self._memory, self._segment = streamer.empty_memory(1), 0

    def until(self, segment: int, advance: Callable[[int], None]) -> Memory:
        """The memory that `segment` reads, of one lane; segments must not fall from call to call."""
        self._memory = read_segments(
            self._streamer, [self._document], self._segment, segment, self._memory, self._eos_id, advance
        )
        self._segment = segment
        return self._memory


def read_segments(
    streamer: Streamer,
    documents: list[Document],
    first: int,
    last: int,
    memory: Memory,
    eos_id: int,
    advance: Callable[[int], None],
    memory_off: bool = False,
) -> Memory:
    """The memory after segments [first, last)."""
    step = streamer.segments_per_window(len(documents))
    for start in range(first, last, step):
        segments = min(step, last - start)
        batch = streamer.window(documents, start, segments, eos_id)
        memory = streamer.read(batch, memory, memory_off=memory_off)
        advance(len(documents) * segments * streamer.segment_length)
    return memory


def _answer(
    streamer: Streamer,
    documents: list[Document],
    first: int,
    memory: Memory,
    eos_id: int,
    advance: Callable[[int], None],
) -> np.ndarray | None:
    """`[control, document, COUNTS]`; None on ranks without the last stage."""
    length = streamer.segment_length
    segments = max(document.segments(length) for document in documents)
    # Documents of a cell differ little; where tokens join digits, an answer may begin in an earlier segment.
    asked = min((document.answers[0][0] - 1) // length for document in documents)
    # As far back as the local attention reaches; what it holds of the segments before does not come to the answer.
    back = max(first, asked - streamer.local_reach)
    earlier = read_segments(streamer, documents, first, back, memory, eos_id, advance)
    memory = read_segments(streamer, documents, back, asked, earlier, eos_id, advance)
    batch = streamer.window(documents, asked, segments - asked, eos_id)
    outputs = {"on": streamer.run(batch, memory, correct=True)}
    if streamer.has_memory:
        without = read_segments(streamer, documents, back, asked, earlier, eos_id, lambda tokens: None, memory_off=True)
        outputs["off"] = streamer.run(batch, without, correct=True, memory_off=True)
        if len(documents) > 1:
            # A sliding context, too: its upper layers hold what they have read from the document's own memory.
            others = roll_lanes(memory, with_context=True)
            outputs["shuffled"] = streamer.run(batch, others, correct=True)
    advance(len(documents) * (segments - asked) * length)
    if outputs["on"].correct is None:
        return None
    counts = np.zeros((len(CONTROLS), len(documents), COUNTS))
    for control, output in outputs.items():
        counts[CONTROLS.index(control)] = count_right(batch, output, documents, asked * length)
    return counts


def count_right(batch: WindowBatch, output: Output, documents: list[Document], start: int) -> np.ndarray:
    """`[document, COUNTS]` of the documents' answers in a window that begins at token `start`."""
    correct = np.array(output.correct.flatten(1).tolist())
    found = np.zeros((len(documents), COUNTS))
    for row, document in enumerate(documents):
        for first, last in document.answers:  # token i is the label of position i - 1
            right = correct[row, first - 1 - start : last - 1 - start]
            found[row] += (right.sum(), last - first, right.all(), 1)
    return found


def score(counts: np.ndarray, seed: int) -> dict[str, Any] | None:
    """Scores of documents from their counts `[document, COUNTS]`; None where nothing was measured.

    Returns:
        `documents`, `answers`, `exact_match` (share of right answers) and `token_accuracy`, each with its 95 %
        interval: Wilson's where every document has one answer, else (and for tokens) from a bootstrap over documents.
    """
    if not counts[:, 3].sum():
        return None
    right_tokens, tokens, right, answers = counts.T
    resamples = resample_counts(len(counts), seed)
    if (answers == 1).all():
        exact_interval = list(wilson_interval(int(right.sum()), len(counts)))
    else:
        exact_interval = ratio_intervals(right, answers, resamples).tolist()
    return {
        "documents": len(counts),
        "answers": int(answers.sum()),
        "exact_match": float(right.sum() / answers.sum()),
        "exact_match_interval": exact_interval,
        "token_accuracy": float(right_tokens.sum() / tokens.sum()),
        "token_accuracy_interval": ratio_intervals(right_tokens, tokens, resamples).tolist(),
    }
