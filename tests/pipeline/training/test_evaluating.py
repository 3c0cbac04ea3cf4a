"""What cannot be evaluated inside a run is told before its first step; which steps are evaluated, and once only."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from data.files import sealed
from pipeline.config.load import ConfigError, load_config
from pipeline.training.evaluating import Evaluation
from tests.prepared import write_set


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    whole = write_set(folder / "whole", [37, 200, 130])
    nothing = write_set(folder / "nothing", [37, 200, 130])
    manifest = json.loads((nothing / "manifest.json").read_text())
    del manifest["splits"]["valid"]
    (nothing / "manifest.json").write_text(json.dumps(sealed(manifest)))
    return {"whole": whole, "nothing": nothing}


def evaluation(path, *overrides: str) -> Evaluation:
    settings = [f"data.sets=[{{path: {path}}}]", "model.segment_length=16", "train.steps=25", "evaluate.interval=10"]
    return Evaluation(load_config(None, [*settings, *overrides]), topology=SimpleNamespace(for_documents=lambda: None))


TASK = "evaluate.interval_tasks=['{}']"


@pytest.mark.parametrize(
    "name, overrides, messages",
    [
        ("nothing", [], ["evaluate.interval = 10", "nothing holds no documents out", "evaluate.documents=0"]),
        ("whole", ["evaluate.documents=0"], ["there is nothing to measure", "evaluate.interval=null"]),
        ("whole", [TASK.format("passkey:4,length=20")], ["'passkey:4,length=20'", "a passkey document has at least"]),
        ("whole", [TASK.format("passkey:4,length=1K,filler={whole}")], ["1,024 tokens", "holds out has 367"]),
        ("whole", [TASK.format("passkey:4,length=1K,filler={nothing}")], ["evaluate.interval = 10", "valid"]),
    ],
)
def test_what_cannot_be_measured_is_refused(sets, name, overrides, messages):
    overrides = [override.format(**sets) for override in overrides]
    with pytest.raises(ConfigError) as caught:
        evaluation(sets[name], *overrides)
    assert [message for message in messages if message not in str(caught.value)] == []


def test_tasks_are_those_of_infini_evaluate_unless_there_are_others(sets):
    tasks = "evaluate.tasks=['recall:2,length=500,pairs=2']"
    assert list(evaluation(sets["whole"], tasks).work.cells) == ["recall:2,length=500,pairs=2"]
    assert list(evaluation(sets["whole"], tasks, "evaluate.interval_tasks=[]").work.cells) == []
    alone = evaluation(sets["nothing"], tasks, "evaluate.documents=0")
    assert alone.work.held_out == [] and alone.work.cells


def test_documents_that_are_shorter_than_asked_for_are_told(sets):
    (note,) = evaluation(sets["whole"], "evaluate.documents=3", "evaluate.max_segments=12").notes
    assert "3 held-out documents, 1 of them with the 12 segments of 16 tokens" in note


def test_which_steps_are_evaluated(sets, tmp_path):
    fresh = evaluation(sets["whole"])
    assert [step for step in range(26) if fresh.is_due(step)] == [10, 20, 25]
    assert evaluation(sets["whole"], "train.init_from=imported").is_due(0)


def test_a_step_is_evaluated_once(sets, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.training.evaluating.on_main", lambda action: action())
    lines = [
        {"step": 10, "evaluation/whole/loss_on": 3.0, "evaluation/seconds": 1.0},
        {"step": 20, "loss/train": 2.5},
        {"step": 25, "evaluation/whole/loss_on": 2.0, "evaluation/seconds": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    resumed = evaluation(sets["whole"])
    resumed.begin(tmp_path, 20)
    assert resumed.done == {10: 3.0}
    assert [step for step in range(26) if resumed.is_due(step)] == [20, 25]
    resumed.done[20] = 2.5
    resumed.forget_after(15)
    assert resumed.is_due(20) and not resumed.is_due(10)
