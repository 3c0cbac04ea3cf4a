"""Diagnosis: each made-up illness is named, and a healthy memory is left alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from model.config import MemoryConfig
from pipeline.reporting.diagnosis import MIN_STEPS, LayerNumbers, diagnose, diagnose_run, read_history

HEALTHY = LayerNumbers(
    mix_gate_range=(0.2, 0.8),
    share_of_output=0.3,
    write_gate=0.02,
    norm_M=5.0,
    norm_z=100.0,
    effective_rank=6.0,
    read_variation=0.4,
)
MEMORY = MemoryConfig(rule="delta", write_gate="hard")
STEPS = (200, 400, 600, 800)


def history(layers: int = 4, **changes):
    """Four measurements of healthy layers; a change is a value for all layers and steps, or one for each step."""
    steps = []
    for i, step in enumerate(STEPS):
        now = {name: value[i] if isinstance(value, list) else value for name, value in changes.items()}
        steps.append((step, {layer: replace(HEALTHY, **now) for layer in range(layers)}))
    return steps


def names(found) -> list[str]:
    return [finding.name for finding in found]


def test_a_healthy_memory_is_left_alone():
    assert diagnose(history(), MEMORY) == []
    # Neither is one that grows while it is used more, whose gates close where there is filler, or without z.
    assert diagnose(history(norm_z=[10.0, 50.0, 200.0, 900.0], share_of_output=[0.1, 0.2, 0.3, 0.3]), MEMORY) == []
    assert diagnose(history(write_gate=0.005, norm_z=0.0), replace(MEMORY, rule="deltanet")) == []
    assert diagnose(history(write_gate=None), replace(MEMORY, write_gate="none")) == []


@pytest.mark.parametrize(
    "changes, name, setting",
    [
        ({"mix_gate_range": (0.4985, 0.501)}, "gates do not move", "optimizer.beta_lr_scale"),
        ({"write_gate": 1e-5}, "nothing is written", "train.write_gate_penalty"),
        ({"share_of_output": 0.002}, "memory is not used", "model.memory.gate_floor"),
        ({"read_variation": 0.01}, "reads are near constant", "model.memory.write_gate=hard"),
        (
            {"norm_z": [100.0, 200.0, 400.0, 900.0], "share_of_output": [0.3, 0.4, 0.2, 0.1]},
            "z grows while reads shrink",
            "model.memory.rule=deltanet",
        ),
        ({"effective_rank": 1.1, "write_gate": 0.5}, "M has collapsed", "model.memory.rule=deltanet"),
    ],
)
def test_each_illness_is_named_with_a_setting_to_try(changes, name, setting):
    (finding,) = diagnose(history(**changes), MEMORY)
    assert finding.name == name and setting in finding.try_ and finding.layers == []
    assert str(finding).startswith(f"{name} (all layers): ") and "Try: " in str(finding)
    # Too early to say anything.
    early = [(MIN_STEPS - 1, layers) for _, layers in history(**changes)]
    assert diagnose(early, MEMORY) == []


def test_gates_are_compared_with_where_they_began():
    low = MemoryConfig(rule="delta", beta_init=-3.0, gate_floor=0.1)
    began = 0.1 + 0.9 * 0.04742587
    assert names(diagnose(history(mix_gate_range=(began - 0.001, began + 0.001)), low)) == ["gates do not move"]
    assert diagnose(history(mix_gate_range=(0.499, 0.501)), low) == []  # all have moved there
    assert diagnose(history(mix_gate_range=(began, began + 0.05)), low) == []  # one head has


def test_only_the_layers_that_are_ill_are_named():
    steps = history()
    for _, layers in steps:
        layers[2] = replace(layers[2], read_variation=0.02)
    (finding,) = diagnose(steps, MEMORY)
    assert finding.layers == [2] and "(layer 2)" in str(finding)
    # One still layer, or one that is not used, is no illness.
    for _, layers in steps:
        layers[2] = replace(HEALTHY, share_of_output=0.001, write_gate=0.0, mix_gate_range=(0.5, 0.5))
    assert diagnose(steps, MEMORY) == []


def test_layers_without_a_memory_hide_nothing():
    for changes in ({"mix_gate_range": (0.4985, 0.501)}, {"write_gate": 1e-5}, {"share_of_output": 0.002}):
        steps = history(layers=1, **changes)
        expected = names(diagnose(steps, MEMORY))
        for _, layers in steps:
            layers |= {layer: LayerNumbers() for layer in range(1, 4)}
        assert names(diagnose(steps, MEMORY)) == expected != []


def test_an_empty_memory_has_not_collapsed():
    assert diagnose(history(effective_rank=0.0, norm_M=0.0, write_gate=0.5), MEMORY) == []
    # A memory of few facts has few directions; without its run's metrics a checkpoint does not say how many.
    for gate in (0.005, None):
        assert diagnose(history(effective_rank=1.3, write_gate=gate), MEMORY) == []
    without = replace(MEMORY, write_gate="none")
    assert names(diagnose(history(effective_rank=1.3, write_gate=None), without)) == ["M has collapsed"]


@pytest.mark.parametrize("name", ["{}/layer_03", "memory_layer_03/{}"], ids=["today", "first version"])
def test_numbers_come_from_the_runs_metrics(tmp_path, name):
    records = [
        {
            "step": step,
            name.format("share_of_output"): 0.3,
            name.format("read_variation"): 0.01,
            "loss/train": 2.0,
        }
        for step in STEPS
    ]
    histogram = {"mean": 0.4, "min": 0.3, "max": 0.6, "edges": [], "counts": []}
    records.append({"step": 800, name.format("mix_gate_histogram"): histogram})
    found = read_history(records)
    assert [step for step, _ in found] == list(STEPS)
    assert found[-1][1] == {3: LayerNumbers((0.3, 0.6), share_of_output=0.3, read_variation=0.01)}
    assert [step for step, _ in read_history(records, until=500)] == [200, 400]
    assert diagnose_run(tmp_path, MEMORY) is None
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert names(diagnose_run(tmp_path, MEMORY)) == ["reads are near constant"]
    assert diagnose_run(tmp_path, MEMORY, until=100) is None
