"""The learning rate is a pure function of the step: warm-up, a shape, an end."""

import pytest

from pipeline.config.schema import OptimizerConfig
from pipeline.training.learning_rate import learning_rate


def rates(schedule: str, steps: int = 20, **settings) -> list[float]:
    config = OptimizerConfig(lr=1.0, schedule=schedule, warmup_steps=4, min_lr_ratio=0.1)
    for name, value in settings.items():
        setattr(config, name, value)
    return [learning_rate(config, step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
def test_warm_up_is_linear_and_never_zero(schedule):
    assert rates(schedule)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates(schedule, warmup_steps=0)[0] == pytest.approx(1.0)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decays_over_the_rest_down_to_the_minimum(schedule):
    found = rates(schedule)
    assert found[4:] == sorted(found[4:], reverse=True)
    config = OptimizerConfig(lr=1.0, schedule=schedule, warmup_steps=4, min_lr_ratio=0.1)
    assert learning_rate(config, 12, 20) == pytest.approx(0.55)  # both are half-way in the middle
    assert learning_rate(config, 20, 20) == pytest.approx(0.1)
    assert learning_rate(config, 999, 20) == pytest.approx(0.1)  # a run that is made shorter and goes on


def test_linear_falls_by_the_same_amount_every_step():
    found = rates("linear")[4:]
    steps = [a - b for a, b in zip(found, found[1:], strict=False)]
    assert steps == pytest.approx([0.9 / 16] * len(steps))


def test_constant_stays():
    assert rates("constant")[4:] == [1.0] * 16


@pytest.mark.parametrize(("decay", "length"), [(None, 4), (6, 6)])
def test_wsd_is_stable_until_its_decay(decay, length):
    """null means a fifth of the steps."""
    found = rates("wsd", decay_steps=decay)
    assert found[4 : 20 - length + 1] == [1.0] * (20 - length - 3)
    assert found[20 - length + 1] == pytest.approx(1 - 0.9 / length)
    assert found[-1] == pytest.approx(0.1 + 0.9 / length)
