"""How long a step waits for data-parallel traffic: small cases added up by hand, and the plan's own numbers."""

from __future__ import annotations

import pytest

from pipeline.accounting.communication import reduction_bytes
from pipeline.accounting.exposure import LastBackward, exposed_s
from pipeline.accounting.footprint import per_rank_bytes
from pipeline.accounting.planner import Rates, predict_step
from pipeline.config.load import load_config


def test_a_reduction_starts_with_its_gradient_and_behind_the_one_before():
    # Complete at 1, 2, 3 and 3; on the link from 1 to 1.5, 2 to 4, 4 to 5, 5 to 5.25.
    last = LastBackward(end_s=3.0, parts=[(1.0, 0.5), (1.0, 2.0), (1.0, 1.0), (0.0, 0.25)])
    assert last.reduced_s(overlapped=True) == 5.25
    assert last.reduced_s(overlapped=False) == 3.0 + 3.75


def test_a_stage_that_ends_early_reduces_while_the_others_work():
    early, late = LastBackward(10.0, [(2.0, 4.0)]), LastBackward(15.0, [(2.0, 1.0), (1.0, 0.5)])
    assert exposed_s([early, late], 15.0, overlapped=False) == 1.5
    assert exposed_s([early, late], 15.0, overlapped=True) == 0.5
    assert exposed_s([early], 15.0, overlapped=True) == 0.0


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.tensor=2"],
        ["parallel.pipeline=2", "model.tie_embeddings=false"],
        ["model.tie_embeddings=false", "parallel.zero_stage=3", "bptt.recompute_logits=true"],
    ],
)
def test_parts_add_up_to_all_gradients_of_a_rank(overrides):
    """Computing takes no time here: what the step waits for is the reduction of the slowest stage."""
    config = load_config(None, ["model.num_layers=4", "model.vocab_size=1000", "train.lanes=8", *overrides])
    step = predict_step(config, 8, 1000, Rates(1e30, 1e9))
    most = max(reduction_bytes(config, 8, needs.gradients) for needs in per_rank_bytes(config, 8, 1000))
    assert step.reduction_s == pytest.approx(most / 1e9, rel=0.02)  # transfers between stages take their latency
    assert step.overlapped_reduction_s <= step.reduction_s * (1 + 1e-9)
    assert step.gathering_s * 1e9 == pytest.approx(max(step.data_sent) - most, rel=1e-6)


def test_overlapping_hides_at_most_the_last_backward():
    """Llama 3 8B on 64 devices without stages: one chunk of 128 goes back while reductions run."""
    config = load_config("configs/llama3_8b.yaml", ["parallel.pipeline=1", "parallel.layers_per_stage=null"])
    step = predict_step(config, 64, 128256, Rates(0.4 * 989.5e12, 50e9, 450e9))
    hidden = step.reduction_s - step.overlapped_reduction_s
    assert 0 < hidden < step.pipeline_s / 64
    assert 0.05 < step.data_s / step.step_s < 0.1
