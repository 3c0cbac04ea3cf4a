"""Tasks of lm-evaluation-harness on several processes: the answers are those of one."""

from __future__ import annotations

import pytest

from tests.distributed import lm_eval_cases
from tests.lm_eval_tasks import TASKS, write_tasks

pytestmark = pytest.mark.distributed

pytest.importorskip("lm_eval", reason="the extra `lm-eval` is not installed")


@pytest.fixture(scope="module")
def given(pools, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("lm_eval")
    run = pools.run(1, lm_eval_cases.write, folder=str(folder / "run"))[0]
    return {"run": run, "tasks": str(write_tasks(folder / "tasks")), "cache": str(folder / "cache")}


@pytest.fixture(scope="module")
def single(pools, given, tmp_path_factory) -> dict:
    out = str(tmp_path_factory.mktemp("single"))
    return pools.run(1, lm_eval_cases.answers, **given, out=out, overrides=[])[0]


@pytest.mark.parametrize("overrides", [["parallel.tensor=2"], ["parallel.pipeline=2"], []], ids=["TP", "PP", "DP"])
def test_the_layout_does_not_change_the_answers(pools, given, single, tmp_path, overrides):
    found = pools.run(2, lm_eval_cases.answers, **given, out=str(tmp_path), overrides=overrides)[0]
    for task in TASKS:
        for mine, other in zip(found["answers"][task], single["answers"][task], strict=True):
            assert mine == expected(other)
    assert sum(found["results"]["layout"].values()) == 4
    assert found["results"]["results"]["choose"]["acc,none"] == single["results"]["results"]["choose"]["acc,none"]


def expected(answer):
    """The same lists, with numbers to rounding."""
    if isinstance(answer, list):
        return [expected(part) for part in answer]
    return pytest.approx(answer, rel=1e-9) if isinstance(answer, float) else answer


def test_processes_that_ask_different_things_are_told_so(pools, given):
    for message in pools.run(2, lm_eval_cases.unequal_requests, run=given["run"]):
        assert "different requests" in message
