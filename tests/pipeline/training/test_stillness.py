"""What does not learn is said, once, by name; what is frozen on purpose is not."""

from __future__ import annotations

import pytest
import torch

from pipeline.parallel.optimizer import StepOutcome
from pipeline.parallel.parameter_groups import Kind
from pipeline.training.stillness import StillnessWatch

MATRICES = Kind("model_matrices", 1.0, 0.1, True)
GATES = Kind("write_gate", 3.0, 0.0, False)


class Optimizer:
    """Two kinds of parameters on one process."""

    kinds = (MATRICES, GATES)

    def __init__(self, dtype=torch.float32) -> None:
        self.tensors = {f"layers.{i}.{name}": torch.ones(3, dtype=dtype) for i in range(6) for name in ("mlp", "gate")}
        self.topology = self
        self.frozen: set[Kind] = set()

    def trained_names(self):
        return {name: GATES if name.endswith("gate") else MATRICES for name in sorted(self.tensors)}

    def own_tensors(self):
        return self.tensors.items()

    def lr_scale(self, kind):
        return 0.0 if kind in self.frozen else kind.lr_scale

    def all_reduce(self, values, op):
        return values

    def move(self, *names, by=1e-7):
        for name in names or self.tensors:
            self.tensors[name][-1] -= by


def outcome(matrices=0.5, gates=0.2, applied=True):
    total = (matrices**2 + gates**2) ** 0.5
    return StepOutcome(applied, total, {MATRICES.name: matrices, GATES.name: gates})


def steps(watch, count, *, first=1, rate=1e-3, weight=9.0, **norms):
    said = [watch.after_step(first + i, outcome(**norms), rate, weight) for i in range(count)]
    return [text for text in said if text]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_that_learns_says_nothing(dtype):
    optimizer = Optimizer(dtype)
    watch = StillnessWatch(optimizer, horizon=10)
    assert steps(watch, 10) == []
    optimizer.move()  # one element of each, by its last bit or two
    messages, values = watch.at_interval(1e-3)
    assert messages == []
    assert values == {
        "gradient_norm/model_matrices": 0.5,
        "gradient_norm/write_gate": 0.2,
        "optimizer/zero_gradient_steps": 0,
        "optimizer/unmoved_parameters": 0,
    }


def test_norm_of_zero_is_said_at_once_and_once_in_a_row():
    watch = StillnessWatch(Optimizer(), horizon=10)
    said = steps(watch, 3, first=5, matrices=0.0, gates=0.0)
    assert said == [
        "THE GRADIENT NORM IS EXACTLY 0 at step 5: nothing learns (trained: model_matrices, write_gate)",
    ]
    assert steps(watch, 1) == []
    (text,) = steps(watch, 2, first=9, weight=0.0, matrices=0.0, gates=0.0)
    assert "at step 9: no token of this window has a loss weight" in text
    assert watch.at_interval(1e-3)[1]["optimizer/zero_gradient_steps"] == 5


def test_kind_without_a_gradient_and_its_parameters_are_named_once():
    optimizer = Optimizer()
    watch = StillnessWatch(optimizer, horizon=10)
    assert steps(watch, 9, gates=0.0) == []
    optimizer.move(*(name for name in optimizer.tensors if name.endswith("mlp")))
    assert watch.at_interval(1e-3)[0] == []  # too early to tell
    steps(watch, 1, gates=0.0)
    messages, values = watch.at_interval(1e-3)
    names = "layers.0.gate, layers.1.gate, layers.2.gate, layers.3.gate and 2 more"
    assert messages == [
        f"THE GRADIENT OF write_gate IS EXACTLY 0 in 10 steps: {names} learn nothing",
    ]
    assert values["optimizer/unmoved_parameters"] == 6
    assert watch.at_interval(1e-3)[0] == []
    steps(watch, 1)
    optimizer.move()
    messages, values = watch.at_interval(1e-3)
    assert messages == [] and values["optimizer/unmoved_parameters"] == 0
    steps(watch, 10, gates=0.0)
    assert len(watch.at_interval(1e-3)[0]) == 1  # it had learned, and stopped


def test_single_parameter_that_does_not_move_is_found():
    optimizer = Optimizer()
    watch = StillnessWatch(optimizer, horizon=10)
    steps(watch, 10)
    optimizer.move(*(name for name in optimizer.tensors if name != "layers.4.mlp"))
    (text,) = watch.at_interval(2e-8)[0]
    assert "layers.4.mlp (gradient norm of model_matrices 0.5, learning rate 2e-08)" in text


def test_what_is_frozen_skipped_or_without_a_rate_is_still_on_purpose():
    optimizer = Optimizer()
    watch = StillnessWatch(optimizer, horizon=10)
    optimizer.frozen = {MATRICES}
    steps(watch, 30, matrices=0.0)
    optimizer.move(*(name for name in optimizer.tensors if name.endswith("gate")))
    assert watch.at_interval(1e-3)[0] == []
    optimizer.frozen = {MATRICES, GATES}
    assert steps(watch, 30, matrices=0.0, gates=0.0) == []
    optimizer.frozen = set()
    steps(watch, 30, rate=0.0)
    for step in range(30):
        assert watch.after_step(step, outcome(applied=False), 1e-3, 9.0) is None
    assert watch.at_interval(1e-3)[0] == []
    steps(watch, 10)
    assert len(watch.at_interval(1e-3)[0]) == 1
