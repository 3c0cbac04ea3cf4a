"""What a plan estimates is what a step needs: every shipped configuration, its largest rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.tracing import cases

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


BFLOAT16 = {x.stem for x in CONFIGS if "precision: bf16" in x.read_text()}
LONG = BFLOAT16 | {"llama3_8b_continual", "paper_1b_passkey", "paper_8b_books", "qwen3_8b_continual"}
"""Like one of the others, or with so many chunks that a trace takes a while."""


def check(found):
    assert found["estimate"] == pytest.approx(found["trace"], rel=0.1), found


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
