"""Which document each lane reads, and when: pure arithmetic over document lengths, nothing is read here.

Lane g of G takes as its k-th document of a set the one at place k * G + g of an endless sequence: the set's documents
in a new random order for every epoch. So all lanes together see every document once per epoch, also when there are
fewer documents than lanes; and what a lane reads depends on the sets, their weights, the seed, G and g alone: not on
ranks, other lanes or timing.

Random numbers are raw bits of PCG64, whose stream numpy guarantees; the streams of `Generator` methods may change with
a numpy release, and a run resumed after an upgrade would then go on with other documents.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from data.prepared.questions import Question

# Orders kept in memory, and entries in them (uint32: 128 MiB) while there are more than a few. Lanes straddle two or
# three epochs of a large set; a document of an order that fell out costs a sort, 0.16 s for a million documents.
_CACHED_ORDERS = 1024
_CACHED_ENTRIES = 1 << 25
_ALWAYS_CACHED_ORDERS = 4
_ORDER_STREAM, _LANE_STREAM, _SPREAD_STREAM, _PROBE_STREAM = 1, 2, 3, 4
_GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15  # 2**64 / 1.618...


class DocumentSet(Protocol):
    """What lanes need of a prepared set; `data.prepared.shards.PreparedSet` is one."""

    path: Any
    split: str
    lengths: np.ndarray
    tokenizer_hash: str
    eos_id: int

    def read(self, i: int, start: int, stop: int) -> np.ndarray: ...
    def announce(self, i: int, start: int, stop: int) -> None: ...
    def answers(self, i: int) -> list[tuple[int, int]]: ...
    def questions(self, i: int) -> list[Question]: ...
    @property
    def has_questions(self) -> bool: ...
    def document_name(self, i: int) -> str: ...


@dataclass
class WeightedSet:
    """A set in the mixture."""

    set: DocumentSet
    weight: float
    """Share of the tokens, relative to the other sets' weights."""
    answer_weight: float
    """Loss weight of answer tokens."""
    max_epochs: int | None = None
    """How often its documents are read at most; None: without end."""


class SetsSpentError(ValueError):
    """All sets have been read as often as they may be."""


@dataclass(frozen=True)
class LaneCursor:
    """Where a lane stands. Everything else about a lane follows from its number."""

    taken: tuple[int, ...]
    """Documents begun, per set. The current one is the last of its set's."""
    consumed: tuple[int, ...]
    """Tokens (labels, without padding) given out, per set."""
    credit: tuple[int, ...]
    """Tokens by which each set counts as further than `consumed`; drawn with the lane's first document."""
    set: int | None = None
    """Set of the current document; None between documents."""
    document: int | None = None
    """Index in its set of the current document."""
    segment: int = 0
    """Next segment of the current document; with packing, the next token."""
    entered: int = 0
    """Where the current document was entered, counted likewise: past 0 only for a lane's first one, see `stagger`."""
    skipped: int = 0
    """Documents that were dropped because they could not be read."""


@dataclass(frozen=True)
class Run:
    """Consecutive positions of one lane that belong to one document."""

    set: int
    document: int
    first: int
    """Token of the document that stands in the first position."""
    positions: int
    """Whole segments; with packing, as many as there are labels."""
    labels: int
    """Labels in these positions: less than `positions` where a document's last segment is padded."""
    starts: bool
    """The lane enters the document here: reset."""
    from_beginning: bool
    """The lane entered the document at its beginning."""

    def part(self, skipped: int, positions: int) -> Run:
        """Some of the positions, behind the `skipped` first ones."""
        labels = min(self.labels - skipped, positions)
        starts = self.starts and skipped == 0
        return replace(self, first=self.first + skipped, positions=positions, labels=labels, starts=starts)


class LaneSchedule:
    """The streams of `lanes` lanes over `sets`, in segments of `segment_length` tokens.

    A document of L labels takes L positions of its lane, rounded up to whole segments; with `packing` just L.

    Methods take a global lane number and a cursor and return new cursors; the object itself only caches epoch orders.

    Raises:
        ValueError: no sets, weights not positive, different tokenizers, a set without a document of two tokens.
    """

    def __init__(
        self,
        sets: list[WeightedSet],
        *,
        lanes: int,
        segment_length: int,
        seed: int,
        stagger: bool = True,
        packing: bool = False,
    ) -> None:
        _check_sets(sets)
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.lanes = lanes
        self.segment_length = segment_length
        self.seed = seed
        self.stagger = stagger
        self.packing = packing
        self._unit = 1 if packing else segment_length
        self._weights = [entry.weight for entry in sets]
        self._max_epochs = [entry.max_epochs for entry in sets]
        self._lengths = [entry.set.lengths for entry in sets]
        # A document of one token has nothing to predict; indices of the others, None where that is all of them.
        self._usable: list[np.ndarray | None] = []
        self._counts: list[int] = []
        self._mean_labels: list[int] = []
        for entry in sets:
            usable = np.flatnonzero(entry.set.lengths >= 2)
            if len(usable) == 0:
                raise ValueError(
                    f"{entry.set.path} ({entry.set.split}) has no document of at least 2 tokens: nothing to train on"
                )
            self._usable.append(None if len(usable) == len(entry.set.lengths) else usable)
            self._counts.append(len(usable))
            self._mean_labels.append(int((entry.set.lengths[usable] - 1).sum()) // len(usable))
        self._orders: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._cached_entries = 0
        self.fingerprint = self._fingerprint()

    def start(self) -> LaneCursor:
        """The cursor of any lane before its first document."""
        zeros = (0,) * len(self._counts)
        return LaneCursor(taken=zeros, consumed=zeros, credit=zeros)

    def next_run(self, lane: int, cursor: LaneCursor, room: int) -> tuple[Run, LaneCursor, LaneCursor]:
        """The lane's next positions out of one document, at most `room` of them (whole segments, without packing).

        Returns the run, the cursor behind it, and the cursor to go on from if the document turns out unreadable.
        """
        if cursor.set is None:
            cursor = self._take(lane, cursor)
        labels = int(self._lengths[cursor.set][cursor.document]) - 1
        units = -(-labels // self._unit)
        count = min(room // self._unit, units - cursor.segment)
        first = cursor.segment * self._unit
        run = Run(
            set=cursor.set,
            document=cursor.document,
            first=first,
            positions=count * self._unit,
            labels=min(labels - first, count * self._unit),
            starts=cursor.segment == cursor.entered,
            from_beginning=cursor.entered == 0,
        )
        finished = cursor.segment + count == units
        after = replace(
            _between_documents(cursor) if finished else replace(cursor, segment=cursor.segment + count),
            consumed=_add(cursor.consumed, cursor.set, run.labels),
        )
        dropped = replace(_between_documents(cursor), skipped=cursor.skipped + 1)
        return run, after, dropped

    def problem(self, cursor: LaneCursor) -> str | None:
        """What keeps a cursor that was read from a file from being one of these lanes'; None when nothing does."""
        sets = len(self._counts)
        for name in ("taken", "consumed", "credit"):
            if len(getattr(cursor, name)) != sets:
                return f"{name} has {len(getattr(cursor, name))} entries for {sets} sets"
        if cursor.set is None:
            return None if cursor.document is None else "it has a document, but no set"
        if not (0 <= cursor.set < sets and cursor.taken[cursor.set] > 0):
            return f"it is in a document of set {cursor.set}, but has begun none of its documents"
        lengths = self._lengths[cursor.set]
        if cursor.document is None or not 0 <= cursor.document < len(lengths):
            return f"it is in document {cursor.document} of a set of {len(lengths)}"
        units = -(-(int(lengths[cursor.document]) - 1) // self._unit)
        if not 0 <= cursor.entered <= cursor.segment < units:
            unit = "token" if self.packing else "segment"
            return f"it is at {unit} {cursor.segment}, entered at {cursor.entered}, of a document of {units}"
        return None

    def skip(self, lane: int, cursor: LaneCursor, positions: int) -> LaneCursor:
        """The cursor so many positions (whole segments) further on."""
        while positions:
            run, cursor, _ = self.next_run(lane, cursor, positions)
            positions -= run.positions
        return cursor

    def document(self, lane: int, number: int, k: int) -> int:
        """Index in set `number` of the k-th document (from 0) that the lane takes from it."""
        place = k * self.lanes + lane
        epoch, offset = divmod(place, self._counts[number])
        index = int(self._order(number, epoch)[offset])
        usable = self._usable[number]
        return index if usable is None else int(usable[index])

    def _take(self, lane: int, cursor: LaneCursor) -> LaneCursor:
        """Begin the next document: from the set that is farthest behind its share of the tokens.

        Consumed tokens over weight is each set's own clock, and the set whose clock shows least is next. So the shares
        are exact up to some documents of each set.
        """
        if not any(cursor.taken):
            return self._enter(lane, cursor)
        clocks = [
            (consumed + credit) / weight
            for consumed, credit, weight in zip(cursor.consumed, cursor.credit, self._weights, strict=True)
        ]
        left = self._left(lane, cursor)
        number = min(left, key=lambda number: clocks[number])
        document = self.document(lane, number, cursor.taken[number])
        return replace(cursor, taken=_add(cursor.taken, number, 1), set=number, document=document)

    def _left(self, lane: int, cursor: LaneCursor) -> list[int]:
        """The sets of which the lane may begin another document.

        Raises:
            SetsSpentError: there is none.
        """
        left = [
            number
            for number, (taken, most) in enumerate(zip(cursor.taken, self._max_epochs, strict=True))
            if most is None or (taken * self.lanes + lane) // self._counts[number] < most
        ]
        if not left:
            raise SetsSpentError(
                f"lane {lane} has read all sets as often as max_epochs allows ({self._max_epochs}): allow more, leave "
                "one set without a bound, or train fewer steps"
            )
        return left

    def _enter(self, lane: int, cursor: LaneCursor) -> LaneCursor:
        """Begin the lane's first document, as if the lane had been running for long.

        Found at a random moment, a lane reads from a set as often as the set's share of the *tokens* says (otherwise a
        short run would see few of the long documents), is anywhere in its document, and the other sets' clocks are
        anywhere between two of their documents. Without `stagger` the document is read from its beginning all the same.
        """
        entry, *phases = self._random(_LANE_STREAM, lane).random_raw(1 + len(self._counts)).tolist()
        # Steps of the golden ratio: any few lanes divide over the sets as the weights say, better than by chance.
        spread = (int(self._random(_SPREAD_STREAM).random_raw()) + lane * _GOLDEN_RATIO_64) % (1 << 64)
        shares = np.cumsum(self._weights) / sum(self._weights)
        number = min(int(np.searchsorted(shares, spread / 2**64, side="right")), len(shares) - 1)
        left = self._left(lane, cursor)  # a set may have fewer documents than there are lanes
        number = number if number in left else left[0]
        document = self.document(lane, number, 0)
        entered = 0
        if self.stagger:
            labels = int(self._lengths[number][document]) - 1
            entered = draw(entry, -(-labels // self._unit))
        credit = [draw(phase, mean) for phase, mean in zip(phases, self._mean_labels, strict=True)]
        credit[number] = entered * self._unit
        return replace(
            cursor,
            taken=_add(cursor.taken, number, 1),
            credit=tuple(credit),
            set=number,
            document=document,
            segment=entered,
            entered=entered,
        )

    def probe_bits(self, lane: int, cursor: LaneCursor) -> np.random.PCG64:
        """Random bits for the probes of the window that begins at `cursor`."""
        return self._random(_PROBE_STREAM, lane, sum(cursor.taken), cursor.segment)

    def _random(self, *stream: int) -> np.random.PCG64:
        return np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=stream))

    def _order(self, number: int, epoch: int) -> np.ndarray:
        key = (number, epoch)
        order = self._orders.get(key)
        if order is None:
            bits = self._random(_ORDER_STREAM, number, epoch).random_raw(self._counts[number])
            order = np.argsort(bits, kind="stable")
            self._orders[key] = order = order.astype(np.uint32)
            self._cached_entries += len(order)
            while len(self._orders) > _CACHED_ORDERS or (
                len(self._orders) > _ALWAYS_CACHED_ORDERS and self._cached_entries > _CACHED_ENTRIES
            ):
                self._cached_entries -= len(self._orders.popitem(last=False)[1])
        self._orders.move_to_end(key)
        return order

    def _fingerprint(self) -> str:
        """Hash of all that a cursor's meaning depends on."""
        facts = [self.seed, self.lanes, self.segment_length, self._weights]
        if any(most is not None for most in self._max_epochs):  # else the streams are those of versions without it
            facts.append(self._max_epochs)
        if self.packing:
            facts.append("packing")
        digest = hashlib.sha256(json.dumps(facts).encode())
        for lengths in self._lengths:
            digest.update(np.ascontiguousarray(lengths, dtype=np.int64).data)
        return digest.hexdigest()[:16]


def _between_documents(cursor: LaneCursor) -> LaneCursor:
    return replace(cursor, set=None, document=None, segment=0, entered=0)


def _check_sets(sets: list[WeightedSet]) -> None:
    if not sets:
        raise ValueError("there is no prepared set to read from: data.sets is empty")
    for entry in sets:
        if not (0 < entry.weight < float("inf")):
            raise ValueError(f"the weight of {entry.set.path} must be positive, got {entry.weight}")
        if entry.max_epochs is not None and entry.max_epochs < 1:
            raise ValueError(f"the max_epochs of {entry.set.path} must be at least 1, got {entry.max_epochs}")
        if not (0 <= entry.answer_weight < float("inf")):
            raise ValueError(f"the answer_weight of {entry.set.path} must not be negative, got {entry.answer_weight}")
        if entry.set.tokenizer_hash != sets[0].set.tokenizer_hash:
            raise ValueError(
                f"{sets[0].set.path} and {entry.set.path} were prepared with different tokenizers "
                f"({sets[0].set.tokenizer_hash[:12]} and {entry.set.tokenizer_hash[:12]}): "
                f"prepare one with --tokenizer and the path of the other"
            )


def draw(bits: int, below: int) -> int:
    """An integer in [0, below) from 64 random bits."""
    return (bits * below) >> 64


def _add(counts: tuple[int, ...], at: int, amount: int) -> tuple[int, ...]:
    return (*counts[:at], counts[at] + amount, *counts[at + 1 :])
