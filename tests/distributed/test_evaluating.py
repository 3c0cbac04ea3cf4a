"""A run that evaluates itself is the run that does not, bit for bit, on every layout, stopped or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed import evaluating_cases
from tests.distributed.test_saving import files
from tests.prepared import write_set

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

LAYOUTS = {
    "tensor, context, ZeRO 3": [
        "parallel.tensor=2",
        "parallel.sequence_parallel=true",
        "parallel.context=2",
        "parallel.zero_stage=3",
    ],
    "stages, ZeRO 2": ["parallel.pipeline=2", "parallel.zero_stage=2", "bptt.chunks_per_window=2"],
}
"""Of four processes: two copies of the model. In the run context ranks evaluate other documents; `infini evaluate` is
told to let them share each."""
PRECISIONS = {"tensor, context, ZeRO 3": "bf16", "stages, ZeRO 2": "fp32"}
RUN = ["train.steps=4", "optimizer.warmup_steps=1", "checkpoint.interval=2", "metrics.interval=1"]
EVALUATION = [
    "evaluate.interval=2",
    "evaluate.documents=7",
    "evaluate.max_segments=4",
    "evaluate.interval_tasks=['passkey:5,length=300,depth=0.5']",
]
STEPS = ("step_00000002", "step_00000004")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(write_set(tmp_path_factory.mktemp("evaluating") / "set", [37, 500, 130, 64, 250, 90, 17, 400]))


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trained(run: Path) -> list[tuple]:
    """What the steps have come to."""
    names = ("loss/train", "loss/answer", "optimizer/gradient_norm", "progress/tokens")
    return [(line["step"], *(line.get(name) for name in names)) for line in lines(run) if names[0] in line]


def evaluated(run: Path) -> dict[int, dict]:
    found = [line for line in lines(run) if "evaluation/seconds" in line]
    assert len({line["step"] for line in found}) == len(found)
    return {line["step"]: line for line in found}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_of_the_run_changes(pools, data, tmp_path, layout):
    """Losses, and weights, moments, memory, lanes and random state as hashes of the checkpoints' files; the evaluation
    of step 2 is cut short by a stop file that rank 0 alone sees, and made up for by the processes that go on. What is
    found is what `infini evaluate` finds in the checkpoints."""
    settings = [*RUN, *LAYOUTS[layout], f"train.precision={PRECISIONS[layout]}"]
    without, on = tmp_path / "without", tmp_path / "with"
    pools.run(4, evaluating_cases.train, folder=str(without), data=data, overrides=settings)
    arguments = {"folder": str(on), "data": data, "overrides": [*settings, *EVALUATION]}

    ranks = pools.run(4, evaluating_cases.train, **arguments, stop_in_window=3)
    assert [(rank["error"], rank["step"]) for rank in ranks] == [(None, 2)] * 4
    printed = ranks[0]["printed"]
    assert "the evaluation of step 2 was interrupted" in printed and "stopping after step 2: stop file" in printed
    assert evaluated(on) == {}

    ranks = pools.run(4, evaluating_cases.train, **arguments, resume="latest")
    assert [(rank["error"], rank["step"]) for rank in ranks] == [(None, 4)] * 4
    assert "evaluation of step 2: set loss on" in ranks[0]["printed"]
    assert trained(on) == trained(without)
    for step in STEPS:
        assert files(on / "checkpoints" / step) == files(without / "checkpoints" / step)

    found = evaluated(on)
    assert list(found) == [2, 4]
    layout_settings = [x for x in LAYOUTS[layout] if "zero" not in x and "bptt" not in x]
    overrides = [*layout_settings, "evaluate.documents=7", "evaluate.max_segments=4", "evaluate.passkey_lengths=[]"]
    overrides.append("evaluate.tasks=['passkey:5,length=300,depth=0.5']")
    by_step = pools.run(4, evaluating_cases.evaluate_checkpoints, run=str(on), overrides=overrides)[0]
    assert [results["step"] for results in by_step] == [2, 4]
    for results in by_step:
        own = found[results["step"]]
        (facts,) = results["perplexity"].values()
        for way, numbers in facts["ways"].items():
            assert own[f"evaluation/set/loss_{way}"] == pytest.approx(numbers["loss"], rel=1e-6)
            assert own[f"evaluation/set/loss_by_segment_{way}/1"] == pytest.approx(numbers["by_segment"][1], rel=1e-6)
        (task,) = results["tasks"].values()
        for cell in task["cells"]:
            assert own[f"evaluation/task_{cell['control']}/passkey length 300, depth 0.5"] == cell["exact_match"]
    assert found[2]["evaluation/set/loss_on"] != found[4]["evaluation/set/loss_on"]
    curve = json.loads((on / "evaluation" / "curve.json").read_text())["by_step"]
    assert {step: values["evaluation/set/loss_on"] for step, values in curve.items()} == {
        str(results["step"]): next(iter(results["perplexity"].values()))["ways"]["on"]["loss"] for results in by_step
    }
    assert (on / "evaluation" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_is_stopped_in_its_last_evaluation_is_not_done(pools, data, tmp_path):
    """All its steps are: it says that it was stopped, and whoever goes on with it evaluates and is done."""
    arguments = {"folder": str(tmp_path / "run"), "data": data, "overrides": [*RUN, "train.steps=2", *EVALUATION]}
    (stopped,) = pools.run(1, evaluating_cases.train, **arguments, stop_in_window=3)
    assert (stopped["step"], stopped["done"]) == (2, False) and evaluated(tmp_path / "run") == {}
    (resumed,) = pools.run(1, evaluating_cases.train, **arguments, resume="latest")
    assert (resumed["step"], resumed["done"]) == (2, True) and list(evaluated(tmp_path / "run")) == [2]


def test_a_random_number_would_show(pools, data, tmp_path):
    for name in ("without", "with"):
        overrides = [*RUN, "train.steps=3", *(EVALUATION if name == "with" else [])]
        arguments = {"folder": str(tmp_path / name), "data": data, "overrides": overrides}
        pools.run(1, evaluating_cases.train, **arguments, draw=True)
    without, on = (files(tmp_path / name / "checkpoints" / "step_00000003") for name in ("without", "with"))
    assert without != on
