"""A Hugging Face folder is read as transformers reads it, or refused by name; and nothing outside of it is touched."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

from transformers import AutoConfig  # noqa: E402

from model.config import MemoryConfig  # noqa: E402
from model.huggingface.config import model_config  # noqa: E402
from model.layers.rotary import scaled_frequencies  # noqa: E402
from pipeline.huggingface.folder_source import open_source  # noqa: E402
from pipeline.huggingface.schema import ModelSettings, read_settings  # noqa: E402
from tests.tiny_hf import LLAMA3, SIZES, write_hf_model  # noqa: E402

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "llama"
    write_hf_model(folder, "llama", shard_size="40KB")
    return folder


@pytest.fixture
def source(sharded, tmp_path):
    """A copy to damage."""
    return shutil.copytree(sharded, tmp_path / "hf")


def change(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def refused(source, *parts):
    with pytest.raises(ValueError) as caught:
        open_source(source)
    for part in parts:
        assert part in str(caught.value)


# Two sources of truth


def test_a_single_file_counts_before_an_index(source):
    """As in transformers: somebody saved again, and the old shards are still there."""
    old = open_source(source)
    new = {name: old.read(name) + 1 for name in old.shapes}
    save_file(new, source / "model.safetensors", metadata={"format": "pt"})
    opened = open_source(source)
    assert torch.equal(opened.read("model.norm.weight"), new["model.norm.weight"])
    said = " ".join(opened.notes)
    assert "the single file is read and the index is not" in said and "file(s) of other weights" in said
    assert old.notes == []


def test_an_index_and_its_files_must_agree(source):
    index = json.loads((source / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (source / INDEX).write_text(json.dumps(index))
    refused(source, "model.norm.weight", f"which {INDEX} does not name")
    index["weight_map"]["model.norm.weight"] = sorted(set(index["weight_map"].values()))[0]
    (source / INDEX).write_text(json.dumps(index))
    refused(source, "model.norm.weight", f"which {INDEX} says is in 'model-00001-of-")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("transformers_weights", "other.safetensors"), ("configuration_files", ["config.4.0.0.json"])],
)
def test_what_would_make_transformers_read_other_files_is_refused(source, setting, value):
    change(source / "config.json", **{setting: value})
    refused(source, "config.json", setting)


def test_an_adapter_beside_a_model_is_refused(source):
    (source / "adapter_config.json").write_text("{}")
    refused(source, "adapter_config.json", "merge")


DEFAULT = {"rope_type": "default", "rope_theta": 500.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES = {
    "scaling beside parameters": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "rope_scaling": YARN,
    },
    "scaling with its own theta": {"rope_parameters": LLAMA3, "rope_scaling": YARN | {"rope_theta": 700.0}},
    "scaling with theta beside it": {"rope_theta": 900.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "an empty scaling": {"rope_parameters": LLAMA3, "rope_scaling": {}},
    "no scaling": {"rope_parameters": LLAMA3, "rope_scaling": None},
    "two thetas": {"rope_theta": 900.0, "rope_parameters": DEFAULT},
    "two types": {"rope_parameters": YARN | {"type": "linear", "rope_theta": 500.0}},
    "two original lengths": {"rope_parameters": YARN | {"rope_theta": 500.0}, "original_max_position_embeddings": 4096},
    "original length beside": {
        "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 500.0},
        "original_max_position_embeddings": 32,
    },
    "no original length": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 500.0}},
    "mscale": {"rope_parameters": YARN | {"rope_theta": 500.0, "mscale": 0.7, "mscale_all_dim": 0.3}},
    "nothing": {},
}
SAID = {
    "scaling beside parameters": [
        "rope_scaling counts alone",
        "rope_theta 10000",
        "rope_parameters says default",
        "500",
    ],
    "scaling with its own theta": ["rope_scaling counts alone", "rope_theta 700", "rope_parameters says llama3"],
    "two thetas": ["rope_theta is 500 in rope_parameters and 900 beside it: 500 counts"],
    "two types": ["rope_type counts"],
    "two original lengths": ["64 in rope_parameters and 4096 beside it: 4096 counts"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("case", ROPES)
def test_rotary_settings_are_those_that_transformers_takes(tmp_path, kind, case):
    """Frequencies and sizes, from the installed transformers; what stands there twice is said."""
    settings = {**SIZES, "model_type": kind, "rms_norm_eps": 1e-6, **ROPES[case]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    raw = read_settings(tmp_path / "config.json", ModelSettings)[1]
    notes: list[str] = []
    ours = model_config(raw, source="config.json", segment_length=8, memory=MemoryConfig(), notes=notes)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert ours.rope_base == theirs.rope_parameters["rope_theta"]
    frequency = ours.rope_base ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    size, expected = 1.0, (frequency, 1.0)
    if ours.rope_scaling.type != "none":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        expected = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]](theirs)
        frequency, size = scaled_frequencies(frequency, ours.rope_base, ours.rope_scaling)
    else:
        assert theirs.rope_parameters["rope_type"] == "default"
    torch.testing.assert_close(frequency.float(), expected[0].float(), rtol=1e-5, atol=0)
    assert size == pytest.approx(expected[1])
    said = " ".join(notes)
    assert bool(notes) == (case in SAID)
    for part in SAID.get(case, []):
        assert part in said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mistral", {}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 50}),
        ("qwen2", {"sliding_window": 50}),
        ("qwen2", {"sliding_window": 50, "use_sliding_window": True, "max_window_layers": 2}),
        ("qwen2", {"sliding_window": 50, "use_sliding_window": True}),
        ("qwen3", {"sliding_window": 50, "use_sliding_window": True, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 2}),
        ("llama", {"sliding_window": 50, "use_sliding_window": True}),
    ],
)
def test_attention_slides_where_it_does_in_transformers(tmp_path, kind, settings):
    from transformers import AutoModelForCausalLM

    raw = {**SIZES, "model_type": kind, "rms_norm_eps": 1e-6, **settings}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours = model_config(raw, source="config.json", segment_length=8, memory=MemoryConfig(), notes=[])
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    if kind == "mistral":
        windows = [theirs.config.sliding_window] * 4
    else:
        windows = [getattr(layer.self_attn, "sliding_window", None) for layer in theirs.model.layers]
    layers = range(4) if ours.sliding_layers is None else ours.sliding_layers
    assert [ours.sliding_window if layer in layers else None for layer in range(4)] == windows


# What is believed of a file


HOSTILE = {
    "no object": ("config.json", "[1]", ["config.json", "Expected object"]),
    "brackets": ("config.json", "[" * 100_000, ["config.json", "nested too deeply"]),
    "no heads": ("config.json", {"num_attention_heads": 0}, ["config.json: num_attention_heads", ">= 1"]),
    "a truth for a number": ("config.json", {"rms_norm_eps": True}, ["config.json: rms_norm_eps", "got bool"]),
    "10^9 layers": ("config.json", {"num_hidden_layers": 10**9}, ["config.json: num_hidden_layers", "<="]),
    "10^25 layers": ("config.json", {"num_hidden_layers": 10**25}, ["config.json: num_hidden_layers"]),
    "a list for an object": ("config.json", {"rope_scaling": [1]}, ["config.json: rope_scaling"]),
    "a text for a number": ("config.json", {"hidden_size": "32"}, ["config.json: hidden_size", "got str"]),
    "a base of 1": ("config.json", {"rope_theta": 1.0}, ["config.json: rope_theta", "> 1"]),
    "no map": (INDEX, {"weight_map": None}, [INDEX, "weight_map"]),
    "an empty map": (INDEX, {"weight_map": {}}, [INDEX, "weight_map"]),
    "a map of lists": (INDEX, {"weight_map": {"a": ["b"]}}, [INDEX, "weight_map"]),
    "out of the folder": (INDEX, {"weight_map": {"a": "../hf/model.safetensors"}}, [INDEX, "../hf"]),
    "an absolute name": (INDEX, {"weight_map": {"a": "/etc/passwd"}}, [INDEX, "/etc/passwd"]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_json_of_others_is_checked_before_it_is_used(source, what):
    file, content, expected = HOSTILE[what]
    if isinstance(content, str):
        (source / file).write_text(content)
    else:
        change(source / file, **content)
    refused(source, *expected)


def test_more_layers_than_the_files_hold_are_not_built(source, monkeypatch):
    """The shapes are compared before modules are made of the configuration's numbers."""
    from pipeline.huggingface import import_model as import_hf

    change(source / "config.json", num_hidden_layers=2000)
    monkeypatch.setattr(import_hf, "memory_parameters", lambda *_: pytest.fail("the model was built"))
    with pytest.raises(ValueError, match="missing: model.layers.4.input_layernorm.weight"):
        import_hf.import_model(source, source.parent / "out", memory=MemoryConfig(), segment_length=8)


def test_settings_that_do_not_fit_are_named_as_the_file_names_them(source):
    from pipeline.huggingface.import_model import import_model

    change(source / "config.json", num_key_value_heads=3)
    with pytest.raises(ValueError, match=r"config\.json: num_key_value_heads = 3: must divide num_attention_heads = 4"):
        import_model(source, source.parent / "out", memory=MemoryConfig(), segment_length=8)


# Links and other files that are none


def test_links_stay_in_the_folder(source, tmp_path):
    outside = tmp_path / "outside.safetensors"
    shard = sorted(source.glob("*.safetensors"))[0]
    shard.rename(outside)
    shard.symlink_to(outside)
    refused(source, shard.name, "a link that leads out")
    outside.rename(source / "elsewhere.bin")
    shard.unlink()
    shard.symlink_to("elsewhere.bin")
    assert open_source(source).shapes
    (source / "config.json").rename(tmp_path / "config.json")
    (source / "config.json").symlink_to(tmp_path / "config.json")
    refused(source, "config.json", "a link that leads out")


def test_the_hubs_cache_is_read(source, tmp_path):
    """snapshots/<revision>/<file> is a link to blobs/<hash>; a link to anything else of the cache is not followed."""
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(blobs / f"blob{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{number}")
    opened = open_source(snapshot)
    assert opened.read("model.norm.weight").shape == (32,) and opened.tokens().files
    secret = tmp_path / "models--a--b/secret"
    secret.write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../secret")
    refused(snapshot, "config.json", "a link that leads out")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../blobs/link")
    (blobs / "link").symlink_to("../secret")
    refused(snapshot, "config.json", "a link that leads out")


@pytest.mark.parametrize("name", ["config.json", INDEX, "shard", "tokenizer.json", "tokenizer_config.json"])
def test_a_fifo_is_no_file(source, name):
    path = sorted(source.glob("*.safetensors"))[0] if name == "shard" else source / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"{path.name} is a fifo, not a file" if name != INDEX else "holds neither"):
        open_source(source).tokens()


def test_links_in_a_circle_and_devices(source):
    (source / "config.json").unlink()
    (source / "config.json").symlink_to("config.json")
    refused(source, "config.json")
    (source / "config.json").unlink()
    (source / "config.json").symlink_to("/dev/zero")
    refused(source, "config.json", "a link that leads out")
