"""Processes that share a window: together they have all of it, each reads its own segments alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.lanes.loader import LaneLoader
from data.lanes.schedule import WeightedSet
from data.lanes.window import WHOLE, WindowBatch, WindowPart
from tests.data.lanes.test_lanes import questioned_sets, random_sets, sets_of

SEGMENTS, LENGTH = 8, 8
OWN = ("tokens", "labels", "loss_weight", "answer_mask", "position_in_document")


def make(sets: list[WeightedSet], part: WindowPart = WHOLE, **options) -> LaneLoader:
    shape = {"lanes": 4, "first_lane": 0, "last_lane": 4, "segments_per_window": SEGMENTS, "segment_length": LENGTH}
    return LaneLoader(sets, part=part, prefetch=0, **{"seed": 7} | shape | options)


def together(parts: list[WindowBatch], chunks: int, name: str) -> torch.Tensor:
    """The whole window out of what each process has, `[B, T, ...]` (or of its probes, `[B, P, ...]`)."""
    pieces = [getattr(part, name).chunk(chunks, dim=1) for part in parts]
    return torch.cat([piece[k] for k in range(chunks) for piece in pieces], dim=1)


@pytest.mark.parametrize(("chunks", "size"), [(1, 2), (1, 8), (2, 2), (4, 2), (2, 4)])
def test_parts_make_the_whole_window(chunks, size):
    whole = make(random_sets())
    loaders = [make(random_sets(), WindowPart(chunks, rank, size)) for rank in range(size)]
    for _ in range(12):
        expected, parts = next(whole), [next(loader) for loader in loaders]
        for name in OWN:
            assert torch.equal(together(parts, chunks, name), getattr(expected, name)), name
        for part in parts:
            assert part.tokens.shape == (4, SEGMENTS // size, LENGTH)
            assert torch.equal(part.reset, expected.reset) and part.documents == expected.documents
            assert part.outlines == expected.outlines and part.outline == expected.outline
            assert part.weight == float(part.loss_weight.sum())
        assert sum(part.padded_tokens for part in parts) == expected.padded_tokens
        assert len({part.digest for part in parts}) == size
        assert all(loader.state_dict() == whole.state_dict() for loader in loaders)


@pytest.mark.parametrize(("chunks", "size"), [(1, 2), (2, 2), (2, 4)])
def test_a_process_has_the_probes_that_read_its_segments(chunks, size):
    lengths, asked = [30, 90, 47, 200], 0
    whole = make(questioned_sets(lengths), probes_per_window=8)
    loaders = [
        make(questioned_sets(lengths), WindowPart(chunks, rank, size), probes_per_window=8) for rank in range(size)
    ]
    own = SEGMENTS // (chunks * size)
    for _ in range(8):
        expected, parts = next(whole).probes, [next(loader).probes for loader in loaders]
        for name in ("tokens", "labels", "loss_weight"):
            assert torch.equal(together(parts, chunks, name), getattr(expected, name)), name
        for rank, part in enumerate(parts):
            # The place among the process's own segments is that of the window.
            chunk, place = part.segment // own, part.segment % own
            part.segment = chunk * SEGMENTS // chunks + rank * own + place
        assert torch.equal(together(parts, chunks, "segment"), expected.segment)
        asked += int((expected.loss_weight > 0).any(dim=2).sum())
    assert asked > 50


@pytest.mark.parametrize("skip", [False, True])
def test_only_own_segments_are_read(skip):
    """Unless documents may be left out: then all must meet the same damage, and all of a window is read by each."""

    def tokens_read(part: WindowPart) -> int:
        sets = sets_of([8 * 200 + 1] * 3)
        source, counted = sets[0].set, []
        read = source.read
        source.read = lambda i, start, stop: counted.append(stop - start - 1) or read(i, start, stop)
        loader = make(sets, part, skip_bad_documents=skip)
        for _ in range(10):
            next(loader)
        return sum(counted)

    everything = tokens_read(WHOLE)
    quarters = [tokens_read(WindowPart(1, rank, 4)) for rank in range(4)]
    assert quarters == [everything if skip else everything // 4] * 4


def test_all_leave_out_a_document_that_only_one_would_have_read():
    def damaged() -> list[WeightedSet]:
        sets = sets_of([90, 300, 120, 70])
        sets[0].set.bad = {1: 160}  # from its 20th segment on
        return sets

    whole = make(damaged(), skip_bad_documents=True)
    loaders = [make(damaged(), WindowPart(2, rank, 4), skip_bad_documents=True) for rank in range(4)]
    for _ in range(60):
        expected, parts = next(whole), [next(loader) for loader in loaders]
        assert torch.equal(together(parts, 2, "tokens"), expected.tokens)
        assert {part.outline for part in parts} == {expected.outline}
    assert {loader.skipped_documents for loader in loaders} == {whole.skipped_documents}
    assert whole.skipped_documents


def test_outlines_tell_windows_of_other_documents_apart():
    loader, other = make(random_sets(), WindowPart(1, 0, 2)), make(random_sets(), WindowPart(1, 0, 2), seed=8)
    outlines = [batch.outline for batch in (next(loader), next(loader), next(other))]
    assert len(set(outlines)) == 3
    assert all(float(outline) == outline for outline in outlines)  # a float64 carries it


@pytest.mark.parametrize(
    ("part", "probes"), [(WindowPart(1, 0, 3), 0), (WindowPart(4, 0, 4), 0), (WindowPart(2, 0, 2), 2)]
)
def test_parts_that_do_not_divide_a_window_are_refused(part, probes):
    with pytest.raises(ValueError, match=f"{part.size} part.s. of each of {part.chunks} chunk"):
        make(questioned_sets([30]), part, probes_per_window=probes)


def test_spans():
    assert WindowPart().spans(8) == [range(8)]
    assert WindowPart(2, 1, 2).spans(8) == [range(2, 4), range(6, 8)]
    found = np.concatenate([np.concatenate(WindowPart(3, rank, 4).spans(24)) for rank in range(4)])
    assert sorted(found.tolist()) == list(range(24))
