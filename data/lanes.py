"""The lane loader: windows of segments from endless, deterministic streams of documents, one stream per lane.

Which document comes when is decided in `data.lane_schedule`; here the tokens are read and laid out.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data.config import DataConfig
from data.lane_schedule import LaneCursor, LaneSchedule, Run, WeightedSet, draw
from data.prefetch import Prefetcher
from data.questions import Question, askable
from data.shards import BadDocumentError, PreparedSet

logger = logging.getLogger(__name__)

# One lane meeting this many unreadable documents one after the other has lost its storage, not some documents.
_MAX_SKIPPED_IN_A_ROW = 100


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


class LaneLoader:
    """Windows for the lanes [first_lane, last_lane) of `lanes` global lanes, in order, without end.

    A document of n tokens gives inputs [0, n-1) and labels [1, n) and fills ceil((n-1) / S) segments; the last one is
    padded. Documents of one token are passed over.

    With `stagger`, a lane enters its first document at a random segment, so that lanes do not reset together. What an
    answer in such a document asks for may stand before the entry, and training on it would teach guessing: answers
    there have weight 0.

    With `skip_bad_documents`, a document that cannot be read is left at the first segments that fail, with a warning,
    and counted.

    Args:
        first_lane, last_lane: this rank's lanes, last_lane exclusive.
        segments_per_window: T.
        segment_length: S, in tokens.
        probes_per_window: P, of which T is a multiple; 0 for none.
        prefetch: windows prepared ahead in a background thread; 0 reads in `next_batch`.

    Raises:
        ValueError: a setting that cannot be; sets that do not fit together or hold nothing to train on.
    """

    def __init__(
        self,
        sets: list[WeightedSet],
        *,
        lanes: int,
        first_lane: int,
        last_lane: int,
        segments_per_window: int,
        segment_length: int,
        seed: int,
        probes_per_window: int = 0,
        stagger: bool = True,
        prefetch: int = 2,
        skip_bad_documents: bool = False,
    ) -> None:
        for name, value in (("segments_per_window", segments_per_window), ("segment_length", segment_length)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if probes_per_window < 0 or (probes_per_window and segments_per_window % probes_per_window):
            raise ValueError(
                f"probes_per_window must be 0 or divide segments_per_window ({segments_per_window}), "
                f"got {probes_per_window}"
            )
        if probes_per_window and not any(entry.set.has_questions for entry in sets):
            raise ValueError(
                "probes_per_window: no document of the prepared sets has questions "
                f"({', '.join(str(entry.set.path) for entry in sets)}); synthetic sources have"
            )
        if prefetch < 0:
            raise ValueError(f"prefetch must be at least 0, got {prefetch}")
        if not 0 <= first_lane < last_lane <= lanes:
            raise ValueError(f"lanes [{first_lane}, {last_lane}) are not a part of lanes [0, {lanes})")
        self._sets = sets
        self._schedule = LaneSchedule(sets, lanes=lanes, segment_length=segment_length, seed=seed, stagger=stagger)
        self._lane_ids = range(first_lane, last_lane)
        self._segments = segments_per_window
        self._segment_length = segment_length
        self._probes = probes_per_window
        self._depth = prefetch
        self._skip_bad_documents = skip_bad_documents
        # Two sets of cursors: behind the last window returned, which is what is saved, and behind the last one read.
        self._returned: list[LaneCursor] = [self._schedule.start() for _ in self._lane_ids]
        self._ahead = self._returned
        self._prefetcher: Prefetcher[tuple[WindowBatch, list[LaneCursor]]] | None = None
        self._closed = False

    def next_batch(self) -> WindowBatch:
        """The next window of every lane.

        Raises:
            BadDocumentError: a document cannot be read. The windows before it are returned first, and every later call
                raises again.
            RuntimeError: after `close()`.
        """
        if self._closed:
            raise RuntimeError("the lane loader is closed")
        if self._depth == 0:
            batch, self._returned = self._read_window()
            return batch
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._read_window, self._depth)
        batch, self._returned = self._prefetcher.next()
        return batch

    def __iter__(self) -> Iterator[WindowBatch]:
        return self

    def __next__(self) -> WindowBatch:
        return self.next_batch()

    @property
    def skipped_documents(self) -> int:
        """Unreadable documents that these lanes have left out since the run began (it is part of the state)."""
        return sum(cursor.skipped for cursor in self._returned)

    def skip_windows(self, count: int) -> None:
        """Move all lanes on by `count` windows after the last one returned, without reading them.

        The lanes stand as if the windows had been returned, but for unreadable documents inside: nobody tried to read
        them, so they take their full length.
        """
        if count < 0:
            raise ValueError(f"lanes only move forward: count must be at least 0, got {count}")
        segments = count * self._segments
        self._rewind(
            [
                self._schedule.skip(lane, cursor, segments)
                for lane, cursor in zip(self._lane_ids, self._returned, strict=True)
            ]
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the lanes stand after the last window returned, by global lane number; JSON-able.

        The states of several ranks are merged by merging their "lanes". A window may have another number of segments
        when a state is loaded; all else that decides the stream must be the same, which each cursor's "stream" checks.
        """
        lanes = {}
        for lane, cursor in zip(self._lane_ids, self._returned, strict=True):
            state = dataclasses.asdict(cursor) | {"stream": self._schedule.fingerprint}
            lanes[str(lane)] = {k: list(v) if isinstance(v, tuple) else v for k, v in state.items()}
        return {"lanes": lanes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, which holds these lanes and maybe others.

        Raises:
            ValueError: a lane is missing, or the state belongs to other data or settings.
        """
        lanes = state["lanes"]
        missing = [lane for lane in self._lane_ids if str(lane) not in lanes]
        if missing:
            raise ValueError(
                f"the saved state lacks lanes {_some(missing)}; it holds lanes {_some(sorted(map(int, lanes)))}"
            )
        self._rewind([self._cursor(lane, lanes[str(lane)]) for lane in self._lane_ids])

    def close(self) -> None:
        """Stop the background thread and join it. Sets stay open: they belong to the caller."""
        self._closed = True
        self._stop_prefetcher()

    def _cursor(self, lane: int, state: dict[str, Any]) -> LaneCursor:
        schedule = self._schedule
        if state["stream"] != schedule.fingerprint:
            raise ValueError(
                f"the saved state of lane {lane} belongs to another stream of documents: the prepared sets, their "
                f"weights, the seed ({schedule.seed}), the number of lanes ({schedule.lanes}) and the segment length "
                f"({schedule.segment_length}) must be those of the run that saved it"
            )
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in state.items() if k != "stream"}
        cursor = LaneCursor(**fields)
        if cursor.set is not None:
            expected = schedule.document(lane, cursor.set, cursor.taken[cursor.set] - 1)
            if cursor.document != expected:
                raise ValueError(
                    f"the saved state of lane {lane} is damaged: its document is number {cursor.document} of "
                    f"{self._sets[cursor.set].set.path}, where the lane's order has {expected}"
                )
        return cursor

    def _rewind(self, cursors: list[LaneCursor]) -> None:
        self._stop_prefetcher()
        self._returned = self._ahead = cursors

    def _stop_prefetcher(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def _read_window(self) -> tuple[WindowBatch, list[LaneCursor]]:
        """Read the window behind `_ahead`. Lanes move on only when the whole window has been read."""
        window = _Window(self._sets, len(self._lane_ids), self._segments, self._segment_length, self._probes)
        cursors = [
            self._read_lane(window, row, lane, cursor)
            for row, (lane, cursor) in enumerate(zip(self._lane_ids, self._ahead, strict=True))
        ]
        self._ahead = cursors
        return window.batch(self._lane_ids), cursors

    def _read_lane(self, window: _Window, row: int, lane: int, cursor: LaneCursor) -> LaneCursor:
        at = failures = 0
        runs: list[tuple[int, Run]] = []
        begin = cursor
        while at < self._segments:
            run, after, dropped = self._schedule.next_run(lane, cursor, self._segments - at)
            try:
                window.read(row, at, run)
            except BadDocumentError as error:
                if not self._skip_bad_documents:
                    raise
                failures += 1
                if failures > _MAX_SKIPPED_IN_A_ROW:
                    raise ValueError(
                        f"lane {lane} met more than {_MAX_SKIPPED_IN_A_ROW} documents in a row that cannot be read; "
                        f"the last: {error}"
                    ) from error
                logger.warning("lane %d skips a document: %s", lane, error)
                cursor = dropped
            else:
                failures = 0
                cursor = after
                runs.append((at, run))
                at += run.segments
        if self._probes:
            window.ask(row, runs, self._schedule.probe_bits(lane, begin))
        return cursor


class _Window:
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
        self._probes = _Probes(sets, lanes, segments, segment_length, probes) if probes else None

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
        )


class _Probes:
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

    def batch(self) -> ProbeBatch:
        return ProbeBatch(
            tokens=torch.from_numpy(self._tokens),
            labels=torch.from_numpy(self._labels),
            loss_weight=torch.from_numpy(self._loss_weight),
            segment=torch.from_numpy(self._segment),
        )


def build_loader(
    config: DataConfig,
    *,
    lanes: int,
    first_lane: int,
    last_lane: int,
    segments_per_window: int,
    segment_length: int,
    seed: int,
    probes_per_window: int = 0,
    split: str = "train",
) -> LaneLoader:
    """The loader over the prepared sets that `config` names.

    Raises:
        ValueError: a set cannot be opened, or as `LaneLoader`.
    """
    sets = [WeightedSet(PreparedSet(entry.path, split), entry.weight, entry.answer_weight) for entry in config.sets]
    return LaneLoader(
        sets,
        lanes=lanes,
        first_lane=first_lane,
        last_lane=last_lane,
        segments_per_window=segments_per_window,
        segment_length=segment_length,
        seed=seed,
        probes_per_window=probes_per_window,
        stagger=config.stagger,
        prefetch=config.prefetch,
        skip_bad_documents=config.skip_bad_documents,
    )


def _some(lanes: list[int]) -> str:
    shown = ", ".join(map(str, lanes[:8]))
    return f"{shown}, ... ({len(lanes)} in all)" if len(lanes) > 8 else shown
