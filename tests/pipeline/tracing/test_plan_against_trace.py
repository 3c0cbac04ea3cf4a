"""What a plan estimates is what a step needs: every shipped configuration, its largest rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.tracing import cases

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))

BFLOAT16 = {x.stem for x in CONFIGS if "precision: bf16" in x.read_text()}
LONG = BFLOAT16 - {"smollm2_135m_continual"}
"""With so many chunks or tokens that a trace takes a while."""

TENTH = 0.1
"""How far an estimate may be from the trace."""


def check(found):
    assert found["estimate"] == pytest.approx(found["trace"], rel=TENTH), found


@pytest.mark.parametrize(
    "path", [pytest.param(x, marks=[pytest.mark.slow] if x.stem in LONG else [], id=x.stem) for x in CONFIGS]
)
def test_two_layers_of_every_shipped_configuration(tracing_process, path):
    """Two layers a stage: what a layer needs is multiplied by their number in both."""
    check(tracing_process(cases.plan_and_trace, path=str(path), layers_per_stage=2))


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration(tracing_process, path):
    check(tracing_process(cases.plan_and_trace, path=str(path), layers_per_stage=None))


UPDATES = {
    "one rank": (1, 10**4, ""),
    "one rank, stage 3": (1, 10**4, "parallel.zero_stage=3"),
    "two share, one bucket": (2, 10**6, ""),
    "two share, several buckets": (2, 3 * 10**4, ""),
    "eight share": (8, 5 * 10**4, ""),
    "eight share, stage 2": (8, 5 * 10**4, "parallel.zero_stage=2"),
    "matrices larger than a bucket": (2, 6000, "model.memory.write_gate=sigmoid"),
    "a stage without embedding": (4, 10**4, "parallel.pipeline=2 parallel.layers_per_stage=[1,1]"),
}


@pytest.mark.parametrize(
    "settings",
    ["model.memory.rule=none", "model.memory.rule=delta", "model.memory.rule=none model.local_context=sliding"],
)
def test_packed_documents(tracing_process, settings):
    found = tracing_process(cases.packed_and_trace, settings=settings)
    assert not found["in_update"]
    check(found)


@pytest.mark.parametrize("name", UPDATES)
def test_what_reduction_and_update_need(tracing_process, name):
    world, bucket, settings = UPDATES[name]
    found = tracing_process(cases.update_and_trace, world=world, bucket=bucket, settings=settings)
    assert found["in_update"]
    check(found)
