"""What a resumed run, an evaluation and a generation may have other than the run."""

import dataclasses

import pytest

from model.config import MemoryConfig, ModelConfig
from pipeline.config.evaluation import evaluation_config, generation_config
from pipeline.config.load import ConfigError, load_config, save_config
from pipeline.config.schema import Config, TrainConfig
from pipeline.parallel.setup import check_same_run


def config(rule="deltanet", kernel="auto", backend="local", compiled=False, packed="auto") -> Config:
    memory = MemoryConfig(rule=rule, kernel=kernel)
    model = ModelConfig(memory=memory, backend=backend, compile=compiled, packed_attention=packed)
    return Config(name="run", model=model, train=TrainConfig(lanes=4, precision="bf16"))


def test_a_run_goes_on_with_another_kernel_and_backend_and_compiler():
    check_same_run(config(kernel="fla", backend="te", compiled=True, packed="flex"), config(kernel="torch"))
    with pytest.raises(ConfigError, match=r"model\.memory\.rule is 'delta', but the checkpoint .* 'deltanet'"):
        check_same_run(config(), config(rule="delta"))


def test_a_runs_memory_may_be_written_otherwise_in_its_layers():
    def of(layers: list[int] | None) -> Config:
        model = ModelConfig(num_layers=3, memory=MemoryConfig(layers=layers))
        return dataclasses.replace(config(), model=model)

    for layers in ([0, 1, 2], [2, 0, 1]):
        check_same_run(of(None), of(layers))
        check_same_run(of(layers), of(None))
    check_same_run(of([2, 0]), of([0, 2]))
    for layers, other in ((None, [0, 1]), ([0, 1], [1, 2])):
        with pytest.raises(ConfigError, match=r"model\.memory\.layers is"):
            check_same_run(of(layers), of(other))


def test_what_a_machine_has_not_is_not_taken_from_the_run():
    saved = dataclasses.asdict(config(kernel="fla", backend="te", compiled=True, packed="flex"))
    model = generation_config(saved, [], 1).model
    assert (model.backend, model.memory.kernel, model.compile) == ("local", "auto", False)
    assert model.packed_attention == "auto"
    assert generation_config(saved, ["model.memory.kernel=torch"], 1).model.memory.kernel == "torch"
    with pytest.raises(ConfigError, match="generation cannot change them"):
        generation_config(saved, ["model.memory.rule=delta"], 1)


def test_a_generation_has_no_context_ranks_and_an_evaluation_only_those_it_asks_for(tmp_path):
    run = load_config(None, ["parallel.context=4", "bptt.chunks_per_window=2"])
    assert generation_config(dataclasses.asdict(run), [], 1).parallel.context == 1
    with pytest.raises(ConfigError, match=r"parallel.context = 2: .* token by token: leave it out"):
        generation_config(dataclasses.asdict(run), ["parallel.context=2"], 2)
    save_config(run, tmp_path / "config.yaml")
    assert evaluation_config(tmp_path, [], 2).parallel.context == 1
    assert evaluation_config(tmp_path, ["parallel.context=8"], 8).parallel.context == 8  # one chunk a window
    with pytest.raises(ConfigError, match=r"parallel.context = 2 .* on 3 process.es.: their number must be a multiple"):
        evaluation_config(tmp_path, ["parallel.context=2"], 3)
