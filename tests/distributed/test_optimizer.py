"""The optimizer over stages that train different things, in float64, over a resume, and where nothing learns."""

from __future__ import annotations

import json

import pytest
import torch

from data.files import sealed
from pipeline.checkpoint.folder import SUMMARY
from tests.distributed import cases, optimizer_cases
from tests.prepared import write_set

pytestmark = pytest.mark.distributed

LENGTHS = [37, 500, 130, 64, 250, 90, 17, 400]
STAGES = {
    "2 kinds, 3": ["train.trainable=[layers.0.attention.beta,layers.1.*norm*,layers.2.*]"],
    "1 kind, 1 other": ["train.trainable=[layers.0.attention.beta,layers.3.mlp.*]"],
    "1 kind, 2 of the tied embedding": ["train.trainable=[layers.1.attention.beta,embedding.weight,final_norm.weight]"],
    "some frozen at first": ["train.trainable=[layers.0.attention.*,layers.2.*]", "train.freeze_backbone_steps=2"],
}
"""Settings under which two stages train different kinds of parameters."""


@pytest.fixture(scope="module")
def train(pools, tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimizer")
    data = str(write_set(folder / "set", LENGTHS))
    count = 0

    def train(world, overrides, function=cases.train_steps, **options):
        nonlocal count
        count += 1
        arguments = {"folder": str(folder / f"run{count}"), "steps": 5} | options
        return pools.run(world, function, data=data, overrides=overrides, **arguments)[0]

    return train


@pytest.mark.parametrize("copies", [1, 2], ids=["one-copy", "two-copies"])
@pytest.mark.parametrize("trainable", STAGES.values(), ids=STAGES)
def test_stages_may_train_different_kinds_of_parameters(train, trainable, copies):
    expected = train(1, trainable)
    overrides = ["parallel.pipeline=2", f"parallel.zero_stage={copies}", "bptt.chunks_per_window=2"]
    found = train(2 * copies, [*trainable, *overrides])
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        assert (found["tensors"][name] - tensor).norm() <= 1e-4 * tensor.norm(), name  # beta that is not trained is 0


@pytest.fixture(scope="module")
def by_hand(train):
    return train(1, ["train.precision=fp64"], optimizer_cases.plain_loop)


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, ["parallel.zero_stage=1"]),
        (2, ["parallel.zero_stage=2"]),
        (2, ["parallel.zero_stage=3"]),
        (2, ["parallel.zero_stage=1", "parallel.tensor=2"]),
        (2, ["parallel.zero_stage=1", "parallel.pipeline=2", "bptt.chunks_per_window=2"]),
    ],
    ids=["zero1", "data-zero2", "data-zero3", "tensor", "pipeline"],
)
def test_float64_trains_in_float64(train, by_hand, world, overrides):
    """Against torch's AdamW over one graph: a float32 master would show at 1e-8."""
    found = train(world, ["train.precision=fp64", *overrides])
    assert found["losses"] == pytest.approx(by_hand["losses"], rel=1e-13)
    assert found["norms"] == pytest.approx(by_hand["norms"], rel=1e-11)
    for name, weight in by_hand["tensors"].items():
        assert found["tensors"][name].dtype == torch.float64
        assert (found["tensors"][name] - weight).norm() < 1e-11 * weight.norm(), name


def test_bias_correction_goes_on_where_the_first_stage_trains_the_memory_alone(train, tmp_path):
    """Adam's step count is that of the stage that trains, not rank 0's, which older checkpoints hold."""
    overrides = ["parallel.pipeline=2", "train.trainable=[layers.0.attention.beta,layers.2.*]"]
    whole = train(2, overrides, folder=str(tmp_path / "whole"), steps=6, save_at=3)
    checkpoint = tmp_path / "whole/checkpoints/step_00000003"
    summary = json.loads((checkpoint / SUMMARY).read_text())
    assert (summary["optimizer_steps"], summary["backbone_optimizer_steps"]) == (3, 3)
    (checkpoint / SUMMARY).write_text(json.dumps(sealed(summary | {"backbone_optimizer_steps": 0})))
    resumed = train(2, overrides, steps=3, resume=str(checkpoint))
    assert resumed["losses"] == whole["losses"][3:]
    assert [n for n, x in whole["tensors"].items() if not torch.equal(x, resumed["tensors"][n])] == []


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_statistics_of_the_memory_travel_as_tensors(train, layout):
    """A tensor that is pickled comes back on the device it left, which is another process's."""
    rule = ["model.memory.rule=delta", "model.memory.write_gate=hard", "model.memory.write_gate_bias=0.5"]
    rule += ["train.lanes_per_microbatch=4"]  # a mean of ratios is another one over microbatches
    expected = train(1, rule, optimizer_cases.train_and_look, steps=2)["measured"]
    found = train(2, [*rule, f"parallel.{layout}=2"], optimizer_cases.train_and_look, steps=2)
    assert found["pickled"] == []
    names = [name for name in expected if "/layer_" in name]
    assert len(names) == 4 * 7
    for name in names:
        assert found["measured"][name] == pytest.approx(expected[name], rel=1e-4), name


@pytest.mark.parametrize(
    ("world", "layout"),
    [(1, []), (2, ["parallel.pipeline=2"]), (2, ["parallel.zero_stage=3"])],
    ids=["one", "pipeline", "zero3"],
)
def test_gate_that_cannot_learn_is_said(train, world, layout):
    """A window of one segment reads no memory that it has written: its gate gets no gradient."""
    overrides = ["train.segments_per_window=1", "model.memory.write_gate=hard", "metrics.memory_interval=100", *layout]
    found = train(world, overrides, optimizer_cases.train_and_listen, steps=10, unweighted=7)
    names = (
        "layers.0.attention.write_gate.bias, layers.0.attention.write_gate.weight, layers.1.attention.write_gate.bias"
    )
    assert f"THE GRADIENT OF write_gate IS EXACTLY 0 in 10 steps: {names}" in found["printed"]
    assert found["printed"].count("THE GRADIENT OF") == 1 and "NOT MOVED" not in found["printed"]
    assert "THE GRADIENT NORM IS EXACTLY 0 at step 7: no token of this window has a loss weight" in found["printed"]
    assert found["last"]["optimizer/unmoved_parameters"] == 8
    assert found["last"]["optimizer/zero_gradient_steps"] == 1
    norms = {name: value for name, value in found["last"].items() if name.startswith("gradient_norm/")}
    assert norms.pop("gradient_norm/write_gate") == 0
    assert set(norms) == {f"gradient_norm/{kind}" for kind in ("model_matrices", "model_vectors", "mix_gate")}
    assert sum(x**2 for x in norms.values()) ** 0.5 == pytest.approx(found["last"]["optimizer/gradient_norm"], rel=1e-6)


def test_what_learns_or_is_frozen_is_not_said(train):
    overrides = ["train.freeze_backbone_steps=99", "model.memory.write_gate=hard", "model.memory.write_gate_bias=0.5"]
    found = train(1, overrides, optimizer_cases.train_and_listen, steps=10)
    assert "EXACTLY 0" not in found["printed"] and "NOT MOVED" not in found["printed"]
    assert found["last"]["optimizer/unmoved_parameters"] == 0
