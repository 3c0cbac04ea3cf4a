"""One window of every lane while it is laid out: tokens, labels, weights, and the probes that ask about them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch

from data.lanes.schedule import Run, WeightedSet, draw
from data.prepared.questions import Question, askable


@dataclass
class ProbeBatch:
    """The probes of a window: P read-only segments per lane, evenly spread over the window.

    Probe j reads the memory that a segment of the j-th of P equal parts of the window starts with. A lane without a
    question there has weight 0 and padding.
    """

    tokens: torch.Tensor
    """int64 [B, P, S]."""
    labels: torch.Tensor
    """int64 [B, P, S]."""
    loss_weight: torch.Tensor
    """float32 [B, P, S]: the set's answer weight on answers, else 0: the text is trained on where it stands."""
    segment: torch.Tensor
    """int64 [B, P]: segment of the window, 0 to T - 1, whose starting memory the probe reads."""


@dataclass
class WindowBatch:
    """One window of every lane of this rank: B lanes, T segments, S tokens per segment."""

    tokens: torch.Tensor
    """int64 [B, T, S]; eos on padding."""
    labels: torch.Tensor
    """int64 [B, T, S]: the document's next token, across segment borders; eos on padding."""
    loss_weight: torch.Tensor
    """float32 [B, T, S]: 0 on padding, 1 on text, the set's answer weight on answers."""
    answer_mask: torch.Tensor
    """bool [B, T, S]: the label is an answer token. Where loss_weight is 0 it cannot be known, see `LaneLoader`."""
    reset: torch.Tensor
    """bool [B, T]: a document starts (or is entered) at this segment."""
    position_in_document: torch.Tensor
    """int64 [B, T]: token offset of the segment's first token in its document."""
    lane_ids: torch.Tensor
    """int64 [B]: global lane numbers."""
    padded_tokens: int
    """Positions with padding, of B * T * S."""
    documents: list[list[str]]
    """Per lane the names of the documents in the window, in order."""
    probes: ProbeBatch | None = None
    weight: float = 0.0
    """Sum of all loss weights, those of the probes included: the host knows it without asking a device."""
    digests: list[int] = field(default_factory=list)
    """Per lane 48 bits of a hash over all of the above: equal windows have equal ones. Empty where nobody compares."""

    @property
    def digest(self) -> int:
        """All lanes' digests in one of 48 bits: a float64 holds it exactly."""
        return _digest(np.array(self.digests, dtype=np.int64))


def _digest(*parts: np.ndarray | bytes) -> int:
    """48 bits of a hash over the parts."""
    digest = hashlib.blake2b(digest_size=6)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


class WindowBuilder:
    """The arrays of one window while they are filled: [B, T * S] per position and [B, T] per segment."""

    def __init__(self, sets: list[WeightedSet], lanes: int, segments: int, segment_length: int, probes: int) -> None:
        self._sets = sets
        self._shape = (lanes, segments, segment_length)
        positions = (lanes, segments * segment_length)
        eos = sets[0].set.eos_id
        self._tokens = np.full(positions, eos, dtype=np.int64)
        self._labels = np.full(positions, eos, dtype=np.int64)
        self._loss_weight = np.zeros(positions, dtype=np.float32)
        self._answer_mask = np.zeros(positions, dtype=bool)
        self._reset = np.zeros((lanes, segments), dtype=bool)
        self._position = np.zeros((lanes, segments), dtype=np.int64)
        self._documents: list[list[str]] = [[] for _ in range(lanes)]
        self._filled = 0
        self._probes = ProbeBuilder(sets, lanes, segments, segment_length, probes) if probes else None

    def ask(self, row: int, runs: list[tuple[int, Run]], bits: np.random.PCG64) -> None:
        """Put questions to the documents of lane `row`, whose runs begin at the segments given with them."""
        assert self._probes is not None
        self._probes.fill(row, runs, bits)

    def read(self, row: int, at: int, run: Run) -> None:
        """Put `run` at segment `at` of lane `row`; nothing is changed when the document cannot be read."""
        source = self._sets[run.set]
        length = self._shape[2]
        first = run.first_segment * length
        text = source.set.read(run.document, first, first + run.labels + 1)
        start, stop = at * length, at * length + run.labels
        self._tokens[row, start:stop] = text[:-1]
        self._labels[row, start:stop] = text[1:]
        self._loss_weight[row, start:stop] = 1
        for answer_start, answer_stop in source.set.answers(run.document):
            # Token i is the label of position i - 1.
            left = start + max(answer_start - 1 - first, 0)
            right = start + min(answer_stop - 1 - first, run.labels)
            if left < right:
                self._answer_mask[row, left:right] = True
                self._loss_weight[row, left:right] = source.answer_weight if run.from_beginning else 0
        self._reset[row, at] = run.starts
        self._position[row, at : at + run.segments] = first + length * np.arange(run.segments)
        self._documents[row].append(source.set.document_name(run.document))
        self._filled += run.labels

    def batch(self, lane_ids: range) -> WindowBatch:
        return WindowBatch(
            tokens=torch.from_numpy(self._tokens).view(self._shape),
            labels=torch.from_numpy(self._labels).view(self._shape),
            loss_weight=torch.from_numpy(self._loss_weight).view(self._shape),
            answer_mask=torch.from_numpy(self._answer_mask).view(self._shape),
            reset=torch.from_numpy(self._reset),
            position_in_document=torch.from_numpy(self._position),
            lane_ids=torch.tensor(lane_ids),
            padded_tokens=self._tokens.size - self._filled,
            documents=self._documents,
            probes=self._probes.batch() if self._probes else None,
            weight=float(self._loss_weight.sum(dtype=np.float64)) + (self._probes.weight if self._probes else 0.0),
            digests=[self._lane_digest(row, lane) for row, lane in enumerate(lane_ids)],
        )

    def _lane_digest(self, row: int, lane: int) -> int:
        arrays = [self._tokens, self._labels, self._loss_weight, self._answer_mask, self._reset, self._position]
        if self._probes is not None:
            arrays += self._probes.arrays()
        names = "\0".join([str(lane), *self._documents[row]])
        return _digest(names.encode("utf-8", "surrogateescape"), *(array[row] for array in arrays))


class ProbeBuilder:
    """The arrays of a window's probes while they are filled: [B, P, S]."""

    def __init__(self, sets: list[WeightedSet], lanes: int, segments: int, segment_length: int, probes: int) -> None:
        self._sets = sets
        self._stride = segments // probes
        shape = (lanes, probes, segment_length)
        eos = sets[0].set.eos_id
        self._tokens = np.full(shape, eos, dtype=np.int64)
        self._labels = np.full(shape, eos, dtype=np.int64)
        self._loss_weight = np.zeros(shape, dtype=np.float32)
        # Where nothing can be asked the memory does not matter; the index must stay inside the probe's part.
        self._segment = np.broadcast_to(self._stride * np.arange(probes), (lanes, probes)).copy()

    def fill(self, row: int, runs: list[tuple[int, Run]], bits: np.random.PCG64) -> None:
        length = self._tokens.shape[2]
        candidates: list[list[tuple[int, Run, int, Question]]] = [[] for _ in self._tokens[row]]
        for at, run in runs:
            if not run.from_beginning:  # what is asked for may stand before the entry
                continue
            questions = self._sets[run.set].set.questions(run.document)
            for i in range(run.segments):
                first = (run.first_segment + i) * length
                candidates[(at + i) // self._stride] += [
                    (at + i, run, first, question) for question in questions if askable(question, first, length)
                ]
        for probe, (choices, draws) in enumerate(zip(candidates, bits.random_raw(len(candidates)), strict=True)):
            if choices:
                self._put(row, probe, *choices[draw(int(draws), len(choices))])

    def _put(self, row: int, probe: int, segment: int, run: Run, first: int, question: Question) -> None:
        source, length = self._sets[run.set], self._tokens.shape[2]
        text_length = length + 1 - len(question.tokens)
        stop = min(first + text_length, int(source.set.lengths[run.document]) - 1)  # not the end token
        for answer_start, _ in source.set.answers(run.document):  # nor an answer that the document itself gives
            stop = min(stop, answer_start) if answer_start >= first else stop
        text = source.set.read(run.document, first, stop)
        tokens = np.concatenate([text, np.array(question.tokens, dtype=np.int64)])
        answer_start, answer_stop = (len(text) + edge for edge in question.answer)
        self._tokens[row, probe, : len(tokens) - 1] = tokens[:-1]
        self._labels[row, probe, : len(tokens) - 1] = tokens[1:]
        self._loss_weight[row, probe, answer_start - 1 : answer_stop - 1] = source.answer_weight
        self._segment[row, probe] = segment

    @property
    def weight(self) -> float:
        return float(self._loss_weight.sum(dtype=np.float64))

    def arrays(self) -> list[np.ndarray]:
        """All that is put to a lane, each `[B, P, ...]`."""
        return [self._tokens, self._labels, self._loss_weight, self._segment]

    def batch(self) -> ProbeBatch:
        return ProbeBatch(
            tokens=torch.from_numpy(self._tokens),
            labels=torch.from_numpy(self._labels),
            loss_weight=torch.from_numpy(self._loss_weight),
            segment=torch.from_numpy(self._segment),
        )
