"""Configuration: what is loaded is what was written; what cannot run is refused by name, all problems at once."""

import dataclasses
import json
from pathlib import Path

import pytest

from model.config import layer_shape
from model.rules import RULES
from model.rules.normalized import NormalizedRule
from pipeline.config import derived
from pipeline.config.load import ConfigError, load_config, save_config
from pipeline.config.schema import Config
from pipeline.config.validate import validate
from tests.pipeline.config.refused import problems

WIDE = ["model.memory.convolution_width=8"]
CONFIGS = Path(__file__).parents[3] / "configs"


def test_file_beats_schema_and_override_beats_file(write):
    path = write("name: a\nmodel: {num_layers: 6, memory: {rule: linear}}\ntrain: {steps: 7}\n")
    config = load_config(path, ["model.num_layers=8", "model.memory.write_gate=hard", "optimizer.lr=2e-4"])
    assert isinstance(config, Config)
    assert (config.model.num_layers, config.train.steps, config.optimizer.lr) == (8, 7, 2e-4)
    assert (config.model.memory.rule, config.model.memory.write_gate) == ("linear", "hard")
    assert config.model.hidden_size == Config().model.hidden_size


def test_interpolation_sees_the_last_word(write):
    config = load_config(
        write("name: a\nrun_dir: out/${name}/x\n"), ["name=b", "model.vocab_size=${model.hidden_size}"]
    )
    assert config.run_dir == "out/b/x"
    assert config.model.vocab_size == 128


def test_unresolvable_interpolation_names_the_key(write):
    path = write("run_dir: out/${nme}\n")
    (problem,) = problems(path)
    assert problem == f"{path}, line 1: run_dir = out/${{nme}} copies an unknown key 'nme'; did you mean name?"


def test_lists_and_sections_on_the_command_line(write):
    path = write("data:\n  sets:\n    - {path: a, weight: 3}\n    - path: b\n")
    config = load_config(path, ["data.sets.1.path=c", "optimizer.betas=[0.8,0.9]", "model={num_layers: 2}"])
    assert [(s.path, s.weight) for s in config.data.sets] == [("a", 3.0), ("c", 1.0)]
    assert config.optimizer.betas == [0.8, 0.9]
    assert config.model.num_layers == 2
    replaced = load_config(path, ["data.sets=[{path: z}]", "parallel.layers_per_stage=[1,3]"])
    assert [s.path for s in replaced.data.sets] == ["z"]
    assert replaced.parallel.layers_per_stage == [1, 3]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.num_layer=3", ["unknown key 'model.num_layer'", "model.num_layers"]),
        ("model.memory.rul=delta", ["unknown key 'model.memory.rul'", "model.memory.rule"]),
        ("train.lr=1", ["unknown key 'train.lr'", "optimizer.lr"]),
        ("zzz=1", ["unknown key 'zzz'", "name, run_dir, model"]),
        ("train.steps.x=1", ["train.steps is a single setting"]),
        ("train.steps=many", ["train.steps = many", "an integer"]),
        ("train.steps=1.5", ["train.steps = 1.5", "an integer"]),
        ("train.steps=null", ["train.steps = null", "an integer"]),
        ("optimizer.lr=fast", ["optimizer.lr = fast", "a number"]),
        ("data.stagger=perhaps", ["data.stagger = perhaps", "true or false"]),
        ("optimizer.betas=[0.9,x]", ["optimizer.betas = [0.9, x]", "a list of numbers"]),
        ("parallel.layers_per_stage=3", ["parallel.layers_per_stage = 3", "a list of integers or null"]),
        ("model=3", ["model is a section", "num_layers"]),
        ("data.sets.4.path=x", ["data.sets.4.path", "0 item(s)"]),
        ("train.steps", ["'train.steps' is not of the form key=value"]),
        ("optimizer.betas=[1", ["optimizer.betas", "not valid YAML"]),
    ],
)
def test_bad_overrides_say_key_value_and_what_is_valid(override, expected):
    (problem,) = problems(None, [override])
    assert problem.startswith("command line: ")
    for part in expected:
        assert part in problem


def test_all_problems_of_file_and_command_line_come_together(write):
    path = write("model: {num_layer: 3}\ndata:\n  sets:\n    - {path: a, weigth: 2}\ntrain: {steps: x}\n")
    found = problems(path, ["bptt.chunk=2"])
    assert len(found) == 4
    assert all(str(path) in problem for problem in found[:3])
    assert "data.sets.0.weight?" in found[1]
    assert "bptt.chunks_per_window" in found[3]


def test_missing_path_of_a_set(write):
    path = write("data: {sets: [{weight: 2}]}\n")
    assert problems(path) == [f"{path}: data.sets.0.path must be given"]


@pytest.mark.parametrize("text", ["a: [1\nb: 2\n", "- 1\n", "name: a\nname: b\n"])
def test_files_that_are_no_configuration_are_named(write, text):
    path = write(text)
    assert str(path) in problems(path)[0]


def test_absent_file_names_its_neighbours(write):
    path = write("name: a\n")
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml does not exist; there are .*run\.yaml"):
        load_config(path.with_name("absent.yaml"), [])


def test_save_and_load_round_trip(tmp_path):
    overrides = ["name=x", "data.sets=[{path: p, weight: 0.3}]", "parallel.layers_per_stage=[1,3]", "optimizer.lr=3e-5"]
    config = load_config(None, overrides)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml", []) == config
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


# --- validate ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"format_version": 1}))
    return folder


FLEX = ["model.packed_attention=flex", "data.packing=true"]


def refused(overrides, world_size=None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(load_config(None, overrides), world_size, data_exists=False)
    return caught.value.problems


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        (["model.num_query_groups=3"], None, ["model.num_query_groups = 3", "valid are 1, 2, 4"]),
        (
            ["model.num_attention_heads=5"],
            None,
            ["model.num_attention_heads = 5", "model.hidden_size = 128", "1, 2, 4"],
        ),
        (["model.memory.layers=[0,4]"], None, ["model.memory.layers = [0, 4]", "no layer 4", "0 to 3"]),
        (["model.memory.layers=[1,1]"], None, ["model.memory.layers = [1, 1]", "once"]),
        (["model.memory.layers=[]"], None, ["model.memory.layers = []", "model.memory.rule = none"]),
        (["model.memory.layers=[1]", "model.memory.rule=none"], None, ["model.memory.layers = [1]", "must be null"]),
        (["model.kv_channels=33"], None, ["model.kv_channels = 33", "even"]),
        (["model.hidden_size=132"], None, ["model.hidden_size / model.num_attention_heads = 33", "even"]),
        (["parallel.tensor=8"], None, ["parallel.tensor = 8", "valid are 1, 2, 4"]),
        (["parallel.context=3"], None, ["parallel.context = 3", "the 8 segments of a chunk", "valid are 1, 2, 4, 8"]),
        (
            ["parallel.context=4", "bptt.chunks_per_window=4"],
            None,
            ["parallel.context = 4", "the 2 segments of a chunk", "= 8 / bptt.chunks_per_window = 4", "valid are 1, 2"],
        ),
        (
            ["parallel.context=2", "bptt.chunks_per_window=2", "train.probes_per_window=2"],
            None,
            ["train.probes_per_window = 2", "parallel.context = 2 x bptt.chunks_per_window = 2", "valid are 0, 4, 8"],
        ),
        (
            ["parallel.context=8", "model.segment_length=2", "model.memory.short_convolution=true"],
            None,
            ["parallel.context = 8", "2 token(s)", "model.memory.short_convolution"],
        ),
        (
            ["parallel.context=8", "model.segment_length=6", "model.memory.rule=kda", *WIDE],
            None,
            ["parallel.context = 8", "6 token(s)", "model.memory.convolution_width = 8", "looks back at 7"],
        ),
        (
            WIDE,
            None,
            ["model.memory.convolution_width = 8: must be 4", "model.memory.short_convolution = null", "rule = delta"],
        ),
        (
            ["model.memory.rule=gated_deltanet", "model.memory.short_convolution=false", *WIDE],
            None,
            ["model.memory.convolution_width = 8: must be 4", "model.memory.short_convolution = false"],
        ),
        (["model.memory.convolution_width=1"], None, ["model.memory.convolution_width = 1", "at least 2"]),
        (["model.memory.convolution_width=17"], None, ["model.memory.convolution_width = 17", "at most 16"]),
        (["parallel.context=2"], 3, ["3 process(es)", "parallel.context = 2", "multiple of 2"]),
        (["parallel.context=2", "train.lanes=3"], 8, ["train.lanes = 3", "8 processes / 2", "parallel.context = 2"]),
        (["parallel.tensor=4", "model.num_query_groups=2"], None, ["parallel.tensor = 4", "valid are 1, 2"]),
        (
            ["parallel.tensor=2", "model.ffn_hidden_size=343"],
            None,
            ["model.ffn_hidden_size = 343", "= 2"],
        ),
        (["parallel.tensor=2", "model.vocab_size_multiple=63"], None, ["model.vocab_size_multiple = 63", "= 2"]),
        (["parallel.pipeline=5"], None, ["parallel.pipeline = 5", "model.num_layers = 4"]),
        (["parallel.pipeline=2", "parallel.layers_per_stage=[4]"], None, ["one entry per pipeline stage"]),
        (["parallel.pipeline=2", "parallel.layers_per_stage=[1,2]"], None, ["sum to model.num_layers = 4, not 3"]),
        (["parallel.pipeline=2", "parallel.layers_per_stage=[0,4]"], None, ["parallel.layers_per_stage.0 = 0"]),
        (["parallel.pipeline=2", "parallel.zero_stage=3"], None, ["parallel.zero_stage = 3", "1 or 2", "deadlock"]),
        (["parallel.zero_stage=0"], None, ["parallel.zero_stage = 0", "1, 2 or 3", "coalesce"]),
        (["parallel.zero_stage=4"], None, ["parallel.zero_stage = 4", "1, 2 or 3"]),
        (["parallel.sequence_parallel=true"], None, ["parallel.sequence_parallel = true", "parallel.tensor = 1"]),
        (
            ["parallel.sequence_parallel=true", "parallel.tensor=2", "model.segment_length=33"],
            None,
            ["model.segment_length = 33", "multiple of parallel.tensor = 2"],
        ),
        (["bptt.chunks_per_window=3"], None, ["bptt.chunks_per_window = 3", "valid are 1, 2, 4, 8"]),
        (["bptt.chunks_per_window=2", "parallel.schedule=1f1b"], None, ["must be 1, not 2", "segment_1f1b"]),
        (["parallel.schedule=gpipe"], None, ["parallel.schedule = gpipe", "segment_1f1b, 1f1b"]),
        (["bptt.gradient=half"], None, ["bptt.gradient = half", "full, detached"]),
        (["bptt.recompute=all"], None, ["bptt.recompute = all", "none, selective, layer, window"]),
        (["model.memory.rule=sum"], None, ["model.memory.rule = sum", "none, linear, delta, deltanet, gated_deltanet"]),
        (["model.memory.write_gate=soft"], None, ["model.memory.write_gate = soft", "none, hard, sigmoid"]),
        (["train.precision=fp16"], None, ["train.precision = fp16", "fp32, bf16, fp64"]),
        (["optimizer.schedule=step"], None, ["optimizer.schedule = step", "cosine, wsd, linear, constant"]),
        (["optimizer.warmup_steps=1000"], None, ["optimizer.warmup_steps = 1000", "train.steps = 1000"]),
        (["optimizer.schedule=wsd", "optimizer.decay_steps=951"], None, ["optimizer.decay_steps = 951", "at most 950"]),
        (["optimizer.decay_steps=9"], None, ["optimizer.decay_steps = 9", "only wsd uses it"]),
        (["optimizer.betas=[0.9,1.0]"], None, ["optimizer.betas"]),
        (["optimizer.betas=[0.9]"], None, ["optimizer.betas", "two numbers"]),
        (["optimizer.lr=0"], None, ["optimizer.lr = 0.0", "greater than 0"]),
        (["optimizer.lr=.nan"], None, ["optimizer.lr = nan"]),
        (["optimizer.clip=-1"], None, ["optimizer.clip = -1.0", "at least 0"]),
        (["model.memory.epsilon=0"], None, ["model.memory.epsilon = 0.0"]),
        (["model.memory.beta_init=.inf"], None, ["model.memory.beta_init = inf"]),
        (
            ["resilience.stop_file=../precious"],
            None,
            ["resilience.stop_file = ../precious", "must be the name of a file"],
        ),
        (["resilience.stop_file=config.yaml"], None, ["resilience.stop_file = config.yaml", "none of"]),
        (["run_dir=''"], None, ["run_dir is empty"]),
        (["model.num_layers=0"], None, ["model.num_layers = 0", "at least 1"]),
        (["data.sets=[{path: a, weight: 0}]"], None, ["data.sets.0.weight = 0.0", "greater than 0"]),
        (["evaluate.passkey_depths=[0.5,1.5]"], None, ["evaluate.passkey_depths.1 = 1.5", "between 0 and 1"]),
        (["evaluate.interval=101", "train.steps=100"], None, ["evaluate.interval = 101", "at most train.steps = 100"]),
        (["evaluate.interval_tasks=['recal:5,length=1K']"], None, ["evaluate.interval_tasks.0 = ", "passkey, needles"]),
        (["model.memory.rule=none", "model.memory.write_gate=hard"], None, ["model.memory.write_gate = hard"]),
        (
            ["model.memory.rule=none", "model.memory.short_convolution=true"],
            None,
            ["model.memory.short_convolution = true"],
        ),
        (
            ["model.memory.rule=gated_deltanet", "model.memory.num_householder=3"],
            None,
            ["model.memory.num_householder = 3", "model.memory.rule = gated_deltanet", "delta_product"],
        ),
        (["model.memory.num_householder=0"], None, ["model.memory.num_householder = 0", "at least 1"]),
        (["model.local_context=wide"], None, ["model.local_context = wide", "segment, sliding"]),
        (["model.qk_init=equal"], None, ["model.qk_init = equal", "independent, tied"]),
        (["model.memory.mix_gate=layer"], None, ["model.memory.mix_gate = layer", "head, token"]),
        (["model.memory.rule=none", "model.memory.mix_gate=token"], None, ["model.memory.mix_gate = token"]),
        (["model.backend=apex"], None, ["model.backend = apex", "local, te, onednn"]),
        (["model.memory.kernel=cuda"], None, ["model.memory.kernel = cuda", "auto, torch, fla"]),
        (
            ["model.memory.kernel=fla", "train.precision=bf16"],
            None,
            ["model.memory.kernel = fla", "model.memory.rule = delta"],
        ),
        *(
            (
                ["model.memory.kernel=fla", f"model.memory.rule={rule}", "train.precision=bf16"],
                None,
                ["model.memory.kernel = fla", f"model.memory.rule = {rule}", "deltanet, gated_deltanet, delta_product"],
            )
            for rule in ("kda", "gdn2")
        ),
        (
            ["model.memory.kernel=fla", "model.memory.rule=deltanet"],
            None,
            ["model.memory.kernel = fla", "train.precision = fp32"],
        ),
        (["model.packed_attention=varlen"], None, ["model.packed_attention = varlen", "auto, flex"]),
        ([*FLEX, "data.packing=false"], None, ["model.packed_attention = flex", "data.packing = false"]),
        ([*FLEX, "train.precision=fp64"], None, ["model.packed_attention = flex", "train.precision = fp64"]),
        ([*FLEX, "model.kv_channels=8"], None, ["model.packed_attention = flex", "heads of 8 numbers", "16 to 256"]),
        (["model.memory.gate_floor=1"], None, ["model.memory.gate_floor = 1.0", "below 1"]),
        (["train.write_gate_penalty=0.1"], None, ["train.write_gate_penalty = 0.1", "hard or sigmoid"]),
        (["parallel.tensor=2", "parallel.pipeline=2"], 2, ["2 process(es)", "multiple of 4"]),
        (["parallel.tensor=2"], 3, ["3 process(es)", "multiple of 2"]),
        (["train.lanes=6"], 4, ["train.lanes = 6", "data-parallel size 4"]),
        (["train.lanes_per_microbatch=3"], 2, ["train.lanes_per_microbatch = 3", "valid are 1, 2, 4"]),
        (
            ["parallel.timeout_s=120"],
            2,
            ["resilience.hang_timeout_s = 300 with parallel.timeout_s = 120", "nine tenths", "0 turns"],
        ),
        (["resilience.hang_timeout_s=1800"], 2, ["resilience.hang_timeout_s = 1800 with parallel.timeout_s = 1800"]),
    ],
)
def test_what_cannot_run_is_refused_by_name(overrides, world_size, expected):
    (problem,) = refused(overrides, world_size)
    for part in expected:
        assert part in problem


def test_a_broken_rule_says_where_its_setting_stands(write):
    path = write("train: {lanes: 0, lanes_per_microbatch: 0}\n")
    overrides = ["train.lanes=-1", "model.memory={rule: sum}"]
    with pytest.raises(ConfigError) as caught:
        validate(load_config(path, overrides), data_exists=False, file=path, overrides=overrides)
    assert caught.value.problems == [
        "command line: train.lanes = -1: must be at least 1",
        f"{path}: train.lanes_per_microbatch = 0: must be at least 1",
        f"command line: model.memory.rule = sum: must be one of {', '.join(RULES)}",
    ]


def test_all_broken_rules_come_together():
    found = refused(["model.num_query_groups=3", "bptt.chunks_per_window=3", "optimizer.warmup_steps=2000"], 16)
    assert len(found) == 4
    assert "4 problems" in str(ConfigError(found))


def test_defaults_run_once_there_is_data(prepared):
    validate(load_config(None, [f"data.sets=[{{path: {prepared}}}]"]), 1)
    validate(load_config(None, ["parallel.tensor=2", "parallel.pipeline=2", f"data.sets=[{{path: {prepared}}}]"]), 8)


def test_data_must_be_prepared(prepared, tmp_path):
    with pytest.raises(ConfigError, match="data.sets is empty.*infini prepare"):
        validate(Config())
    (prepared / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"data.sets.0.path = .*manifest.json is missing.*infini prepare"):
        validate(load_config(None, [f"data.sets=[{{path: {prepared}}}]"]))


# --- derived quantities and the configurations that come with the project ---------------------------------------------


def test_derived_quantities():
    config = load_config(None, ["parallel.tensor=2", "train.lanes=24", "model.kv_channels=48"])
    assert layer_shape(config.model) == (128, 4, 4, 48)
    assert layer_shape(config.model, tensor_size=2) == (128, 2, 2, 48)
    assert derived.data_parallel_size(config, 8) == 4
    assert derived.lanes_per_rank(config, 8) == 6
    assert derived.lanes_per_microbatch(config, 8) == 6
    staged = dataclasses.replace(config.parallel, pipeline=2)
    assert derived.lanes_per_microbatch(dataclasses.replace(config, parallel=staged), 8) == 1


SHIPPED = {
    "demo": [1, 2],
    "passkey_1m": [1, 2],
    "passkey_keys": [1, 2],
    "passkey_text": [1, 2],
    "passkey_eight": [1, 2],
    "recall": [1, 2],
    "compare_rules": [1, 2],
    "compare_sliding": [1, 2],
    "compare_sliding_large": [1, 2],
    "paper_lm": [1, 8, 32],
    "paper_transformer_xl": [1, 8, 32],
    "paper_1b": [8, 64],
    "paper_1b_passkey": [8, 64],
    "paper_8b_books": [32, 64],
    "llama3_8b": [32, 64],
    "smollm2_135m_continual": [1, 2],
    "smollm2_135m_sliding": [1, 2],
    "llama32_1b_continual": [8, 64],
    "llama3_8b_continual": [32, 64],
    "qwen3_8b_continual": [32, 64],
}


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [([], 1), (["resilience.hang_timeout_s=0"], 2), (["resilience.hang_timeout_s=100"], 2)],
)
def test_a_collective_may_give_up_early_where_nobody_watches_or_waits(overrides, world_size):
    validate(load_config(None, ["parallel.timeout_s=120", *overrides]), world_size, data_exists=False)


@pytest.mark.parametrize(("name", "world_sizes"), SHIPPED.items())
def test_shipped_configurations_can_run(name, world_sizes):
    config = load_config(CONFIGS / f"{name}.yaml", [])
    for world_size in world_sizes:
        validate(config, world_size, data_exists=False)


def test_llama_layout_refuses_too_few_processes():
    config = load_config(CONFIGS / "llama3_8b.yaml", [])
    with pytest.raises(ConfigError, match="8 process.*multiple of 32"):
        validate(config, 8, data_exists=False)


def test_a_rule_whose_segments_cannot_be_summed_up_has_no_context_ranks(monkeypatch):
    config = load_config(None, ["parallel.context=2", "model.memory.rule=linear"])
    validate(config, 2, data_exists=False)
    monkeypatch.setattr(NormalizedRule, "composes", False)
    with pytest.raises(ConfigError, match=r"parallel.context = 2: must be 1 with model.memory.rule = linear"):
        validate(config, 2, data_exists=False)
