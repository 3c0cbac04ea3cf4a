"""Evaluation with real ranks: streaming, controls, layouts and what is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.distributed import cases, evaluation_cases
from tests.prepared import write_set

pytestmark = pytest.mark.distributed

SMALL = [
    "evaluate.documents=4",
    "evaluate.max_segments=8",
    "evaluate.passkey_lengths=[2,16]",
    "evaluate.passkey_depths=[0.1,0.9]",
    "evaluate.passkey_documents=3",
    "evaluate.tasks=['recall:4,length=200/300,pairs=2,questions=2']",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(write_set(tmp_path_factory.mktemp("data") / "set", [300, 90, 41, 200, 150, 129, 17, 260]))


@pytest.fixture(scope="module")
def run(pools, tmp_path_factory, data) -> str:
    """A trained run, whose memory makes a difference."""
    folder = str(tmp_path_factory.mktemp("run") / "run")
    overrides = ["train.steps=4", "model.memory.beta_init=2.0", "model.init_std=0.2", "metrics.interval=2"]
    pools.run(1, cases.train_steps, folder=folder, data=data, overrides=overrides, steps=4, save=True)
    return folder


@pytest.fixture(scope="module")
def single(pools, tmp_path_factory, run) -> dict:
    out = tmp_path_factory.mktemp("out")
    return pools.run(1, evaluation_cases.evaluate, run=run, overrides=SMALL, out=str(out))[0]


def test_streaming_does_not_change_the_losses(pools, run, data):
    found = pools.run(1, evaluation_cases.streamed_and_whole, run=run, data=data)[0]
    whole = found["windows"][8].numpy()
    assert whole.min() > 0
    for step in (4, 2, 1):
        np.testing.assert_allclose(found["windows"][step].numpy(), whole, rtol=1e-6)
    np.testing.assert_allclose(found["sums"]["on"], whole, rtol=1e-6)


def test_controls_are_what_they_are_called(pools, run, data):
    found = pools.run(1, evaluation_cases.controls, run=run, data=data)[0]
    sums = found["sums"]
    np.testing.assert_allclose(sums["off"], found["without_memory"].numpy(), rtol=1e-6)
    assert sums["shuffled"][0, 3] == pytest.approx(found["exchanged"], rel=1e-6)
    np.testing.assert_allclose(sums["reset"], found["emptied"].numpy(), rtol=1e-6)
    assert (np.abs(sums["reset"][:, 4:6] / sums["on"][:, 4:6] - 1) > 1e-4).all()
    # The first segment has nothing to remember; behind it the ways differ.
    np.testing.assert_allclose(sums["off"][:, 0], sums["on"][:, 0], rtol=1e-6)
    np.testing.assert_allclose(sums["shuffled"][:, 0], sums["on"][:, 0], rtol=1e-6)
    for control in ("off", "shuffled"):
        assert (np.abs(sums[control][:, 1:] / sums["on"][:, 1:] - 1) > 1e-4).all()


@pytest.mark.parametrize(
    "layout", ["parallel.tensor=2", "parallel.pipeline=2", "parallel.tensor=1", "parallel.context=2"]
)
def test_the_layout_does_not_change_the_results(pools, tmp_path, run, single, layout):
    results = pools.run(2, evaluation_cases.evaluate, run=run, overrides=[*SMALL, layout], out=str(tmp_path))
    assert results[0] == results[1]
    ((path, facts),) = results[0]["perplexity"].items()
    expected = single["perplexity"][path]
    assert facts["documents"] == expected["documents"] == 4
    for way in ("on", "off", "shuffled"):
        assert facts["ways"][way]["loss"] == pytest.approx(expected["ways"][way]["loss"], rel=1e-6)
        np.testing.assert_allclose(facts["ways"][way]["by_segment"], expected["ways"][way]["by_segment"], rtol=1e-5)
    assert results[0]["passkey"]["cells"] == single["passkey"]["cells"]
    assert results[0]["tasks"] == single["tasks"]
    for layer, numbers in single["memory"].items():
        for name, expected in numbers.items():
            np.testing.assert_allclose(results[0]["memory"][layer][name], expected, rtol=1e-4)


@pytest.mark.parametrize("rule", ["delta", "gated_deltanet"])
def test_context_ranks_that_share_windows_change_nothing(pools, rule):
    """Windows that their number divides and others, with what stands right before a window on every rank."""
    overrides = [f"model.memory.rule={rule}", "model.local_context=sliding", "model.memory.short_convolution=true"]
    ranks = pools.run(2, evaluation_cases.shared_windows, overrides=overrides, windows=[4, 1, 5, 2, 3])
    for found in ranks:
        alone, together = found[1], found[2]
        for name in ("loss", "correct"):
            assert together[name].shape == (3, 15, 4)
            np.testing.assert_allclose(together[name], alone[name], rtol=0, atol=1e-12)
        assert together["memory"].keys() == alone["memory"].keys()
        for name, tensor in alone["memory"].items():
            np.testing.assert_allclose(together["memory"][name], tensor, rtol=0, atol=1e-10, err_msg=name)
        # Alone each of them is a copy of the model with documents of its own.
        np.testing.assert_allclose(2 * together["sums"], alone["sums"], rtol=1e-12)
    assert 0 < ranks[0][2]["correct"].mean() < 1


def test_results_are_complete_json(run, single):
    folder = Path(single["folder"])

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    written = json.loads((folder / "results.json").read_text(), parse_constant=refuse)
    assert written == json.loads(json.dumps(single))
    assert written["step"] == 4 and written["checkpoint"].startswith(run)
    assert len(written["passkey"]["cells"]) == 1 * 2 * 3  # 2 segments of 16 tokens hold no passkey document
    (task,) = written["tasks"].values()
    assert len(task["cells"]) == 2 * 3 and {cell["answers"] for cell in task["cells"]} == {8}
    assert any("passkey lengths 2 left out" in note for note in written["notes"])
    (facts,) = written["perplexity"].values()
    assert len(facts["each_document"]) == 4 and len(facts["above_on"]["off"]["by_segment"]) == 8
    assert sum(facts["by_segment_tokens"]) == facts["tokens"]
    for name in (
        "loss_by_segment_set",
        "passkey_on",
        "passkey_off",
        "passkey_shuffled",
        "passkey_by_length",
        "task_recall_4_length_200_300_pairs_2_questions_2",
        "training_curves",
        "gates_memory_share",
    ):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob(".*")) and not list(folder.glob("*.tmp"))


def test_a_run_on_plain_text_has_no_passkey_grid(pools, tmp_path, run):
    """Unless it is asked for; the note says how."""
    overrides = ["evaluate.documents=1", "evaluate.max_segments=2"]
    (results,) = pools.run(1, evaluation_cases.evaluate, run=run, overrides=overrides, out=str(tmp_path))
    assert results["passkey"] is None and results["perplexity"]
    assert any("passkey grid was left out; --passkey asks for it" in note for note in results["notes"])


def test_tensorboard_has_each_evaluation_once(pools, tmp_path, run):
    overrides = [*SMALL, "metrics.tensorboard=true"]
    for _ in range(2):
        pools.run(1, evaluation_cases.evaluate, run=run, overrides=overrides, out=str(tmp_path), with_perplexity=False)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (tmp_path / "tensorboard" / "evaluation").iterdir()
    events = EventAccumulator(str(file)).Reload()
    (point,) = events.Scalars("3_evaluation/passkey_on/segments_16")
    assert point.step == 4 and 0 <= point.value <= 1
    assert "3_evaluation/passkey/off" in events.Tags()["images"]


def test_without_a_memory_there_are_no_controls(pools, tmp_path, data):
    folder = str(tmp_path / "plain")
    overrides = ["train.steps=4", "model.memory.rule=none"]
    pools.run(1, cases.train_steps, folder=folder, data=data, overrides=overrides, steps=1, save=True)
    results = pools.run(1, evaluation_cases.evaluate, run=folder, overrides=SMALL)[0]
    (facts,) = results["perplexity"].values()
    assert list(facts["ways"]) == results["passkey"]["controls"] == ["on"]
    assert any("no controls" in note for note in results["notes"])
    assert os.path.exists(Path(folder, "evaluation", "step_00000001", "results.json"))


def test_memory_off_is_off_in_a_sliding_context_too(pools, tmp_path, data):
    folder = str(tmp_path / "sliding")
    overrides = ["train.steps=4", "model.local_context=sliding", "model.memory.beta_init=2.0", "model.init_std=0.2"]
    pools.run(1, cases.train_steps, folder=folder, data=data, overrides=overrides, steps=1, save=True)
    found = pools.run(1, evaluation_cases.sliding_off, run=folder)[0]
    never, from_reach, only_last = found["losses"]
    np.testing.assert_allclose(from_reach.numpy(), never.numpy(), rtol=1e-6)
    assert (abs(only_last / never - 1) > 1e-4)[:, 0].all()  # the context alone would have told of the memory
    np.testing.assert_array_equal(found["counts"][1], found["whole"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"overrides": ["model.memory.skip_empty=false"]}, "model.memory.skip_empty is False"),
        ({"data": ["/nowhere"]}, "/nowhere is not a prepared set"),
        ({"checkpoint": "/nowhere"}, "no checkpoint here"),
        ({"with_synthetic": False, "with_perplexity": False}, "nothing to evaluate"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(pools, tmp_path, run, arguments, message):
    assert message in pools.run(1, evaluation_cases.refusal, run=run, out=str(tmp_path), **arguments)[0]
    assert not list(tmp_path.iterdir())
