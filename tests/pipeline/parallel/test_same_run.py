"""What a resumed run, an evaluation and a generation may have other than the run."""

import dataclasses

import pytest

from model.config import MemoryConfig, ModelConfig
from pipeline.config.evaluation import generation_config
from pipeline.config.load import ConfigError
from pipeline.config.schema import Config, TrainConfig
from pipeline.parallel.setup import check_same_run


def config(rule="deltanet", kernel="auto", backend="local", compiled=False) -> Config:
    memory = MemoryConfig(rule=rule, kernel=kernel)
    model = ModelConfig(memory=memory, backend=backend, compile=compiled)
    return Config(name="run", model=model, train=TrainConfig(lanes=4, precision="bf16"))


def test_a_run_goes_on_with_another_kernel_and_backend_and_compiler():
    check_same_run(config(kernel="fla", backend="te", compiled=True), config(kernel="torch"))
    with pytest.raises(ConfigError, match=r"model\.memory\.rule is 'delta', but the checkpoint .* 'deltanet'"):
        check_same_run(config(), config(rule="delta"))


def test_what_a_machine_has_not_is_not_taken_from_the_run():
    saved = dataclasses.asdict(config(kernel="fla", backend="te", compiled=True))
    model = generation_config(saved, [], 1).model
    assert (model.backend, model.memory.kernel, model.compile) == ("local", "auto", False)
    assert generation_config(saved, ["model.memory.kernel=torch"], 1).model.memory.kernel == "torch"
    with pytest.raises(ConfigError, match="generation cannot change them"):
        generation_config(saved, ["model.memory.rule=delta"], 1)
