"""The lane loader: every lane the same endless stream on any layout, and windows that say what the documents say."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig, SetConfig
from data.lanes.loader import LaneLoader, WeightedSet, WindowBatch, build_loader
from data.lanes.prefetch import Prefetcher
from data.lanes.schedule import LaneSchedule
from data.lanes.window import WindowBuilder
from data.prepared.manifest import write_manifest
from data.prepared.questions import Question
from data.prepared.shard_writer import ShardSetWriter
from data.prepared.shards import BadDocumentError
from data.tokenizer.info import TokenizerEntry

EOS = 0
DOCUMENT_STRIDE = 100_000  # token i of document d is 1 + d * stride + i: a token tells where it comes from


class MemorySet:
    """A prepared set in memory."""

    split = "train"
    eos_id = EOS
    vocab_size = 1 << 40

    def __init__(self, lengths: list[int], *, number: int = 0, tokenizer_hash: str = "tokenizer-a") -> None:
        self.path = f"set-{number}"
        self.tokenizer_hash = tokenizer_hash
        self.lengths = np.array(lengths, dtype=np.int64)
        self.first_document = number * 1000
        self.spans: dict[int, list[tuple[int, int]]] = {}
        self.bad: dict[int, int] = {}
        self.has_questions = False
        self.on_read: Callable[[int], None] = lambda i: None

    def text(self, i: int) -> np.ndarray:
        tokens = 1 + (self.first_document + i) * DOCUMENT_STRIDE + np.arange(self.lengths[i])
        tokens[-1] = EOS
        return tokens

    def read(self, i: int, start: int, stop: int) -> np.ndarray:
        self.on_read(i)
        assert 0 <= start < stop <= self.lengths[i]
        if i in self.bad and stop > self.bad[i]:
            raise BadDocumentError(f"document {self.document_name(i)} cannot be read")
        return self.text(i)[start:stop]

    def answers(self, i: int) -> list[tuple[int, int]]:
        return self.spans.get(i, [])

    def questions(self, i: int) -> list[Question]:
        return []

    def document_name(self, i: int) -> str:
        return f"{self.path}:{i}"


def sets_of(*lengths: list[int], weights: tuple[float, ...] | None = None) -> list[WeightedSet]:
    weights = weights or (1.0,) * len(lengths)
    return [WeightedSet(MemorySet(own, number=i), weights[i], 1.0) for i, own in enumerate(lengths)]


def random_sets() -> list[WeightedSet]:
    draw = np.random.default_rng(5)
    return sets_of(draw.integers(1, 60, 23).tolist(), draw.integers(1, 200, 5).tolist(), weights=(2.0, 1.0))


@pytest.fixture
def make_loader():
    """`LaneLoader` with small defaults; closed at the end of the test."""
    made: list[LaneLoader] = []

    def make(sets: list[WeightedSet], **options) -> LaneLoader:
        lanes = options.pop("lanes", 4)
        defaults = {
            "first_lane": 0,
            "last_lane": lanes,
            "segments_per_window": 3,
            "segment_length": 8,
            "seed": 7,
            "prefetch": 0,
        }
        made.append(LaneLoader(sets, lanes=lanes, **defaults | options))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def lane_hashes(batch: WindowBatch) -> dict[int, str]:
    """Per lane a hash over everything in the batch."""
    hashes = {}
    for row, lane in enumerate(batch.lane_ids.tolist()):
        digest = hashlib.sha256(json.dumps(batch.documents[row]).encode())
        names = ["tokens", "labels", "loss_weight", "answer_mask", "reset", "position_in_document"]
        for name in names + (["starts"] if batch.starts is not None else []):
            digest.update(getattr(batch, name)[row].contiguous().numpy().tobytes())
        hashes[lane] = digest.hexdigest()
    return hashes


def windows(loader: LaneLoader, count: int) -> list[dict[int, str]]:
    return [lane_hashes(loader.next_batch()) for _ in range(count)]


def split_windows(make: Callable[[int, int], LaneLoader], lanes: int, ranks: int, count: int) -> list[dict[int, str]]:
    own = lanes // ranks
    parts = [windows(make(rank * own, (rank + 1) * own), count) for rank in range(ranks)]
    return [dict(item for part in parts for item in part[step].items()) for step in range(count)]


def segments_of(batch: WindowBatch, row: int):
    """(document, first token offset, segment, reset) of each segment, from the tokens alone."""
    for t in range(batch.tokens.shape[1]):
        document, offset = divmod(int(batch.tokens[row, t, 0]) - 1, DOCUMENT_STRIDE)
        yield document, offset, t, bool(batch.reset[row, t])


def check_against_documents(batch: WindowBatch, sets: list[WeightedSet]) -> None:
    """Every position of the window, compared with the raw documents in the plainest way."""
    padded = 0
    length = batch.tokens.shape[2]
    for row in range(len(batch.lane_ids)):
        for document, offset, t, _ in segments_of(batch, row):
            assert offset == batch.position_in_document[row, t]
            assert offset % length == 0
            owner = sets[document // 1000].set
            text = owner.text(document % 1000).tolist()
            assert owner.document_name(document % 1000) in batch.documents[row]
            for position in range(length):
                here = (row, t, position)
                if offset + position + 1 < len(text):
                    assert batch.tokens[here] == text[offset + position]
                    assert batch.labels[here] == text[offset + position + 1]
                    assert batch.loss_weight[here] == 1
                else:
                    assert batch.tokens[here] == batch.labels[here] == EOS
                    assert batch.loss_weight[here] == 0
                    padded += 1
    assert batch.padded_tokens == padded


# The stream


def test_a_lane_is_the_same_on_every_split(make_loader):
    def make(first: int, last: int, prefetch: int = 0) -> LaneLoader:
        return make_loader(random_sets(), lanes=8, first_lane=first, last_lane=last, prefetch=prefetch)

    whole = split_windows(make, 8, 1, 12)
    assert len({value for window in whole for value in window.values()}) > 80  # lanes and windows differ
    for ranks in (2, 4):
        assert split_windows(lambda first, last: make(first, last, prefetch=2), 8, ranks, 12) == whole


@pytest.mark.parametrize("change", ["seed", "weights", "stagger"])
def test_the_stream_depends_on(make_loader, change):
    base = windows(make_loader(random_sets()), 4)
    assert base == windows(make_loader(random_sets()), 4)
    sets = random_sets()
    if change == "weights":
        sets[0].weight = 0.5
    other = make_loader(sets, **{"seed": {"seed": 8}, "stagger": {"stagger": False}}.get(change, {}))
    assert windows(other, 4) != base


def test_every_document_once_per_epoch_and_reshuffled():
    lanes, documents = 6, 15
    schedule = LaneSchedule(sets_of([5] * documents), lanes=lanes, segment_length=8, seed=1)
    taken = [schedule.document(lane, 0, k) for k in range(10) for lane in range(lanes)]  # 60: four epochs
    epochs = [taken[start : start + documents] for start in range(0, len(taken), documents)]
    assert len(epochs) == 4
    assert all(sorted(epoch) == list(range(documents)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_is_fixed_for_all_time():
    """A resumed run needs it: this changes only with a change of the stream's definition, never with numpy."""
    schedule = LaneSchedule(sets_of([5] * 7), lanes=2, segment_length=8, seed=1)
    assert [schedule.document(0, 0, k) for k in range(7)] == [1, 2, 4, 0, 5, 2, 3]


def test_an_order_that_left_the_cache_comes_back_the_same(monkeypatch):
    monkeypatch.setattr("data.lanes.schedule._CACHED_ENTRIES", 20)
    schedule = LaneSchedule(sets_of([5] * 9), lanes=2, segment_length=8, seed=1)
    first = [schedule.document(0, 0, k) for k in range(200)]
    assert len(schedule._orders) == 4
    assert schedule._cached_entries == 36
    assert [schedule.document(0, 0, k) for k in range(200)] == first


def test_the_loader_takes_every_document_once_per_epoch(make_loader):
    """Through the loader, one-token documents left out: 12 documents, 4 lanes, all of one segment."""
    loader = make_loader(sets_of([1, 4, 9, 7, 1, 5, 3, 2, 8, 6, 9, 4, 3, 9]), segments_per_window=1)
    for _ in range(3):
        seen = Counter(name for _ in range(3) for own in loader.next_batch().documents for name in own)
        assert seen == {f"set-0:{i}": 1 for i in range(14) if i not in (0, 4)}


def test_fewer_documents_than_lanes(make_loader):
    loader = make_loader(sets_of([9, 9, 9]), lanes=7, segments_per_window=1)
    seen = Counter(own[0] for _ in range(3) for own in loader.next_batch().documents)
    assert seen == {"set-0:0": 7, "set-0:1": 7, "set-0:2": 7}


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 1.0), (0.05, 0.95)])
def test_mixture_shares_are_of_tokens(make_loader, weights):
    draw = np.random.default_rng(2)
    sets = sets_of(draw.integers(2, 40, 30).tolist(), draw.integers(100, 300, 9).tolist(), weights=weights)
    loader = make_loader(sets, segments_per_window=2000, stagger=False)
    loader.skip_windows(1)
    for cursor in loader.state_dict()["lanes"].values():
        expected = weights[0] / sum(weights) * sum(cursor["consumed"])
        assert abs(cursor["consumed"][0] - expected) <= 2 * 300  # a document of each set
        assert sum(cursor["consumed"]) > 2000


@pytest.mark.parametrize("share", [0.5, 0.8, 0.1])
def test_shares_hold_over_the_lanes_of_a_short_run(make_loader, share):
    """Also when a set's documents are longer than the run: its tokens must not come last (or first)."""
    draw = np.random.default_rng(2)
    sets = sets_of(draw.integers(40, 120, 200).tolist(), [9000, 7000, 12_000] * 70, weights=(1 - share, share))
    loader = make_loader(sets, lanes=200, segments_per_window=10)
    for windows_more in (1, 9, 40, 150):  # at the last 16,000 tokens of each lane
        loader.skip_windows(windows_more)
        consumed = np.sum([own["consumed"] for own in loader.state_dict()["lanes"].values()], axis=0)
        assert consumed[1] / consumed.sum() == pytest.approx(share, rel=0.12, abs=0.04)


def test_what_stands_before_the_entry_counts_as_read_in_the_mixture(make_loader):
    """The first document takes its whole length of its set's share, though the lane reads only its end."""
    loader = make_loader(sets_of([800] * 9, [800] * 9), lanes=20, segments_per_window=1)
    before = loader.next_batch().position_in_document[:, 0].tolist()
    assert max(before) > 400
    for lane, cursor in loader.state_dict()["lanes"].items():
        first = 0 if cursor["taken"][0] else 1
        assert cursor["credit"][first] == before[int(lane)]
        assert 0 <= cursor["credit"][1 - first] < 800


@pytest.mark.parametrize("lanes", [4, 8, 13, 64])
def test_lanes_divide_over_the_sets_at_once(make_loader, lanes):
    sets = sets_of([900] * 50, [900] * 50, [900] * 50, weights=(2.0, 1.0, 1.0))
    for seed in range(5):
        names = [own[0] for own in make_loader(sets, lanes=lanes, seed=seed).next_batch().documents]
        for number, share in enumerate((0.5, 0.25, 0.25)):
            assert abs(sum(name.startswith(f"set-{number}") for name in names) - share * lanes) < 2


def test_lanes_read_the_sets_in_different_orders(make_loader):
    loader = make_loader(sets_of([9] * 50, [9] * 50, weights=(4.0, 1.0)), lanes=40, segments_per_window=10)
    orders = {tuple(name.split(":")[0] for name in own) for own in loader.next_batch().documents}
    assert len(orders) >= 5


def test_stagger_keeps_resets_apart(make_loader):
    def resets_together(stagger: bool) -> int:
        loader = make_loader(sets_of([8 * 40] * 30), lanes=20, segments_per_window=40, stagger=stagger)
        first = loader.next_batch()
        assert bool(first.reset[:, 0].all())
        assert bool((first.position_in_document[:, 0] == 0).all()) is not stagger
        return int(loader.next_batch().reset.sum(0).max())

    assert resets_together(stagger=False) == 20
    assert resets_together(stagger=True) <= 5


# The windows


def test_windows_say_what_the_documents_say(make_loader):
    sets = random_sets()
    loader = make_loader(sets, prefetch=2)
    resets = 0
    following: dict[int, tuple[int, int]] = {}
    for step in range(40):
        batch = loader.next_batch()
        check_against_documents(batch, sets)
        assert batch.lane_ids.tolist() == [0, 1, 2, 3]
        for row in range(4):
            for document, offset, t, reset in segments_of(batch, row):
                # A segment without a reset goes on where the lane's last segment ended, and one with a reset begins.
                if reset:
                    assert offset == 0 or (step == 0 and t == 0)
                else:
                    assert following[row] == (document, offset)
                following[row] = (document, offset + 8)
                resets += reset
    assert resets > 50
    shapes = {name: tuple(getattr(batch, name).shape) for name in ("tokens", "labels", "loss_weight", "answer_mask")}
    assert set(shapes.values()) == {(4, 3, 8)}
    assert batch.tokens.dtype == batch.labels.dtype == batch.position_in_document.dtype == torch.int64
    assert batch.loss_weight.dtype == torch.float32
    assert batch.answer_mask.dtype == batch.reset.dtype == torch.bool


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8).filter(lambda own: max(own) > 1),
    lanes=st.integers(1, 5),
    segments=st.integers(1, 4),
    length=st.integers(1, 9),
    seed=st.integers(0, 2**63),
    stagger=st.booleans(),
)
def test_any_documents(lengths, lanes, segments, length, seed, stagger):
    sets = sets_of(lengths)

    def make() -> LaneLoader:
        return LaneLoader(
            sets,
            lanes=lanes,
            first_lane=0,
            last_lane=lanes,
            segments_per_window=segments,
            segment_length=length,
            seed=seed,
            stagger=stagger,
            prefetch=0,
        )

    loader = make()
    for _ in range(3):
        check_against_documents(loader.next_batch(), sets)
    resumed, jumped = make(), make()
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    jumped.skip_windows(3)
    assert jumped.state_dict() == loader.state_dict()
    expected = windows(loader, 2)
    assert windows(resumed, 2) == expected
    assert windows(jumped, 2) == expected


def answer_tokens(batch: WindowBatch, row: int) -> list[int]:
    return batch.labels[row][batch.answer_mask[row]].tolist()


def test_answers_are_marked_and_weighted(make_loader):
    sets = sets_of([30])
    sets[0].answer_weight = 5.0
    memory: MemorySet = sets[0].set
    memory.spans[0] = [(0, 1), (1, 2), (7, 11), (28, 30)]  # before any label; first label; over a border; to the end
    batch = make_loader(sets, lanes=1, segments_per_window=4, stagger=False).next_batch()
    text = memory.text(0).tolist()
    assert answer_tokens(batch, 0) == [text[i] for i in (1, 7, 8, 9, 10, 28, 29)]
    assert torch.equal(batch.loss_weight == 5, batch.answer_mask)
    assert int((batch.loss_weight == 1).sum()) == 29 - 7
    assert batch.padded_tokens == int((batch.loss_weight == 0).sum()) == 3

    # The same in windows of one segment: spans are cut where the windows are.
    loader = make_loader(sets, lanes=1, segments_per_window=1, stagger=False)
    parts = [loader.next_batch() for _ in range(4)]
    assert torch.equal(torch.cat([part.answer_mask for part in parts], dim=1), batch.answer_mask)
    assert torch.equal(torch.cat([part.loss_weight for part in parts], dim=1), batch.loss_weight)


def test_answers_weigh_nothing_in_a_document_entered_past_its_beginning(make_loader):
    sets = sets_of([32])
    sets[0].answer_weight = 5.0
    sets[0].set.spans[0] = [(30, 32)]
    loader = make_loader(sets, lanes=16, segments_per_window=1)
    entered = loader.next_batch().position_in_document[:, 0] > 0
    assert 4 < int(entered.sum()) < 16
    weights: list[list[float]] = [[] for _ in range(16)]
    loader = make_loader(sets, lanes=16, segments_per_window=1)
    for _ in range(8):
        batch = loader.next_batch()
        for row in range(16):
            weights[row] += batch.loss_weight[row][batch.answer_mask[row]].tolist()
    for row in range(16):
        assert weights[row][:4] == ([0, 0] if entered[row] else [5, 5]) + [5, 5]


# State


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("stop", [0, 1, 5])
def test_resume_on_other_splits(make_loader, prefetch, stop):
    def make(first: int, last: int) -> LaneLoader:
        return make_loader(random_sets(), lanes=4, first_lane=first, last_lane=last, prefetch=prefetch)

    expected = split_windows(make, 4, 1, stop + 6)[stop:]
    merged: dict = {"lanes": {}}
    for rank in range(2):
        part = make(2 * rank, 2 * rank + 2)
        windows(part, stop)
        merged["lanes"] |= part.state_dict()["lanes"]
    merged = json.loads(json.dumps(merged))
    for ranks in (1, 2, 4):

        def resumed(first: int, last: int) -> LaneLoader:
            loader = make(first, last)
            windows(loader, 2)  # a loader in use can be set as well
            loader.load_state_dict(merged)
            return loader

        assert split_windows(resumed, 4, ranks, 6) == expected


def test_a_window_may_change_its_segments_at_a_resume(make_loader):
    loader = make_loader(random_sets())
    windows(loader, 2)
    longer = make_loader(random_sets(), segments_per_window=6)
    longer.load_state_dict(loader.state_dict())
    two = [loader.next_batch() for _ in range(2)]
    one = longer.next_batch()
    for name in ("tokens", "labels", "loss_weight", "reset", "position_in_document"):
        assert torch.equal(getattr(one, name), torch.cat([getattr(batch, name) for batch in two], dim=1))


def test_prefetching_does_not_move_the_state(make_loader):
    ahead, plain = make_loader(random_sets(), prefetch=3), make_loader(random_sets())
    for _ in range(4):
        assert lane_hashes(ahead.next_batch()) == lane_hashes(plain.next_batch())
        deadline = time.monotonic() + 10
        while len(ahead._prefetcher._ready) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert ahead.state_dict() == plain.state_dict()


def test_skipping_windows_equals_reading_them(make_loader):
    read, skipped = make_loader(random_sets(), prefetch=2), make_loader(random_sets(), prefetch=2)
    windows(read, 13)
    windows(skipped, 2)
    reads: list[int] = []
    skipped.skip_windows(0)
    skipped._stop_prefetcher()
    for entry in skipped._sets:
        entry.set.on_read = reads.append
    skipped.skip_windows(11)
    assert reads == []
    assert skipped.state_dict() == read.state_dict()
    assert windows(skipped, 3) == windows(read, 3)


def test_states_that_do_not_fit_are_refused(make_loader):
    state = make_loader(random_sets(), lanes=4, last_lane=2).state_dict()
    with pytest.raises(ValueError, match="lacks lanes 2, 3; it holds lanes 0, 1"):
        make_loader(random_sets(), lanes=4).load_state_dict(state)
    full = make_loader(random_sets()).state_dict()
    changed = random_sets()
    changed[1].set.lengths[0] += 1
    reweighted = random_sets()
    reweighted[0].weight = 1.0
    for sets, options in (
        (random_sets(), {"seed": 8}),
        (random_sets(), {"segment_length": 4}),
        (random_sets(), {"lanes": 3}),
        (random_sets()[:1], {}),
        (changed, {}),
        (reweighted, {}),
    ):
        with pytest.raises(ValueError, match="belongs to another stream"):
            make_loader(sets, **options).load_state_dict(full)
    loader = make_loader(random_sets())
    loader.next_batch()
    damaged = loader.state_dict()
    lane = next(lane for lane, cursor in damaged["lanes"].items() if cursor["set"] is not None)
    damaged["lanes"][lane]["document"] += 1
    with pytest.raises(ValueError, match=f"state of lane {lane} is damaged"):
        make_loader(random_sets()).load_state_dict(damaged)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"taken": [1]}, "taken has 1 entries for 2 sets"),
        ({"set": 9}, "it is in a document of set 9"),
        ({"document": None}, "it is in document None of a set"),
        ({"document": 10**9}, f"it is in document {10**9} of a set"),
        ({"segment": 10**9}, f"it is at segment {10**9}, entered at"),
        ({"segment": 0, "entered": 1}, "it is at segment 0, entered at 1"),
        ({"set": None}, "it has a document, but no set"),
    ],
)
def test_a_cursor_outside_of_the_data_is_refused(make_loader, change, reason):
    """A segment past the end of its document made `skip_windows` go on for ever."""
    loader = make_loader(random_sets())
    loader.next_batch()
    state = loader.state_dict()
    lane = next(lane for lane, cursor in state["lanes"].items() if cursor["set"] is not None)
    state["lanes"][lane].update(change)
    with pytest.raises(ValueError, match=f"state of lane {lane} is damaged: {reason}"):
        make_loader(random_sets()).load_state_dict(state)


# When things go wrong


@pytest.mark.parametrize(
    ("sets", "options", "message"),
    [
        ([], {}, "data.sets is empty"),
        (sets_of([1, 1, 0]), {}, "set-0 .train. has no document of at least 2 tokens"),
        (sets_of([]), {}, "no document of at least 2 tokens"),
        (sets_of([9], [9], weights=(1.0, 0.0)), {}, "weight of set-1 must be positive, got 0.0"),
        (sets_of([9], weights=(float("nan"),)), {}, "weight of set-0 must be positive"),
        ([WeightedSet(MemorySet([9]), 1.0, -1.0)], {}, "answer_weight of set-0"),
        (
            [*sets_of([9]), WeightedSet(MemorySet([9], number=1, tokenizer_hash="tokenizer-b"), 1.0, 1.0)],
            {},
            "set-0 and set-1 were prepared with different tokenizers .tokenizer-a and tokenizer-b",
        ),
        (sets_of([9]), {"seed": -1}, "seed must not be negative"),
        (sets_of([9]), {"last_lane": 5}, r"lanes \[0, 5\) are not a part of lanes \[0, 4\)"),
        (sets_of([9]), {"first_lane": 4}, r"lanes \[4, 4\)"),
        (sets_of([9]), {"segments_per_window": 0}, "segments_per_window must be at least 1"),
        (sets_of([9]), {"segment_length": 0}, "segment_length must be at least 1"),
        (sets_of([9]), {"prefetch": -1}, "prefetch must be at least 0"),
    ],
)
def test_settings_that_cannot_be(make_loader, sets, options, message):
    with pytest.raises(ValueError, match=message):
        make_loader(sets, **options)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_bad_document_stops_with_its_own_message(make_loader, prefetch):
    sets = sets_of([9] * 20)
    loader = make_loader(sets, lanes=2, segments_per_window=1, prefetch=prefetch)
    names = [loader.next_batch().documents for _ in range(10)]
    bad = names[6][1][0]
    sets[0].set.bad[int(bad.split(":")[1])] = 0
    loader = make_loader(sets, lanes=2, segments_per_window=1, prefetch=prefetch)
    assert [loader.next_batch().documents for _ in range(6)] == names[:6]
    state = loader.state_dict()
    for _ in range(3):
        with pytest.raises(BadDocumentError, match=f"^document {bad} cannot be read$"):
            loader.next_batch()
    assert loader.state_dict() == state
    loader.skip_windows(1)  # rolling on past the window that cannot be read
    assert [loader.next_batch().documents for _ in range(3)] == names[7:]


def test_skipped_documents_are_counted_and_the_same_on_every_split(make_loader):
    def sets() -> list[WeightedSet]:
        made = random_sets()
        made[0].set.bad = {3: 0, 7: 9, 20: 20}
        made[1].set.bad = {2: 50}
        return made

    def make(first: int, last: int) -> LaneLoader:
        return make_loader(sets(), first_lane=first, last_lane=last, prefetch=2, skip_bad_documents=True)

    whole = make(0, 4)
    expected = [lane_hashes(whole.next_batch()) for _ in range(20)]
    plain = make_loader(sets(), skip_bad_documents=True)
    for _ in range(20):
        check_against_documents(plain.next_batch(), sets())
    assert whole.skipped_documents == plain.skipped_documents > 4
    assert expected != windows(make_loader(random_sets()), 20)

    halves = [make(0, 2), make(2, 4)]
    first, second = (windows(half, 20) for half in halves)
    assert [a | b for a, b in zip(first, second, strict=True)] == expected
    assert sum(half.skipped_documents for half in halves) == whole.skipped_documents

    resumed = make(0, 4)
    resumed.load_state_dict({"lanes": halves[0].state_dict()["lanes"] | halves[1].state_dict()["lanes"]})
    assert resumed.skipped_documents == whole.skipped_documents
    assert windows(resumed, 3) == windows(whole, 3)


def test_a_set_that_cannot_be_read_at_all_stops(make_loader):
    sets = sets_of([9] * 5, [9] * 5)
    sets[1].set.bad = dict.fromkeys(range(5), 0)
    loader = make_loader(sets, skip_bad_documents=True)
    with pytest.raises(
        ValueError, match="more than 100 documents in a row that cannot be read; the last: document set-1"
    ):
        windows(loader, 10)


def test_any_error_of_the_background_thread_arrives(make_loader):
    def fail(i: int) -> None:
        raise MemoryError("no memory left")

    sets = sets_of([9] * 5)
    sets[0].set.on_read = fail
    loader = make_loader(sets, prefetch=2)
    for _ in range(2):
        with pytest.raises(MemoryError, match="no memory left") as caught:
            loader.next_batch()
        assert caught.traceback[-1].name == "fail"
    loader.close()


def test_close_joins_the_thread(make_loader):
    loader = make_loader(random_sets(), prefetch=2)
    loader.next_batch()
    thread = loader._prefetcher._thread
    assert thread.is_alive()
    loader.close()
    loader.close()
    assert not thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_close_wakes_a_waiting_consumer():
    release, caught = threading.Event(), []
    prefetcher = Prefetcher(lambda: release.wait(10), 1)

    def consume() -> None:
        try:
            prefetcher.next()
        except RuntimeError as error:
            caught.append(str(error))

    consumer = threading.Thread(target=consume)
    consumer.start()
    closer = threading.Thread(target=prefetcher.close)
    closer.start()
    consumer.join(5)
    assert caught == ["the prefetcher is closed"]
    release.set()
    closer.join(5)
    assert not closer.is_alive()


def test_prefetcher_keeps_order_and_depth():
    made: list[int] = []

    def produce() -> int:
        made.append(len(made))
        return made[-1]

    prefetcher = Prefetcher(produce, 2)
    for expected in range(50):
        assert prefetcher.next() == expected
        assert len(made) <= expected + 1 + 2 + 1  # taken, ready, and one begun when the consumer took its own
    prefetcher.close()


# A real prepared set


def write_set(folder: Path, documents: list[np.ndarray], answers: dict[int, list[tuple[int, int]]]) -> None:
    folder.mkdir()
    writer = ShardSetWriter(folder, "train", 257, shard_bytes=4096)
    for i, document in enumerate(documents):
        writer.add(document, id=str(i), source="test", answers=answers.get(i))
    entry = TokenizerEntry(kind="byte", hash="0" * 64, vocab_size=257, eos_id=256)
    manifest = write_manifest(folder, tokenizer=entry, splits={"train": writer.close()})
    assert len(manifest.splits["train"].shards) > 2


def test_prepared_sets_on_disk(tmp_path):
    draw = np.random.default_rng(3)
    documents = [np.append(draw.integers(0, 256, n), 256) for n in draw.integers(1, 900, 30)]
    write_set(tmp_path / "text", documents, {})
    write_set(tmp_path / "passkeys", documents, {i: [(len(own) - 6, len(own) - 1)] for i, own in enumerate(documents)})
    config = DataConfig(
        sets=[SetConfig(str(tmp_path / "text"), 3.0), SetConfig(str(tmp_path / "passkeys"), 1.0, answer_weight=4.0)],
        stagger=False,
    )
    shape = {"lanes": 2, "first_lane": 0, "last_lane": 2, "segments_per_window": 4, "segment_length": 64, "seed": 3}
    loader = build_loader(config, **shape)
    streams: list[list[int]] = [[], []]
    answered = 0
    for _ in range(100):
        batch = loader.next_batch()
        assert torch.equal(batch.loss_weight == 4, batch.answer_mask)
        answered += int(batch.answer_mask.sum())
        for row in range(2):
            # Inputs start a document, labels continue it to its end: together the lane's documents, one after another.
            for t in range(4):
                if batch.reset[row, t]:
                    streams[row].append(int(batch.tokens[row, t, 0]))
                streams[row] += batch.labels[row, t][batch.loss_weight[row, t] > 0].tolist()
            assert all(str(tmp_path) in name for name in batch.documents[row])
    loader.close()
    assert answered > 50
    known = {tuple(document.tolist()) for document in documents}
    for stream in streams:
        ends = [i + 1 for i, token in enumerate(stream) if token == 256]
        assert len(ends) > 30
        for start, end in zip([0, *ends], ends, strict=False):
            assert tuple(stream[start:end]) in known

    resumed = build_loader(config, **shape)
    resumed.load_state_dict(loader.state_dict())
    again = build_loader(config, **shape)
    again.skip_windows(100)
    assert windows(resumed, 3) == windows(again, 3)
    resumed.close()
    again.close()
    with pytest.raises(ValueError, match="has no split 'valid'"):
        build_loader(config, **shape, split="valid")


def test_a_damaged_shard_stops_or_is_skipped(tmp_path, caplog):
    draw = np.random.default_rng(3)
    documents = [np.append(draw.integers(0, 256, 300), 256) for _ in range(30)]
    write_set(tmp_path / "text", documents, {})
    config = DataConfig(sets=[SetConfig(str(tmp_path / "text"))])
    shape = {"lanes": 2, "first_lane": 0, "last_lane": 2, "segments_per_window": 4, "segment_length": 64, "seed": 3}
    stopping = build_loader(config, **shape)
    config.skip_bad_documents = True
    skipping = build_loader(config, **shape)
    shard = tmp_path / "text" / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:1500])
    with pytest.raises(BadDocumentError, match=r"train-000001\.tar:\d+ ends early"):
        windows(stopping, 40)
    stopping.close()
    windows(skipping, 40)
    skipping.close()
    assert skipping.skipped_documents > 2
    assert "train-000001.tar" in caplog.text


def questioned_sets(lengths: list[int]) -> list[WeightedSet]:
    """Every document can be asked for its third token, and for its tenth."""
    sets = sets_of(lengths)
    source = sets[0].set
    sets[0].answer_weight = 5.0

    def questions(i: int) -> list[Question]:
        text = source.text(i)
        return [Question((7, 8, int(text[at])), (2, 3), after=at + 1) for at in (2, 9)]

    source.questions, source.has_questions = questions, True
    return sets


def test_probes_ask_what_has_been_read(make_loader):
    """Each probe goes on with the document where its segment starts, then asks, and only for what was read by then."""
    sets = questioned_sets([30, 90, 47, 200])
    loader = make_loader(sets, segments_per_window=4, probes_per_window=2, stagger=False)
    asked = 0
    for _ in range(12):
        batch = loader.next_batch()
        probes = batch.probes
        for row, probe in itertools.product(range(4), range(2)):
            segment = int(probes.segment[row, probe])
            assert segment // 2 == probe
            if not probes.loss_weight[row, probe].any():
                continue
            asked += 1
            # S inputs and labels: 8 + 1 tokens, the last three of them the question.
            tokens = [int(probes.tokens[row, probe, 0]), *probes.labels[row, probe].tolist()]
            if EOS in tokens:
                tokens = tokens[: tokens.index(EOS)]
            first = int(batch.position_in_document[row, segment])
            text, question = tokens[:-3], tokens[-3:]
            assert question[:2] == [7, 8]
            assert text == batch.tokens[row, segment, : len(text)].tolist()
            answer_at = question[2] - text[0] + first
            assert answer_at in (2, 9) and answer_at < first + len(text)
            weighted = probes.loss_weight[row, probe].nonzero().flatten().tolist()
            assert weighted == [len(tokens) - 2]
            assert probes.loss_weight[row, probe, weighted[0]] == 5.0
            assert probes.labels[row, probe, weighted[0]] == question[2]
    assert asked > 50


def probe_hashes(loader: LaneLoader, count: int) -> list[dict[int, str]]:
    result = []
    for _ in range(count):
        batch = loader.next_batch()
        fields = vars(batch.probes).values()
        result.append(
            {lane: str([x[row].tolist() for x in fields]) for row, lane in enumerate(batch.lane_ids.tolist())}
        )
    return result


def test_probes_are_the_same_on_any_split_and_after_a_resume(make_loader):
    def make(first: int, last: int) -> LaneLoader:
        options = {"first_lane": first, "last_lane": last, "segments_per_window": 4, "probes_per_window": 4}
        return make_loader(questioned_sets([30, 90, 47, 200]), lanes=4, **options)

    expected = probe_hashes(make(0, 4), 10)
    parts = [probe_hashes(make(lane, lane + 1), 10) for lane in range(4)]
    assert [dict(item for part in parts for item in part[step].items()) for step in range(10)] == expected
    interrupted = make(0, 4)
    probe_hashes(interrupted, 6)
    resumed = make(0, 4)
    resumed.load_state_dict(interrupted.state_dict())
    assert probe_hashes(resumed, 4) == expected[6:]
    assert len({h for step in expected for h in step.values()}) > 30


def test_probes_do_not_change_the_windows(make_loader):
    plain = make_loader(questioned_sets([30, 90, 47, 200]), segments_per_window=4)
    probed = make_loader(questioned_sets([30, 90, 47, 200]), segments_per_window=4, probes_per_window=2)
    assert windows(plain, 8) == windows(probed, 8)


def test_probes_need_questions_and_an_even_spread(make_loader):
    with pytest.raises(ValueError, match="no document of the prepared sets has questions"):
        make_loader(sets_of([30]), segments_per_window=4, probes_per_window=2)
    with pytest.raises(ValueError, match="divide segments_per_window"):
        make_loader(questioned_sets([30]), segments_per_window=4, probes_per_window=3)


def test_a_lanes_digest_is_over_all_that_the_lane_gets():
    def fresh() -> WindowBuilder:
        return WindowBuilder(random_sets(), lanes=2, segments=2, segment_length=8, probes=2)

    whole = fresh().batch(range(2))
    assert fresh().batch(range(2)).digests == whole.digests and fresh().batch(range(2)).digest == whole.digest
    assert whole.digests[0] != whole.digests[1]  # the lane's number is in it
    window, probes = vars(fresh()), vars(fresh()._probes)
    arrays = [(name, ()) for name, value in window.items() if isinstance(value, np.ndarray)]
    arrays += [(name, ("_probes",)) for name, value in probes.items() if isinstance(value, np.ndarray)]
    assert len(arrays) == 7 + 4
    for name, inside in arrays:
        builder = fresh()
        owner = builder._probes if inside else builder
        array = getattr(owner, name)
        array[1].flat[-1] = not array[1].flat[-1] if array.dtype == bool else array[1].flat[-1] + 1
        changed = builder.batch(range(2))
        assert changed.digests[0] == whole.digests[0] and changed.digests[1] != whole.digests[1], name
        assert changed.digest != whole.digest and float(changed.digest) == changed.digest
    builder = fresh()
    builder._documents[0].append("set-0/3")
    assert builder.batch(range(2)).digests[0] != whole.digests[0]


def test_two_loaders_of_the_same_lanes_have_equal_digests(make_loader):
    one, other = (make_loader(random_sets()) for _ in range(2))
    digests = [[loader.next_batch().digest for _ in range(6)] for loader in (one, other)]
    assert digests[0] == digests[1] and len(set(digests[0])) == 6


def read_often(make_loader, sets, windows: int, **options) -> dict[str, int]:
    """How often each document was begun."""
    batches = make_loader(sets, **{"stagger": False} | options)
    begun: dict[str, int] = {}
    for _ in range(windows):
        for row in batches.next_batch().documents:
            for name in row:
                begun[name] = begun.get(name, 0) + 1
    return begun


@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_a_set_is_read_as_often_as_it_may_be_and_the_others_go_on(make_loader, lanes):
    sets = sets_of([5] * 6, [9] * 10, weights=(5.0, 1.0))  # documents of one segment each
    sets[0].max_epochs = 2
    begun = read_often(make_loader, sets, 40, lanes=lanes)
    assert [begun[f"set-0:{number}"] for number in range(6)] == [2] * 6
    assert sum(count for name, count in begun.items() if name.startswith("set-1")) == 40 * 3 * lanes - 12


def test_a_cap_that_is_not_reached_changes_no_document(make_loader):
    free, capped = random_sets(), random_sets()
    capped[0].max_epochs = 1_000_000
    loaders = [make_loader(sets) for sets in (free, capped)]
    for _ in range(30):
        assert len({str(loader.next_batch().digests) for loader in loaders}) == 1
    # But it is said in the state, because later it would.
    with pytest.raises(ValueError, match="another stream of documents"):
        loaders[1].load_state_dict(loaders[0].state_dict())


def test_lanes_that_have_read_all_they_may_say_so_and_go_on_from_a_state(make_loader):
    sets = sets_of([5] * 6, [9] * 3, weights=(1.0, 1.0))
    for entry in sets:
        entry.max_epochs = 3
    loader = make_loader(sets, lanes=3, stagger=False)
    loader.next_batch()
    other = make_loader(sets, lanes=3, stagger=False)
    other.load_state_dict(loader.state_dict())
    assert other.next_batch().digests == loader.next_batch().digests
    with pytest.raises(ValueError, match=r"has read all sets as often as max_epochs allows \(\[3, 3\]\)"):
        for _ in range(9):
            loader.next_batch()
    few = sets_of([5], weights=(1.0,))
    few[0].max_epochs = 1
    with pytest.raises(ValueError, match="lane 1 has read all sets"):  # which has nothing to begin with
        make_loader(few, lanes=2, segments_per_window=1).next_batch()
    few[0].max_epochs = 0
    with pytest.raises(ValueError, match="max_epochs of set-0 must be at least 1"):
        make_loader(few)


def test_the_mixture_is_counted_as_asked_and_as_seen(make_loader):
    sets = sets_of([20] * 5, [90] * 7, weights=(3.0, 1.0))
    loaders = [make_loader(sets, first_lane=first, last_lane=first + 2) for first in (0, 2)]
    labels = [0, 0]
    for _ in range(25):
        for loader in loaders:
            batch = loader.next_batch()
            for row, names in enumerate(batch.documents):
                kinds = {int(name[4]) for name in names}
                if len(kinds) == 1:  # a window of one set's documents
                    labels[kinds.pop()] += int((batch.loss_weight[row] > 0).sum())
    shares = [loader.mixture for loader in loaders]
    assert [(share.asked, share.epoch_tokens) for share in shares[0]] == [(0.75, 95), (0.25, 623)]
    tokens = [sum(of_loader[number].tokens for of_loader in shares) for number in (0, 1)]
    assert all(seen >= counted > 0 for seen, counted in zip(tokens, labels, strict=True))
    assert tokens[0] / sum(tokens) == pytest.approx(0.75, abs=0.08)
    assert sum(tokens) == sum(
        sum(cursor["consumed"]) for loader in loaders for cursor in loader.state_dict()["lanes"].values()
    )
