"""A setting's value is what stands there, by the type that the setting declares; what is read, and what never is."""

import dataclasses
import json
import os
from pathlib import Path

import hypothesis
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.keys import SYNONYMS, settings, suggestions
from pipeline.config.load import ConfigError, load_config, save_config, stored_config
from pipeline.config.schema import Config
from pipeline.config.validate import validate
from tests.pipeline.config.refused import problems

PLAIN_TEXTS = ["2026_11_24", "0012", "1e3", "1.10", "12:30:00", "on", "No", "0x10", ".5", "1_000"]
ODD_TEXTS = [*PLAIN_TEXTS, "=", "<<", "- a", "a: b", "try #2", "# 1", "*.beta", "&a", "!tag", "{a}", "[a]", "%x", "@x"]
ODD_TEXTS += ["`x`", "null and void", "a ", "ümläut ✓", "???x", "a'b", 'a"b', "a\\b", "- ", "x" * 4096]


def value_of(config: Config, key: str):
    for part in key.split("."):
        config = config[int(part)] if part.isdigit() else getattr(config, part)
    return config


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_text_is_kept_on_the_command_line_and_in_what_is_saved(tmp_path, text):
    keys = ["name", "run_dir", "train.init_from", "data.sets.0.path"]
    config = load_config(None, ["data.sets=[{path: a}]", *(f"{key}={text}" for key in keys)])
    assert [value_of(config, key) for key in keys] == [text] * 4
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml", []) == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == dataclasses.asdict(config)
    assert stored_config(json.loads(json.dumps(dataclasses.asdict(config))), [], "x") == config


@pytest.mark.parametrize("text", PLAIN_TEXTS)
def test_a_text_is_kept_in_a_file_without_quotes(write, text):
    path = write(f"name: {text}\ndata: {{sets: [{{path: {text}}}]}}\ntrain: {{trainable: [{text}]}}\n")
    config = load_config(path, [])
    assert (config.name, config.data.sets[0].path, config.train.trainable) == (text, text, [text])


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=010", 10),
        ("train.steps=1_000", 1000),
        ("train.seed=0xCAFE", 0xCAFE),
        ("train.steps= 7 ", 7),
        ("optimizer.lr=1e-3", 1e-3),
        ("optimizer.lr=2", 2.0),
        ("optimizer.lr=.5", 0.5),
        ("optimizer.lr=5.", 5.0),
        ("metrics.tensorboard=off", False),
        ("metrics.tensorboard=Yes", True),
        ("metrics.tensorboard=0", False),
        ("train.init_from=null", None),
        ('train.init_from="null"', "null"),
        ("train.init_from=", None),
        ("name='a b'", "a b"),
        ("name='a", "'a"),
        ("model.memory.short_convolution=~", None),
        ("model.memory.short_convolution=true", True),
        ("parallel.layers_per_stage=[01, 3]", [1, 3]),
        ("parallel.layers_per_stage=null", None),
        ("train.trainable=*.beta", ["*.beta"]),
        ("train.trainable=[*.beta, layers.1.x, 010, a#b]", ["*.beta", "layers.1.x", "010", "a#b"]),
        ("train.trainable=['a, b', on]", ["a, b", "on"]),
    ],
)
def test_values_by_type(override, value):
    config = load_config(None, [override])
    assert value_of(config, override.partition("=")[0]) == value


@pytest.mark.parametrize(
    "override",
    ["train.steps=1:30", "train.steps=0o10", "train.steps=1e3", "train.steps=", "train.steps=true", "train.steps=١"]
    + ["train.steps=" + "9" * 5000, "optimizer.lr=1:30.5", "optimizer.lr=0x1p3", "optimizer.lr=true"]
    + ["metrics.tensorboard=2", "metrics.tensorboard=", "metrics.tensorboard=y", "name=", "name=null", "name=a\x07b"]
    + ["name=a\udcffb", "name=" + "x" * 5000, "parallel.layers_per_stage=[1.0]", "optimizer.betas=[[0.9], 0.9]"]
    + ["train.trainable=[a #1, b]", "train.trainable=[a] #1", "train.trainable=", "train.trainable=[null]"]
    + [f"train.trainable=[{'a,' * 5000}]", "model={num_layers: '3'}", "data.sets=[" + "{path: a}," * 5000 + "]"],
)
def test_what_is_no_value_of_the_type_is_refused(override):
    (problem,) = problems(None, [override])
    assert problem.startswith("command line: ") and override.partition("=")[0] in problem
    assert len(problem) < 400 and problem.isprintable()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nmodel: {}\nname: b\n", "the key 'name' stands twice, in line 1 and line 3"),
        ("train:\n  trainable: [*.beta]\n", "line 2: '*' begins like an alias"),
        ("a: &x 1\nb: *x\n", "line 1: the anchor '&x' is not read"),
        ("name: !!python/object/apply:os.system [id]\n", "line 1: the tag 'tag:yaml.org,2002:python/object"),
        ("name: !!int 5\n", "the tag"),
        ("name: a\n---\nname: b\n", "line 2: a second document"),
        ("name: " + "[" * 100_000, "lists and mappings inside one another"),
        ("- " * 100_000, "lists and mappings inside one another"),
        ("? [a]\n: b\n", "where a key belongs"),
        ("name: a\n\ttrain: b\n", "line 2: "),
        ("name: \x00\n", "special characters"),
        ("name: \xff", "not text in UTF-8"),
        ("x" * 300_000, "more than 262,144 bytes"),
        ("just words", "must hold settings"),
        ("train:\n  steps: '8'\n", "line 2: train.steps = '8' has the wrong type; valid is an integer"),
        ("train:\n\n  stepz: 8\n", "line 3: unknown key 'train.stepz'; did you mean train.steps"),
        ("train: 8\n", "train is a section"),
    ],
)
def test_files_that_are_no_configuration_say_where(tmp_path, text, expected):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="latin-1")
    (problem,) = problems(path)
    assert str(path) in problem and expected in problem and len(problem) < 1000


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert "is a fifo, not a file" in problems(tmp_path / "fifo")[0]
    assert "is a device, not a file" in problems("/dev/zero")[0]
    assert "is a folder, not a file" in problems(tmp_path)[0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["name=${oc.env:SECRET}"], "reads 'SECRET' from the environment"),
        (["name=${oc.decode:1}"], "is not read: valid are ${other.key}"),
        (["name=${oc.create:{a: 1}}"], "is not read"),
        (["name=${run_dir"], "is not read"),
        (["name=${${run_dir}}"], "is not read"),
        (["name=${.x}"], "is not read"),
        (["name=${run_dir}", "run_dir=${name}"], "in a circle"),
        (["name=${model}"], "is no single setting"),
        (["name=${optimizer.betas}x"], "is no single value"),
        (["name=${data.sets.3.path}"], "does not exist"),
        (["train.steps=${name}"], "train.steps = ${name} has the wrong type"),
        (["name=${oc.env:SCRATCH}"], "which is not set"),
    ],
)
def test_interpolations_that_are_refused(monkeypatch, overrides, expected):
    monkeypatch.setenv("SECRET", "token")
    monkeypatch.delenv("SCRATCH", raising=False)
    found = problems(None, overrides)
    assert any(expected in problem for problem in found), found
    assert "token" not in str(found)


def test_copies_cannot_grow_without_bound():
    sets = ["{path: '" + 8 * f"${{data.sets.{i + 1}.path}}" + "'}" for i in range(12)]
    assert "more than 4,096 characters" in problems(None, [f"data.sets=[{', '.join(sets)}, {{path: abc}}]"])[0]
    empty = load_config(None, [f"data.sets=[{', '.join(sets)}, {{path: ''}}]"])
    assert empty.data.sets[0].path == ""


def test_a_copied_value_keeps_its_text():
    config = load_config(None, ["name=2026_11", "run_dir=${name}", "evaluate.passkey_depths=${optimizer.betas}"])
    assert (config.run_dir, config.evaluate.passkey_depths) == ("2026_11", [0.9, 0.95])
    assert load_config(None, ["name=r${train.steps}"]).run_dir == "runs/r1000"


def test_the_environment_is_read_for_the_user_only(monkeypatch, write):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    path = write("run_dir: ${oc.env:SCRATCH}/${name}\ntrain: {init_from: '${oc.env:WORK,here}'}\n")
    config = load_config(path, ["name=x"])
    assert (config.run_dir, config.train.init_from) == ("/scratch/me/x", "here")
    with pytest.raises(ConfigError, match="reads the environment, which a stored configuration may not"):
        load_config(path, [], own=False)
    with pytest.raises(ConfigError, match="ckpt: run_dir.*stored configuration may not"):
        stored_config({"run_dir": "${oc.env:HOME}"}, [], "ckpt")


@pytest.mark.parametrize("settings", ["/etc/passwd", None, 3, [1], {"train": {"steps": "8"}}, {"a": {}}])
def test_stored_settings_are_checked(settings):
    with pytest.raises(ConfigError, match="^ckpt: "):
        stored_config(settings, [], "ckpt")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("model.heads", "model.num_attention_heads"),
        ("model.layers", "model.num_layers"),
        ("model.hidden", "model.hidden_size"),
        ("model.num_hidden_layers", "model.num_layers"),
        ("train.learning_rate", "optimizer.lr"),
        ("train.lr", "optimizer.lr"),
        ("batch_size", "train.lanes"),
        ("model.head_dim", "model.kv_channels"),
        ("model.rule", "model.memory.rule"),
        ("training.steps", "train.steps"),
        ("bptt.chunk", "bptt.chunks_per_window"),
        ("data.sets.0.weigth", "data.sets.0.weight"),
    ],
)
def test_what_was_meant_comes_first(key, meant):
    assert suggestions(key)[0] == meant


def test_every_setting_says_what_it_means():
    assert [setting.key for setting in settings() if not setting.meaning] == []
    assert set(SYNONYMS.values()) <= {"data.sets", *(setting.key for setting in settings())}


SHIPPED = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


@st.composite
def damaged(draw) -> bytes:
    """A shipped configuration with bytes that were changed, cut out, doubled or put in."""
    content = bytearray(draw(st.sampled_from(SHIPPED)).read_bytes())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        size = draw(st.integers(0, 40))
        new = draw(st.one_of(st.binary(max_size=8), st.sampled_from(ODD_BYTES), st.just(bytes(content[:size]))))
        content[at : at + draw(st.integers(0, size))] = new
    return bytes(content)


ODD_BYTES = [b"[" * 5000, b"{", b"- - - ", b"*a", b"&a ", b"!!python/name:os.system ", b"${oc.env:PATH}", b"${name}"]
ODD_BYTES += [
    b"\n---\n",
    b": ",
    b"? ",
    b"1e999",
    b"9" * 5000,
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"%YAML 9.9\n",
    b"|\n",
]


@given(damaged())
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_a_damaged_file_is_refused_by_name_or_read(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("damaged") / "run.yaml"
    path.write_bytes(content)
    try:
        validate(load_config(path, []), data_exists=False, file=path)
    except ConfigError as error:
        assert all(problem.startswith(str(path)) for problem in error.problems)
        assert len(str(error)) < 20_000 and str(error).replace("\n", "").isprintable()


def test_what_the_first_version_wrote_is_read_as_it_was():
    run = Path(__file__).parents[2] / "fixtures" / "first_version" / "run"
    (summary,) = run.glob("checkpoints/*/checkpoint.json")
    stored = json.loads(summary.read_text())["config"]
    config = load_config(run / "config.yaml", [], own=False)
    assert config == stored_config(stored, [], str(summary))
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert leaves(written).items() <= leaves(dataclasses.asdict(config)).items()  # later settings have their defaults


def leaves(settings: dict, prefix: str = "") -> dict[str, str]:
    found = {}
    for name, value in settings.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = {str(place): entry for place, entry in enumerate(value)}
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: repr(value)}
    return found
