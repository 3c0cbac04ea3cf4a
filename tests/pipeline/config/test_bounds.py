"""Every number of a configuration has a range; any values at all are refused by name or sound."""

import dataclasses
import re
import typing

import hypothesis
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.bounds import BOUNDS, out_of_bounds
from pipeline.config.keys import settings
from pipeline.config.load import ConfigError, load_config
from pipeline.config.schema import Config
from pipeline.config.validate import validate
from pipeline.config.values import list_item
from pipeline.config.yaml import dump


def value_of(config: Config, key: str):
    for part in key.split("."):
        config = config[int(part)] if part.isdigit() else getattr(config, part)
    return config


def refused(overrides, world_size=None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(load_config(None, overrides), world_size, data_exists=False)
    return caught.value.problems


def test_every_number_has_a_bound():
    number_keys = set()
    for setting in settings():
        item = list_item(setting.kind)
        if {int, float} & {setting.kind, item, *typing.get_args(setting.kind)}:
            number_keys.add(f"{setting.key}.*" if item else setting.key)
    assert number_keys - {"parallel.zero_stage"} == set(BOUNDS)


LISTS = ["data.sets=[{path: a}]", "evaluate.passkey_grid=[{lengths: [4096], depths: [0]}]"]


def example(key: str) -> Config:
    """A configuration that has the number `key`."""
    overrides = [*LISTS]
    if key in ("parallel.layers_per_stage.*", "model.sliding_layers.*", "model.memory.layers.*"):
        overrides.append(f"{key.removesuffix('.*')}=[4]")
    return load_config(None, overrides)


def put(config: Config, key: str, value) -> None:
    *parents, last = key.replace("*", "0").split(".")
    at = value_of(config, ".".join(parents))
    if isinstance(at, list):
        at[int(last)] = value
    else:
        setattr(at, last, value)


@pytest.mark.parametrize("key", BOUNDS)
def test_numbers_outside_of_their_range_are_refused_by_name(key):
    bound = BOUNDS[key]
    beyond = [float("nan"), float("inf"), -float("inf"), 10**25]
    beyond += [bound.low if bound.above else bound.low - 1, bound.high if bound.below else bound.high * 1.001 + 1]
    config = example(key)
    assert not list(out_of_bounds(config))
    for value in beyond:
        put(config, key, value)
        (problem,) = out_of_bounds(config)
        assert problem.startswith(f"{key.replace('*', '0')} = ") and ": must be " in problem
    with pytest.raises(ConfigError, match=re.escape(problem)):
        validate(config, 1, data_exists=False)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.lanes=100000000"], "train.lanes = 100000000: must be at most 1,048,576"),
        (["model.num_layers=1000000000"], "model.num_layers = 1000000000: must be at most 2,048"),
        (["model.num_attention_heads=0"], "model.num_attention_heads = 0: must be at least 1"),
        (["train.seed=18446744073709551616"], "train.seed = 18446744073709551616: must be at most 9,223"),
        (["train.lanes=1048576", "train.segments_per_window=65536"], "tokens per step; must be at most"),
        (["model.num_layers=2048", "model.hidden_size=131072", "model.num_attention_heads=1024"], "parameters"),
        (["evaluate.tasks=['recall:50,length=99999999999999999']"], "numbers must be at most"),
        (["evaluate.tasks=['recall:50,length=1K,length=2K']"], "stands twice"),
    ],
)
def test_sizes_are_bounded_before_anything_is_built(overrides, expected):
    (problem,) = refused(overrides)
    assert expected in problem


extreme = st.one_of(
    st.integers(-3, 9),
    st.integers(),
    st.floats(),
    st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**25, 1e-310, 1e308, 8, 64, 128]),
)


@given(st.dictionaries(st.sampled_from(sorted(BOUNDS)), extreme, max_size=6), st.integers(1, 64))
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_numbers_are_refused_or_sound(values, world_size):
    config = example("")
    config.parallel.layers_per_stage = [4] if "parallel.layers_per_stage.*" in values else None
    config.model.sliding_layers = [1] if "model.sliding_layers.*" in values else None
    config.model.memory.layers = [1] if "model.memory.layers.*" in values else None
    for key, value in values.items():
        kind = next(s.kind for s in settings() if s.key == key.removesuffix(".*"))
        integral = int in (kind, list_item(kind), *typing.get_args(kind))
        if not integral or isinstance(value, int):
            put(config, key, value)
    try:
        validate(config, world_size, data_exists=False)
    except ConfigError as error:
        assert len(str(error)) < 5000


@given(st.sampled_from([s.key.replace("*", "0") for s in settings()]), st.text(max_size=30))
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_text_is_a_value_or_a_clear_error(key, text):
    try:
        config = load_config(
            None, ["data.sets=[{path: a}]", "evaluate.passkey_grid=[{lengths: [4096]}]", f"{key}={text}"]
        )
    except ConfigError as error:
        assert key in str(error) and str(error).isprintable()
    else:
        saved = yaml.safe_load(dump(dataclasses.asdict(config)))
        assert saved == dataclasses.asdict(config) or "nan" in text.lower()
