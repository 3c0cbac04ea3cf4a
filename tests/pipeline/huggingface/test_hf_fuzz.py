"""Damaged Hugging Face folders: an error that names the folder, or the model that transformers loads from it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from data.tokenizer.tokenizer import load_tokenizer  # noqa: E402
from model.config import MemoryConfig  # noqa: E402
from pipeline.checkpoint.folder import find_checkpoint  # noqa: E402
from pipeline.config.load import load_config  # noqa: E402
from pipeline.huggingface.import_model import import_model  # noqa: E402
from pipeline.inference.streaming import open_checkpoint  # noqa: E402
from tests.tiny_hf import write_hf_model  # noqa: E402

LENGTH = 16
SLIDING = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}
FOLDERS = {"llama": {}, "mistral": {"sliding_window": 64}, "qwen2": SLIDING, "qwen3": {}}
VALUES = [
    None,
    True,
    0,
    -1,
    1,
    3,
    2**31,
    2**70,
    10**25,
    1e300,
    0.5,
    "",
    "..",
    "../x",
    "/etc/passwd",
    "\x1b[2J",
    "x" * 5000,
]
VALUES += [[], [1], {}, {"a": 1}, "yarn", {"rope_type": "yarn", "factor": 2.0}, {"type": "linear", "factor": 3.0}]
VALUES += ["<|endoftext|>", {"content": "<|endoftext|>"}]
KEYS = ["sliding_window", "layer_types", "rope_scaling", "rope_parameters", "rope_theta", "head_dim", "auto_map"]
KEYS += ["original_max_position_embeddings", "fast_tokenizer_files", "pad_token", "partial_rotary_factor"]
KEYS += ["transformers_weights", "attention_bias", "model_type", "tokenizer_sha256", "bos_token", "eos_token_id"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("fuzz")
    for family, changes in FOLDERS.items():
        write_hf_model(place / family, family, shard_size="40KB" if family == "llama" else "1GB", **changes)
        special = {"eos_token": {"content": "<|endoftext|>", "lstrip": False}, "unk_token": "a"}
        (place / family / "special_tokens_map.json").write_text(json.dumps(special))
    (place / "secret").write_text("secret")
    return place


def containers(value):
    """All objects and lists in a value."""
    if isinstance(value, dict | list) and value:
        yield value
        for item in value.values() if isinstance(value, dict) else value[:8]:
            yield from containers(item)


def damage(folder: Path, draw: random.Random) -> None:
    """A key taken out, added or given another value; a bit, an end, a file; a link out of the folder."""
    path = draw.choice(sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")))
    content, kind, value = path.read_bytes(), draw.random(), None
    with contextlib.suppress(ValueError):
        value = json.loads(content)
    if path.suffix == ".json" and kind < 0.8 and any(containers(value)):
        place = draw.choice(list(containers(value)))
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if draw.random() < 0.2:
            del place[key]
        elif isinstance(place, dict) and draw.random() < 0.3:
            place[draw.choice(KEYS)] = draw.choice(VALUES)
        else:
            place[key] = draw.choice(VALUES)
        path.write_text(json.dumps(value))
    elif kind < 0.9 and content:
        at = draw.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :])
    elif kind < 0.95:
        path.write_bytes(content[: draw.randrange(len(content) + 1)])
    else:
        path.unlink()
        if draw.random() < 0.5:
            path.symlink_to(folder.parent / "secret")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(32))
def test_a_damaged_folder(topology, folders, seed):
    draw = random.Random(seed)
    source, out = folders / "damaged", folders / "out"
    shutil.copytree(folders / draw.choice(list(FOLDERS)), source)
    before = sorted(os.listdir(folders))
    try:
        for _ in range(draw.choice([1, 1, 2])):
            damage(source, draw)
        try:
            import_model(source, out, memory=MemoryConfig(), segment_length=LENGTH)
        except (ValueError, OSError) as error:
            assert str(source) in str(error) and "\x1b" not in str(error) and len(str(error)) < 2000
            assert sorted(os.listdir(folders)) == before
        else:
            assert_the_same_model(topology, source, out)
    finally:
        shutil.rmtree(source)
        shutil.rmtree(out, ignore_errors=True)
    assert (folders / "secret").read_text() == "secret"


def assert_the_same_model(topology, source, out):
    """The losses of a segment and the end token are those of transformers, where it reads the folder."""
    try:
        theirs = AutoModelForCausalLM.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception:  # it checks settings that mean nothing here
        return
    tokens = torch.randint(0, 280, (LENGTH + 1,), generator=torch.Generator().manual_seed(0))
    streamer, _ = open_checkpoint(load_config(out / "config.yaml", []), topology, find_checkpoint(out))
    inputs, labels = tokens[:-1].view(1, 1, -1), tokens[1:].view(1, 1, -1)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(theirs(tokens[None, :-1]).logits[0], tokens[1:], reduction="none")
        found = streamer.stage(inputs, streamer.empty_memory(1), torch.ones(1, 1, dtype=torch.bool), labels).token_loss
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-4, atol=1e-4)
    assert tokenizer.eos_token_id in (None, load_tokenizer(out).eos_id)
