"""Memory files: whatever was changed in one, by accident or on purpose, is refused by name; old ones load."""

from __future__ import annotations

import json
import os
import random
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.checkpoint.tensor_file import write_tensors
from pipeline.inference.memory_file import FIRST_FORMAT, FORMAT, LONGEST, Identity, _check, _expected, contents_hash
from tests.model.build import VOCAB, small_config

CONFIG = small_config("delta+sliding")
MODEL = SimpleNamespace(stage=SimpleNamespace(config=CONFIG), length=CONFIG.segment_length, vocab_size=VOCAB)
IDENTITY = Identity({"num_layers": 2}, "0" * 64, "1" * 64)


def contents(lanes: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.rand(shape, generator=generator) for name, shape in _expected(MODEL, lanes)}
    tensors["segment"] = torch.arange(lanes * 6).view(lanes, 6)
    tensors["segment_tokens"] = torch.full((lanes,), 3)
    return tensors | {"position": 600 * torch.ones(lanes, dtype=torch.int64)}


def write(path: Path, tensors: dict[str, torch.Tensor], **header: str) -> Path:
    """A file with a right hash."""
    facts = {key: json.dumps(value) for key, value in asdict(IDENTITY).items()}
    facts |= {"format": FORMAT, "sha256": json.dumps(contents_hash(tensors, asdict(IDENTITY)))}
    write_tensors(path, tensors, facts | header)
    return path


def test_a_whole_file_is_taken_and_an_old_one_known_as_such(tmp_path):
    assert _check(write(tmp_path / "m", contents()), MODEL, IDENTITY) is True
    assert _check(write(tmp_path / "old", contents(), format=FIRST_FORMAT), MODEL, IDENTITY) is False
    older = {name: x.to(torch.bfloat16) if "local" in name else x for name, x in contents().items()}
    assert _check(write(tmp_path / "half", older), MODEL, IDENTITY) is True


def changed(name: str, value: float, at: tuple = ()) -> dict[str, torch.Tensor]:
    tensors = contents()
    tensors[name][at] = value
    return tensors


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (changed("memory/1/M", float("nan"), (0, 0, 0, 0)), "memory/1/M holds numbers that are not finite"),
        (changed("memory/0/local_key", float("inf"), (1, 1, 2, 3)), "memory/0/local_key holds numbers that are not"),
        (changed("position", 1 << 62, (0,)), f"position holds {1 << 62}; 0 to {LONGEST} are possible"),
        (changed("position", 7, (0,)), "position is not at the border of a segment of 6 tokens"),
        (changed("segment_tokens", 7, (1,)), "segment_tokens holds 7; 0 to 6 are possible"),
        (changed("segment", -1, (0, 0)), f"segment holds -1; 0 to {VOCAB - 1} are possible"),
        (changed("segment", VOCAB, (0, 0)), f"segment holds {VOCAB}; 0 to {VOCAB - 1} are possible"),
        ({n: torch.cat([x, x], 1) if n == "memory/0/M" else x for n, x in contents().items()}, "memory/0/M has shape"),
        ({n: x.long() if n == "memory/0/z" else x for n, x in contents().items()}, "memory/0/z is of I64"),
        ({n: x for n, x in contents().items() if n != "memory/1/z"}, "holds no tensor 'memory/1/z'"),
        (contents() | {"more": torch.zeros(1)}, "holds a tensor 'more', which does not belong to it"),
        (contents(5000), "holds 5,000 documents; 1 to 4,096 are possible"),
        (contents() | {"segment_tokens": torch.zeros(0, dtype=torch.int64)}, "holds 0 documents"),
    ],
    ids=range(13),
)
def test_numbers_that_cannot_be_are_refused_though_their_hash_is_right(tmp_path, tensors, reason):
    path = write(tmp_path / "m", tensors)
    with pytest.raises(ValueError) as error:
        _check(path, MODEL, IDENTITY)
    assert str(error.value).startswith(str(path)) and reason in str(error.value)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"sha256": json.dumps("2" * 64)}, "was changed after it was written"),
        ({"sha256": "null"}, "sha256: Expected str"),
        ({"model": "[" * 100_000}, "model is damaged: its brackets are nested too deeply"),
        ({"tokenizer": json.dumps({})}, "tokenizer: Expected str"),
        ({"checkpoint": json.dumps("3" * 64), "model": json.dumps({"a" * 10**6: "b" * 10**6})}, "another model"),
        ({"checkpoint": json.dumps("3" * 64), "model": json.dumps(dict.fromkeys(map(str, range(10**4))))}, "another"),
    ],
)
def test_a_header_of_another_kind_is_refused_in_few_words(tmp_path, header, reason):
    path = write(tmp_path / "m", contents(), **header)
    with pytest.raises(ValueError) as error:
        _check(path, MODEL, IDENTITY)
    assert str(path) in str(error.value) and reason in str(error.value) and len(str(error.value)) < 3000


def test_a_file_of_another_kind_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "m")
    with pytest.raises(ValueError, match="m is a fifo, not a file"):
        _check(tmp_path / "m", MODEL, IDENTITY)
    (tmp_path / "n").touch()
    with pytest.raises(ValueError, match="n is damaged or holds no tensors"):
        _check(tmp_path / "n", MODEL, IDENTITY)


def test_random_damage_is_refused_by_name_or_changes_nothing(tmp_path):
    """300 flips, cuts, insertions and copies; white space in the header is the only thing that may change."""
    chance, path = random.Random(0), tmp_path / "m"
    whole = write(path, contents()).read_bytes()
    refused = 0
    for _ in range(300):
        damaged, place = bytearray(whole), chance.randrange(len(whole))
        kind = chance.choice(("flip", "cut", "insert", "copy"))
        if kind == "flip":
            damaged[place] ^= 1 << chance.randrange(8)
        elif kind == "cut":
            del damaged[place : place + chance.choice((1, 8, len(whole)))]
        elif kind == "insert":
            damaged[place:place] = chance.randbytes(8)
        else:
            other = chance.randrange(len(whole))
            damaged[place : place + 8] = whole[other : other + 8]
        path.write_bytes(damaged)
        try:
            assert _check(path, MODEL, IDENTITY) is True
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 280
