"""The lane loader: windows of segments from endless, deterministic streams of documents, one stream per lane.

Which document comes when is decided in `data.lanes.schedule`; the tokens are laid out in `data.lanes.window`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from data.config import DataConfig
from data.files import is_store, some
from data.lanes.prefetch import Prefetcher
from data.lanes.schedule import LaneCursor, LaneSchedule, WeightedSet
from data.lanes.window import WHOLE, WindowBatch, WindowBuilder, WindowPart
from data.prepared.shards import BadDocumentError, PreparedSet

logger = logging.getLogger(__name__)

# One lane meeting this many unreadable documents one after the other has lost its storage, not some documents.
_MAX_SKIPPED_IN_A_ROW = 100


@dataclass(frozen=True)
class SetShare:
    """A set in the mixture. Tokens are labels, without padding."""

    path: str
    asked: float
    """Its share of the tokens, by its weight."""
    epoch_tokens: int
    """That reading each of its documents once gives."""
    tokens: int = 0
    """Given out so far; it is part of the lanes' state."""


class LaneLoader:
    """Windows for the lanes [first_lane, last_lane) of `lanes` global lanes, in order, without end.

    A document of n tokens gives inputs [0, n-1) and labels [1, n) and fills ceil((n-1) / S) segments; the last one is
    padded. Documents of one token are passed over, which is said.

    With `packing`, a document fills n-1 positions: the next one starts behind it, inside of the segment, which says
    where (`WindowBatch.starts`). Nothing is padded.

    With `stagger`, a lane enters its first document at a random segment (with `packing`, a random token), so that lanes
    do not reset together. What an answer in such a document asks for may stand before the entry, and training on it
    would teach guessing: answers there have weight 0.

    With `skip_bad_documents`, a document that cannot be read is left at the first segments that fail, with a warning
    that names and numbers it, and counted in the state.

    Args:
        first_lane, last_lane: this rank's lanes, last_lane exclusive.
        segments_per_window: T.
        segment_length: S, in tokens.
        probes_per_window: P, of which T is a multiple; 0 for none.
        part: which of a window's segments are this process's; only those are read. With `skip_bad_documents` all of a
            window is read, since the processes that share it must leave out the same documents.
        prefetch: windows prepared ahead in a background thread; 0 reads in `next_batch`.
        finish: what is done with a window where it was read, in that thread; None for nothing.

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
        part: WindowPart = WHOLE,
        stagger: bool = True,
        packing: bool = False,
        prefetch: int = 2,
        skip_bad_documents: bool = False,
        finish: Callable[[WindowBatch], WindowBatch] | None = None,
    ) -> None:
        for name, value in (("segments_per_window", segments_per_window), ("segment_length", segment_length)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if probes_per_window < 0 or (probes_per_window and segments_per_window % probes_per_window):
            raise ValueError(
                f"probes_per_window must be 0 or divide segments_per_window ({segments_per_window}), "
                f"got {probes_per_window}"
            )
        parts = part.chunks * part.size
        if segments_per_window % parts or probes_per_window % parts:
            raise ValueError(
                f"{part.size} part(s) of each of {part.chunks} chunk(s) must divide segments_per_window "
                f"({segments_per_window}) and probes_per_window ({probes_per_window})"
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
        total = sum(entry.weight for entry in sets)
        self._shares = [
            SetShare(str(entry.set.path), entry.weight / total, int((entry.set.lengths - 1).clip(min=0).sum()))
            for entry in sets
        ]
        self._in_stores = any(is_store(entry.set.path) for entry in sets)
        self._schedule = LaneSchedule(
            sets, lanes=lanes, segment_length=segment_length, seed=seed, stagger=stagger, packing=packing
        )
        self._lane_ids = range(first_lane, last_lane)
        if first_lane == part.rank == 0:  # not everybody says it
            for entry in sets:
                if short := int((entry.set.lengths < 2).sum()):
                    logger.warning(
                        "%s (%s): %d of %d documents have one token alone, with nothing to predict: passed over",
                        *(entry.set.path, entry.set.split, short, len(entry.set.lengths)),
                    )
        self._segments = segments_per_window
        self._segment_length = segment_length
        self._positions = segments_per_window * segment_length
        self._probes = probes_per_window
        self._part = part
        self._depth = prefetch
        self._skip_bad_documents = skip_bad_documents
        self._finish = finish
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

    @property
    def mixture(self) -> list[SetShare]:
        """What was asked of each set, and what these lanes have given out of it since the run began."""
        seen = map(sum, zip(*(cursor.consumed for cursor in self._returned), strict=True))
        return [replace(share, tokens=tokens) for share, tokens in zip(self._shares, seen, strict=True)]

    @property
    def tokenizer(self) -> tuple[str, str]:
        """Hash of the tokenizer that all the sets were prepared with, and the first one's path."""
        return self._sets[0].set.tokenizer_hash, str(self._sets[0].set.path)

    def skip_windows(self, count: int) -> None:
        """Move all lanes on by `count` windows after the last one returned, without reading them.

        The lanes stand as if the windows had been returned, but for unreadable documents inside: nobody tried to read
        them, so they take their full length.
        """
        if count < 0:
            raise ValueError(f"lanes only move forward: count must be at least 0, got {count}")
        positions = count * self._positions
        self._rewind(
            [
                self._schedule.skip(lane, cursor, positions)
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
                f"the saved state lacks lanes {some(map(str, missing), 8)}; "
                f"it holds lanes {some(map(str, sorted(map(int, lanes))), 8)}"
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
                f"weights, the seed ({schedule.seed}), the number of lanes ({schedule.lanes}), the segment length "
                f"({schedule.segment_length}) and data.packing ({str(schedule.packing).lower()}) must be those of the "
                "run that saved it"
            )
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in state.items() if k != "stream"}
        cursor = LaneCursor(**fields)
        if problem := schedule.problem(cursor):
            raise ValueError(f"the saved state of lane {lane} is damaged: {problem}")
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
        if self._in_stores:
            self._announce()
        window = WindowBuilder(
            self._sets,
            len(self._lane_ids),
            self._segments,
            self._segment_length,
            self._probes,
            self._part,
            packing=self._schedule.packing,
            read_all=self._skip_bad_documents,
        )
        cursors = [
            self._read_lane(window, row, lane, cursor)
            for row, (lane, cursor) in enumerate(zip(self._lane_ids, self._ahead, strict=True))
        ]
        self._ahead = cursors
        batch = window.batch(self._lane_ids)
        return (self._finish(batch) if self._finish else batch), cursors

    def _announce(self) -> None:
        """Tell the sets what the window behind `_ahead` will read of them: stores fetch it side by side."""
        length = self._segment_length
        spans = WHOLE.spans(self._segments) if self._skip_bad_documents else self._part.spans(self._segments)
        for lane, cursor in zip(self._lane_ids, self._ahead, strict=True):
            at = 0
            while at < self._positions:
                run, cursor, _ = self._schedule.next_run(lane, cursor, self._positions - at)
                for span in spans:
                    start, stop = max(span.start * length, at), min(span.stop * length, at + run.positions)
                    if start < stop:
                        own = run.part(start - at, stop - start)
                        self._sets[run.set].set.announce(run.document, own.first, own.first + own.labels + 1)
                at += run.positions

    def _read_lane(self, window: WindowBuilder, row: int, lane: int, cursor: LaneCursor) -> LaneCursor:
        at = failures = 0
        begin = cursor
        while at < self._positions:
            run, after, dropped = self._schedule.next_run(lane, cursor, self._positions - at)
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
                cursor = dropped
                logger.warning("lane %d skips a document, number %d of this lane: %s", lane, cursor.skipped, error)
            else:
                failures = 0
                cursor = after
                at += run.positions
        if self._probes:
            window.ask(row, self._schedule.probe_bits(lane, begin))
        return cursor


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
    part: WindowPart = WHOLE,
    split: str = "train",
    finish: Callable[[WindowBatch], WindowBatch] | None = None,
) -> LaneLoader:
    """The loader over the prepared sets that `config` names.

    Raises:
        ValueError: a set cannot be opened, or as `LaneLoader`.
    """
    sets = [
        WeightedSet(PreparedSet(entry.path, split), entry.weight, entry.answer_weight, entry.max_epochs)
        for entry in config.sets
    ]
    return LaneLoader(
        sets,
        lanes=lanes,
        first_lane=first_lane,
        last_lane=last_lane,
        segments_per_window=segments_per_window,
        segment_length=segment_length,
        seed=seed,
        probes_per_window=probes_per_window,
        part=part,
        stagger=config.stagger,
        packing=config.packing,
        prefetch=config.prefetch,
        skip_bad_documents=config.skip_bad_documents,
        finish=finish,
    )
