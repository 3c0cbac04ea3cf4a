"""One window of every lane while it is laid out: tokens, labels, weights, and the probes that ask about them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from data.lanes.schedule import Run, WeightedSet, draw
from data.prepared.questions import Question, askable


class WindowPart(NamedTuple):
    """Which segments of a window of W a process has: of each of its chunks the same one of equal parts, one behind the
    other. The probes that read these segments are its own as well."""

    chunks: int = 1
    """Of a window."""
    rank: int = 0
    size: int = 1
    """Parts of a chunk."""

    def spans(self, segments: int) -> list[range]:
        """The process's segments of a window of `segments`, chunk by chunk."""
        if self.size == 1:
            return [range(segments)]
        chunk, part = segments // self.chunks, segments // (self.chunks * self.size)
        firsts = range(self.rank * part, segments, chunk)
        return [range(first, first + part) for first in firsts]

    def own(self, whole: torch.Tensor) -> torch.Tensor:
        """The process's segments of `whole` `[B, W, ...]`."""
        if self.size == 1:
            return whole
        return torch.cat([whole[:, span.start : span.stop] for span in self.spans(whole.shape[1])], dim=1)


WHOLE = WindowPart()


@dataclass
class ProbeBatch:
    """The probes of a window: read-only segments, evenly spread over the window; of a lane P that are this process's.

    Probe j of a window with as many reads the memory that a segment of the j-th equal part of the window starts with. A
    lane without a question there has weight 0 and padding.
    """

    tokens: torch.Tensor
    """int64 [B, P, S]."""
    labels: torch.Tensor
    """int64 [B, P, S]."""
    loss_weight: torch.Tensor
    """float32 [B, P, S]: the set's answer weight on answers, else 0: the text is trained on where it stands."""
    segment: torch.Tensor
    """int64 [B, P]: which of the process's segments, 0 to T - 1, it is whose starting memory the probe reads."""


@dataclass
class WindowBatch:
    """One window of every lane of this process: B lanes, its T segments of the window's W, S tokens per segment.

    T is W, unless several processes share a window (`WindowPart`).
    """

    tokens: torch.Tensor
    """int64 [B, T, S]; eos on padding."""
    labels: torch.Tensor
    """int64 [B, T, S]: the document's next token, across segment borders; eos on padding."""
    loss_weight: torch.Tensor
    """float32 [B, T, S]: 0 on padding, 1 on text, the set's answer weight on answers."""
    answer_mask: torch.Tensor
    """bool [B, T, S]: the label is an answer token. Where loss_weight is 0 it cannot be known, see `LaneLoader`."""
    reset: torch.Tensor
    """bool [B, W]: a document starts (or is entered) at this segment of the whole window."""
    position_in_document: torch.Tensor
    """int64 [B, T]: token offset of the segment's first token in its document: with packing, any."""
    lane_ids: torch.Tensor
    """int64 [B]: global lane numbers."""
    padded_tokens: int
    """Positions with padding, of B * T * S."""
    documents: list[list[str]]
    """Per lane the names of the documents in the whole window, in order."""
    starts: torch.Tensor | None = None
    """bool [B, W, S]: a document starts (or is entered) at this token of the whole window; segments' first tokens are
    `reset`. None without packing, where documents start nowhere else."""
    set_index: torch.Tensor | None = None
    """int16 [B, T, S]: place in the mixture of the set that a token is from; 0 on padding. None where there is one."""
    part: WindowPart = WHOLE
    """Which of the window's segments the T are."""
    probes: ProbeBatch | None = None
    weight: float = 0.0
    """Sum of all loss weights, those of the probes included: the host knows it without asking a device."""
    digests: list[int] = field(default_factory=list)
    """Per lane 48 bits of a hash over all of the above: equal windows have equal ones. Empty where nobody compares."""
    outlines: list[int] = field(default_factory=list)
    """Per lane 48 bits of a hash over what the parts of a window have in common: which documents, and where."""

    @property
    def digest(self) -> int:
        """All lanes' digests in one of 48 bits: a float64 holds it exactly."""
        return _digest(np.array(self.digests, dtype=np.int64))

    @property
    def outline(self) -> int:
        """All lanes' outlines in one, likewise."""
        return _digest(np.array(self.outlines, dtype=np.int64))


def _digest(*parts: np.ndarray | bytes) -> int:
    """48 bits of a hash over the parts."""
    digest = hashlib.blake2b(digest_size=6)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


class WindowBuilder:
    """The arrays of one window while they are filled: [B, T * S] per position and [B, T] per segment.

    Positions are counted from the beginning of the whole window.

    Args:
        lanes: B.
        segments: W, of the whole window; `part` says which are this process's.
        probes: of the whole window, per lane.
        packing: documents may start anywhere in a segment, and the batch says where.
        read_all: also read what other parts have: all processes then meet the same damage.
    """

    def __init__(
        self,
        sets: list[WeightedSet],
        lanes: int,
        segments: int,
        segment_length: int,
        probes: int,
        part: WindowPart = WHOLE,
        *,
        packing: bool = False,
        read_all: bool = False,
    ) -> None:
        self._sets = sets
        self._part = part
        self._spans = part.spans(segments)
        self._packing = packing
        self._read_all = read_all
        own = segments // part.size
        self._shape = (lanes, own, segment_length)
        positions = (lanes, own * segment_length)
        eos = sets[0].set.eos_id
        self._tokens = np.full(positions, eos, dtype=np.int64)
        self._labels = np.full(positions, eos, dtype=np.int64)
        self._loss_weight = np.zeros(positions, dtype=np.float32)
        self._answer_mask = np.zeros(positions, dtype=bool)
        self._set_index = np.zeros(positions, dtype=np.int16)
        self._starts = np.zeros((lanes, segments * segment_length), dtype=bool)
        self._position = np.zeros((lanes, own), dtype=np.int64)
        self._documents: list[list[str]] = [[] for _ in range(lanes)]
        self._runs: list[list[tuple[int, Run]]] = [[] for _ in range(lanes)]
        self._filled = 0
        self._probes = ProbeBuilder(sets, lanes, segments, segment_length, probes, self._spans) if probes else None

    def ask(self, row: int, bits: np.random.PCG64) -> None:
        """Put questions to the documents of lane `row`, which have all been read."""
        assert self._probes is not None
        self._probes.fill(row, self._runs[row], bits)

    def read(self, row: int, at: int, run: Run) -> None:
        """Put `run` at position `at` of lane `row`; nothing is changed when the document cannot be read."""
        source, length = self._sets[run.set], self._shape[2]

        def text(part: Run) -> np.ndarray:
            return source.set.read(part.document, part.first, part.first + part.labels + 1)

        whole = text(run) if self._read_all else None
        pieces, place = [], 0
        for span in self._spans:
            first, last = span.start * length, span.stop * length
            start, stop = max(at, first), min(at + run.positions, last)
            if start < stop:
                part = run.part(start - at, stop - start)
                tokens = text(part) if whole is None else whole[start - at : start - at + part.labels + 1]
                pieces.append((place + start - first, part, tokens))
            place += last - first
        for piece in pieces:
            self._put(row, *piece)
        self._starts[row, at] = run.starts
        self._documents[row].append(source.set.document_name(run.document))
        self._runs[row].append((at, run))

    def _put(self, row: int, start: int, run: Run, text: np.ndarray) -> None:
        """Put a run at position `start` of the process's own segments, which stand one behind the other."""
        source, length = self._sets[run.set], self._shape[2]
        stop = start + run.labels
        self._tokens[row, start:stop] = text[:-1]
        self._labels[row, start:stop] = text[1:]
        self._loss_weight[row, start:stop] = 1
        self._set_index[row, start:stop] = run.set
        for answer_start, answer_stop in source.set.answers(run.document):
            # Token i is the label of position i - 1.
            left = start + max(answer_start - 1 - run.first, 0)
            right = start + min(answer_stop - 1 - run.first, run.labels)
            if left < right:
                self._answer_mask[row, left:right] = True
                self._loss_weight[row, left:right] = source.answer_weight if run.from_beginning else 0
        segments = np.arange(-(-start // length), -(-(start + run.positions) // length))  # that begin in this run
        self._position[row, segments] = run.first + segments * length - start
        self._filled += run.labels

    def batch(self, lane_ids: range) -> WindowBatch:
        starts = torch.from_numpy(self._starts).view(len(lane_ids), -1, self._shape[2])
        return WindowBatch(
            tokens=torch.from_numpy(self._tokens).view(self._shape),
            labels=torch.from_numpy(self._labels).view(self._shape),
            loss_weight=torch.from_numpy(self._loss_weight).view(self._shape),
            answer_mask=torch.from_numpy(self._answer_mask).view(self._shape),
            reset=starts[:, :, 0].contiguous(),
            position_in_document=torch.from_numpy(self._position),
            lane_ids=torch.tensor(lane_ids),
            padded_tokens=self._tokens.size - self._filled,
            documents=self._documents,
            starts=starts if self._packing else None,
            set_index=torch.from_numpy(self._set_index).view(self._shape) if len(self._sets) > 1 else None,
            part=self._part,
            probes=self._probes.batch() if self._probes else None,
            weight=float(self._loss_weight.sum(dtype=np.float64)) + (self._probes.weight if self._probes else 0.0),
            digests=[self._lane_digest(row, lane) for row, lane in enumerate(lane_ids)],
            outlines=[self._lane_outline(row, lane) for row, lane in enumerate(lane_ids)],
        )

    def _lane_digest(self, row: int, lane: int) -> int:
        arrays = [self._tokens, self._labels, self._loss_weight, self._answer_mask, self._set_index]
        arrays += [self._starts, self._position]
        if self._probes is not None:
            arrays += self._probes.arrays()
        names = "\0".join([str(lane), *self._documents[row]])
        return _digest(names.encode("utf-8", "surrogateescape"), *(array[row] for array in arrays))

    def _lane_outline(self, row: int, lane: int) -> int:
        names = "\0".join([str(lane), *self._documents[row]])
        runs = np.array([(at, run.first, run.labels) for at, run in self._runs[row]], dtype=np.int64)
        return _digest(names.encode("utf-8", "surrogateescape"), self._starts[row], runs)


class ProbeBuilder:
    """The arrays of a window's probes while they are filled: [B, P, S].

    Args:
        probes: of the whole window; the process has those that read segments of its `spans`.
    """

    def __init__(
        self,
        sets: list[WeightedSet],
        lanes: int,
        segments: int,
        segment_length: int,
        probes: int,
        spans: list[range],
    ) -> None:
        self._sets = sets
        self._stride = segments // probes
        self._all = probes
        self._own_segments = {segment: i for i, segment in enumerate(s for span in spans for s in span)}
        self._own = [segment // self._stride for segment in self._own_segments if segment % self._stride == 0]
        own = len(self._own)
        shape = (lanes, own, segment_length)
        eos = sets[0].set.eos_id
        self._tokens = np.full(shape, eos, dtype=np.int64)
        self._labels = np.full(shape, eos, dtype=np.int64)
        self._loss_weight = np.zeros(shape, dtype=np.float32)
        # Where nothing can be asked the memory does not matter; the index must stay inside the probe's part.
        self._segment = np.broadcast_to(self._stride * np.arange(own), (lanes, own)).copy()

    def fill(self, row: int, runs: list[tuple[int, Run]], bits: np.random.PCG64) -> None:
        """Put questions to the documents of lane `row`, whose runs begin at the positions given with them: to that in
        which a segment begins."""
        length = self._tokens.shape[2]
        candidates: list[list[tuple[int, Run, int, Question]]] = [[] for _ in self._own]
        for at, run in runs:
            if not run.from_beginning:  # what is asked for may stand before the entry
                continue
            questions = self._sets[run.set].set.questions(run.document)
            for place in range(-(-at // length), -(-(at + run.positions) // length)):
                segment = self._own_segments.get(place)
                if segment is None:
                    continue
                first = run.first + place * length - at
                candidates[segment // self._stride] += [
                    (segment, run, first, question) for question in questions if askable(question, first, length)
                ]
        draws = bits.random_raw(self._all)
        for i, (probe, choices) in enumerate(zip(self._own, candidates, strict=True)):
            if choices:
                self._put(row, i, *choices[draw(int(draws[probe]), len(choices))])

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
