"""Losses by segment of the document and by set, against sums token by token; packed or not, in parts or whole."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from data.lanes.loader import LaneLoader
from data.lanes.window import WindowPart
from pipeline.training import grouped_losses
from pipeline.training.grouped_losses import LossBySegment, LossBySet, bucket_name, segment_bucket
from tests.data.lanes.test_lanes import DOCUMENT_STRIDE, sets_of

LENGTH, SEGMENTS = 8, 8


def token_by_token(batches, losses):
    """Sums of losses and weights by bucket's name and by set, of whole windows of one lane without stagger."""
    by_segment, by_set = defaultdict(lambda: [0.0, 0.0]), defaultdict(lambda: [0.0, 0.0])
    place, borders = None, 0
    for batch, token_loss in zip(batches, losses, strict=True):
        rows = (x.flatten().tolist() for x in (batch.tokens, batch.loss_weight, token_loss))
        for position, (token, weight, loss) in enumerate(zip(*rows, strict=True)):
            if not weight:
                continue
            begins = (token - 1) % DOCUMENT_STRIDE == 0
            assert begins or token - 1 == place
            # A document that begins on a border has crossed none.
            borders = 0 if begins else borders + (position % LENGTH == 0)
            place = token
            for sums, group in (
                (by_segment, bucket_name(int(segment_bucket(torch.tensor(borders))))),
                (by_set, (token - 1) // DOCUMENT_STRIDE // 1000),
            ):
                sums[group][0] += loss * weight
                sums[group][1] += weight
    return [{group: loss / weight for group, (loss, weight) in sums.items()} for sums in (by_segment, by_set)]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("chunks", "size"), [(1, 1), (2, 2)])
def test_means_are_those_of_the_tokens(monkeypatch, packing, chunks, size):
    monkeypatch.setattr(grouped_losses.dist, "all_reduce", lambda sums: None)

    def make(part: WindowPart) -> LaneLoader:
        sets = sets_of([5, 70, 13, 9, 120], [30, 8, 11], weights=(2.0, 1.0))
        for entry in sets:
            entry.set.spans, entry.answer_weight = {1: [(4, 7)]}, 3.0
        options = {"lanes": 1, "first_lane": 0, "last_lane": 1, "segments_per_window": SEGMENTS, "prefetch": 0}
        return LaneLoader(sets, segment_length=LENGTH, seed=3, stagger=False, packing=packing, part=part, **options)

    torch.manual_seed(0)
    whole, parts = make(WindowPart()), [WindowPart(chunks, rank, size) for rank in range(size)]
    batches = [whole.next_batch() for _ in range(10)]
    losses = [torch.rand(1, SEGMENTS, LENGTH, dtype=torch.float64) for _ in batches]
    segments, sets = LossBySegment(torch.device("cpu")), LossBySet(2, torch.device("cpu"))
    for part in parts:  # all processes' sums in one, as the reduction makes them
        loader = make(part)
        for loss in losses:
            batch = loader.next_batch()
            segments.add(batch, part.own(loss), LENGTH)
            sets.add(batch, part.own(loss))
    by_segment, by_set = token_by_token(batches, losses)
    assert {"0", "1", "8-15"} <= set(by_segment) and set(by_set) == {0, 1}
    found = {bucket_name(bucket): loss for bucket, loss in segments.collect().items()}
    assert found == pytest.approx(by_segment, rel=1e-12)
    assert sets.collect() == pytest.approx(by_set, rel=1e-12)
    assert segments.collect() == sets.collect() == {}
