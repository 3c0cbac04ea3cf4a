"""What a step's batch comes to over all processes."""

from __future__ import annotations

import pytest
import torch

from model.config import ModelConfig
from pipeline.accounting.flops import forward_flops_per_token, keys_per_query, train_flops_per_token
from pipeline.training.batch_sums import keys_seen


@pytest.mark.parametrize("sliding", [False, True])
def test_keys_that_packed_documents_see(sliding):
    """Counted pair by pair, in a row of tokens that repeats itself: what the first segment sees of is the last one."""
    lanes, segments, length = 3, 5, 6
    starts = torch.rand(lanes, segments, length, generator=torch.Generator().manual_seed(0)) < 0.15
    starts[0] = False  # one document
    found = 0.0
    for row in starts:
        document = torch.cat([row, row]).flatten().cumsum(0).tolist()
        for token in range(segments * length, 2 * segments * length):
            begin = token // length * length
            seen = range(begin - length if sliding else begin, token)
            # Piece 0 goes on with the document of the segment before.
            found += 0.5 + sum(document[key] == document[token] for key in seen)
    assert keys_seen(starts, sliding=sliding).item() == found
    whole = ModelConfig(segment_length=length, local_context="sliding" if sliding else "segment")
    assert keys_seen(starts[:1], sliding=sliding).item() == segments * length * keys_per_query(whole)


def test_what_is_not_seen_is_not_counted():
    model = ModelConfig(vocab_size=100)
    local = forward_flops_per_token(model)["local_attention"]
    whole = train_flops_per_token(model)
    assert train_flops_per_token(model, attended=0.25) == pytest.approx(whole - 3 * 0.75 * local)
    again = train_flops_per_token(model, recompute="selective")
    assert train_flops_per_token(model, recompute="selective", attended=0.25) == pytest.approx(again - 4 * 0.75 * local)
