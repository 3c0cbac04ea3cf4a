"""Packed lanes, against a packer that lays documents end to end token by token, in plain Python."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.lanes.loader import LaneLoader, WindowBatch
from data.lanes.schedule import LaneSchedule, WeightedSet
from data.lanes.window import WHOLE, WindowPart
from tests.data.lanes.test_lanes import (
    DOCUMENT_STRIDE,
    make_loader,  # noqa: F401 (a fixture)
    questioned_sets,
    random_sets,
    sets_of,
    split_windows,
    windows,
)


class Token(NamedTuple):
    """One position of a lane."""

    name: str
    offset: int
    token: int
    label: int
    weight: float
    is_answer: bool
    starts: bool


def naive_lane(schedule: LaneSchedule, sets: list[WeightedSet], lane: int, count: int) -> list[Token]:
    """The lane's first `count` positions: where it enters and the order inside of each set are the schedule's."""
    entry, entered, _ = schedule.next_run(lane, schedule.start(), 10**9)
    assert entered.credit[entry.set] == entry.first  # what stands before the entry counts as read
    taken, given_out = [0] * len(sets), [0] * len(sets)
    number, document, first = entry.set, entry.document, entry.first
    tokens: list[Token] = []
    while True:
        source, text = sets[number].set, sets[number].set.text(document).tolist()
        for i in range(first, len(text) - 1):
            answer = any(start <= i + 1 < stop for start, stop in source.answers(document))
            weight = 1.0 if not answer else sets[number].answer_weight if first == 0 else 0.0
            tokens.append(
                Token(source.document_name(document), i, text[i], text[i + 1], weight, answer, starts=i == first)
            )
            if len(tokens) == count:
                return tokens
        taken[number] += 1
        given_out[number] += len(text) - 1 - first
        clocks = [
            (tokens_of_set + credit) / entry.weight
            for tokens_of_set, credit, entry in zip(given_out, entered.credit, sets, strict=True)
        ]
        number, first = clocks.index(min(clocks)), 0
        document = schedule.document(lane, number, taken[number])


def check_window(batch: WindowBatch, row: int, expected: list[Token]) -> None:
    """A lane of a whole window, position by position."""
    length = batch.tokens.shape[2]
    for name in ("token", "label", "weight", "is_answer", "starts"):
        field = {"token": "tokens", "label": "labels", "weight": "loss_weight", "is_answer": "answer_mask"}
        found = getattr(batch, field.get(name, name))[row].flatten().tolist()
        assert found == [getattr(token, name) for token in expected], name
    borders = expected[::length]
    assert batch.reset[row].tolist() == [token.starts for token in borders]
    assert batch.position_in_document[row].tolist() == [token.offset for token in borders]
    first, *others = expected
    assert batch.documents[row] == [first.name, *(token.name for token in others if token.starts)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(
        st.lists(st.integers(1, 40), min_size=1, max_size=6).filter(lambda own: max(own) > 1), min_size=1, max_size=3
    ),
    weights=st.tuples(*[st.sampled_from([0.25, 1.0, 3.0])] * 3),
    lanes=st.integers(1, 4),
    segments=st.integers(1, 4),
    length=st.integers(1, 9),
    seed=st.integers(0, 2**63),
    stagger=st.booleans(),
)
def test_any_documents_end_to_end(lengths, weights, lanes, segments, length, seed, stagger):
    sets = sets_of(*lengths, weights=weights[: len(lengths)])
    for entry in sets:
        entry.answer_weight = 2.5
        entry.set.spans = {i: [(n // 3, n // 2), (n - 2, n)] for i, n in enumerate(entry.set.lengths.tolist()) if n > 3}
    options = {"lanes": lanes, "segment_length": length, "seed": seed, "stagger": stagger, "packing": True}

    def make() -> LaneLoader:
        return LaneLoader(sets, **options, first_lane=0, last_lane=lanes, segments_per_window=segments, prefetch=0)

    loader, positions = make(), segments * length
    schedule = LaneSchedule(sets, **options)
    expected = [naive_lane(schedule, sets, lane, 3 * positions) for lane in range(lanes)]
    for step in range(3):
        batch = loader.next_batch()
        assert batch.padded_tokens == 0 and batch.weight == float(batch.loss_weight.sum())
        for row in range(lanes):
            check_window(batch, row, expected[row][step * positions : (step + 1) * positions])
    resumed, jumped = make(), make()
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    jumped.skip_windows(3)
    assert jumped.state_dict() == loader.state_dict()
    following = windows(loader, 2)
    assert windows(resumed, 2) == windows(jumped, 2) == following


def inside_a_document(state: dict) -> int:
    """Lanes that stand inside of a document, at no border of its segments if it stood alone."""
    return sum(cursor["set"] is not None and cursor["segment"] % 8 != 0 for cursor in state["lanes"].values())


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_run_goes_on_inside_documents_on_any_number_of_ranks(make_loader, prefetch):  # noqa: F811
    def make(first: int, last: int) -> LaneLoader:
        return make_loader(random_sets(), lanes=8, first_lane=first, last_lane=last, prefetch=prefetch, packing=True)

    expected = split_windows(make, 8, 1, 11)
    for stop in (1, 5):
        merged: dict = {"lanes": {}}
        for rank in range(2):
            part = make(4 * rank, 4 * rank + 4)
            windows(part, stop)
            merged["lanes"] |= part.state_dict()["lanes"]
        assert inside_a_document(merged) > 4
        merged = json.loads(json.dumps(merged))
        for ranks in (1, 2, 4, 8):

            def resumed(first: int, last: int, state: dict = merged) -> LaneLoader:
                loader = make(first, last)
                loader.load_state_dict(state)
                return loader

            assert split_windows(resumed, 8, ranks, 6) == expected[stop : stop + 6]


def test_states_of_packed_lanes_and_others_are_not_exchanged(make_loader):  # noqa: F811
    packed, padded = (make_loader(random_sets(), packing=packing) for packing in (True, False))
    for loader, other, told in ((packed, padded, "true"), (padded, packed, "false")):
        with pytest.raises(ValueError, match=rf"another stream of documents.*data.packing \({told}\)"):
            loader.load_state_dict(other.state_dict())
    packed.next_batch()
    state = packed.state_dict()
    lane = next(lane for lane, cursor in state["lanes"].items() if cursor["set"] is not None)
    state["lanes"][lane]["segment"] = 10**6
    with pytest.raises(ValueError, match=f"lane {lane} is damaged: it is at token {10**6}, entered at"):
        packed.load_state_dict(state)


def test_a_window_may_have_other_segments_at_a_resume(make_loader):  # noqa: F811
    loader, longer = (make_loader(random_sets(), segments_per_window=n, packing=True) for n in (3, 6))
    windows(loader, 2)
    longer.load_state_dict(loader.state_dict())
    two, one = [loader.next_batch() for _ in range(2)], longer.next_batch()
    for name in ("tokens", "labels", "loss_weight", "reset", "starts", "position_in_document"):
        assert torch.equal(getattr(one, name), torch.cat([getattr(batch, name) for batch in two], dim=1))


@pytest.mark.parametrize(("chunks", "size"), [(1, 2), (2, 2), (2, 4)])
@pytest.mark.parametrize("damaged", [False, True])
def test_parts_of_a_packed_window(chunks, size, damaged):
    """Each process has its segments, and says of the whole window where documents start; also where some are bad."""

    def make(part: WindowPart) -> LaneLoader:
        sets = questioned_sets([30, 90, 47, 200, 11, 13])
        sets[0].set.bad = {1: 61, 3: 0, 5: 4} if damaged else {}
        options = {"lanes": 4, "first_lane": 0, "last_lane": 4, "segments_per_window": 8, "segment_length": 8}
        options |= {"seed": 7, "probes_per_window": 8, "prefetch": 0, "packing": True, "skip_bad_documents": damaged}
        return LaneLoader(sets, part=part, **options)

    whole, loaders = make(WHOLE), [make(WindowPart(chunks, rank, size)) for rank in range(size)]
    starts = asked = 0
    for _ in range(12):
        expected, parts = next(whole), [next(loader) for loader in loaders]
        starts += int(expected.starts[:, :, 1:].sum())
        asked += int((expected.probes.loss_weight > 0).any(dim=2).sum())
        for rank, batch in enumerate(parts):
            part = WindowPart(chunks, rank, size)
            assert batch.part == part and batch.padded_tokens == 0
            for name in ("tokens", "labels", "loss_weight", "answer_mask", "position_in_document"):
                assert torch.equal(getattr(batch, name), part.own(getattr(expected, name))), name
            for name in ("tokens", "labels", "loss_weight"):
                assert torch.equal(getattr(batch.probes, name), part.own(getattr(expected.probes, name))), name
            for name in ("starts", "reset"):
                assert torch.equal(getattr(batch, name), getattr(expected, name)), name
            assert batch.outlines == expected.outlines and batch.documents == expected.documents
    assert starts > 30 and asked > 50
    assert {loader.skipped_documents for loader in loaders} == {whole.skipped_documents}
    assert bool(whole.skipped_documents) is damaged


def test_documents_that_cannot_be_read_leave_no_gap(make_loader):  # noqa: F811
    """What can be read of a lane stands end to end, and the lane goes on the same on every split."""

    def make(first: int, last: int) -> LaneLoader:
        sets = random_sets()
        sets[0].set.bad = {3: 0, 7: 9, 20: 20}
        sets[1].set.bad = {2: 50}
        options = {"first_lane": first, "last_lane": last, "skip_bad_documents": True, "packing": True}
        return make_loader(sets, **options)

    whole, before = make(0, 4), [None] * 4
    for _ in range(20):
        batch = whole.next_batch()
        assert batch.padded_tokens == 0 and bool((batch.loss_weight == 1).all())
        for row in range(4):
            tokens, starts = batch.tokens[row].flatten().tolist(), batch.starts[row].flatten().tolist()
            for token, start in zip(tokens, starts, strict=True):
                assert start or token - 1 == before[row]
                assert not start or token % DOCUMENT_STRIDE == 1 or before[row] is None
                before[row] = token
    assert whole.skipped_documents > 4
    halves = [make(0, 2), make(2, 4)]
    one, both = make(0, 4), [windows(half, 20) for half in halves]
    assert [a | b for a, b in zip(*both, strict=True)] == windows(one, 20)
    assert sum(half.skipped_documents for half in halves) == one.skipped_documents == whole.skipped_documents


def test_probes_go_on_with_the_document_at_the_segments_beginning(make_loader):  # noqa: F811
    sets = questioned_sets([13, 90, 47, 200, 11])
    loader = make_loader(sets, segments_per_window=4, probes_per_window=4, stagger=False, packing=True)
    asked = unaligned = 0
    for _ in range(20):
        batch = loader.next_batch()
        for row, probe in np.argwhere((batch.probes.loss_weight > 0).any(dim=2).numpy()).tolist():
            segment = int(batch.probes.segment[row, probe])
            first = int(batch.position_in_document[row, segment])
            tokens = [int(batch.probes.tokens[row, probe, 0]), *batch.probes.labels[row, probe].tolist()]
            (weighted,) = batch.probes.loss_weight[row, probe].nonzero().flatten().tolist()
            text, question, answer = tokens[: weighted - 1], tokens[weighted - 1 : weighted + 1], tokens[weighted + 1]
            assert question == [7, 8]
            # All of it of one document, and what is asked for stands before its end.
            assert text == list(range(text[0], text[0] + len(text))) and (text[0] - 1) % DOCUMENT_STRIDE == first
            assert answer - text[0] < len(text) and (answer - 1) % DOCUMENT_STRIDE in (2, 9)
            assert text[0] == batch.tokens[row, segment, 0]
            asked, unaligned = asked + 1, unaligned + (first % 8 != 0)
    assert asked > 100 and unaligned > 50


def test_stores_are_told_what_will_be_read(make_loader, monkeypatch):  # noqa: F811
    monkeypatch.setattr("data.lanes.loader.is_store", lambda path: True)
    sets, told, read = sets_of([5, 17, 60, 9]), [], []
    source, unwatched = sets[0].set, sets[0].set.read
    source.announce = lambda *span: told.append(span)
    source.read = lambda *span: read.append(span) or unwatched(*span)
    for part in (WHOLE, WindowPart(1, 1, 3)):
        loader = make_loader(sets, part=part, packing=True)
        for _ in range(10):
            loader.next_batch()
        assert told == read and len(read) > 10
        told.clear(), read.clear()
