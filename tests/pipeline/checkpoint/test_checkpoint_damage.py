"""Checkpoints of a stranger: whatever their files say, the end is the right tensors or an error that names the file."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.files import sealed
from pipeline.checkpoint.folder import LATEST, LATEST_LIMIT, SUMMARY, CheckpointError, file_hash, find_checkpoint
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.tensor_file import write_tensors
from pipeline.reporting.inspect import read_contents, read_run
from tests.pipeline.checkpoint.test_checkpoint import KEY, MEMORY_KEY, write

FIXTURE = Path(__file__).parents[2] / "fixtures" / "first_version" / "run" / "checkpoints" / "step_00000002"


@pytest.fixture
def folder(tmp_path) -> Path:
    """One weight and one memory, of two ranks."""
    return write(tmp_path / "checkpoints" / "step_00000001", fragments=2, lane_parts=2)


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """All that can be read, as an export, an evaluation and `inspect` do."""
    reader = CheckpointReader(folder)
    reader.verify()
    assert reader.config is not None
    found = {}
    for key in reader.keys():
        if key.startswith("memory/"):
            found[key] = reader.whole_memory(key)
        else:
            found[key] = reader.whole_tensor(key)
    return found


def rewrite(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file so that all hashes are right again: damage that was made on purpose."""
    path = folder / name
    content = json.loads(path.read_text())
    changed = change(content)
    content = changed if isinstance(changed, list) else content
    if name == SUMMARY:
        content = sealed(content) if isinstance(content, dict) else content
    path.write_text(json.dumps(content))
    if name != SUMMARY:
        record(folder, name)


def record(folder: Path, *names: str) -> None:
    """Put the files as they are into `checkpoint.json`."""
    facts = {name: {"bytes": (folder / name).stat().st_size, "sha256": file_hash(folder / name)} for name in names}
    rewrite(folder, SUMMARY, lambda summary: summary["files"].update(facts))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        everything(folder)
    assert read_contents(folder, verify=True).damage  # `inspect` does not say 'whole'
    return str(error.value)


def entry(key: str, /, **changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        next(entry for entry in content["tensors"] if entry["key"] == key).update(changes)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (entry(KEY, start=0), "elements 0 to 47 are in rank_00000.safetensors and in rank_00001.safetensors"),
        (entry(KEY, start=40), "elements 40 to 47 are in rank_00000.safetensors and in rank_00001.safetensors"),
        (entry(KEY, start=49), "is incomplete: elements 48 to 48 of 96 are in no file"),
        (entry(KEY, count=47), "is incomplete: elements 95 to 95 of 96 are in no file"),
        (entry(KEY, count=1 << 40), "but it has 96"),
        (entry(KEY, start=1 << 62), "tensors[0]: start: Expected int <= "),
        (entry(KEY, start=-1), "start: Expected int >= 0"),
        (entry(KEY, start=True), "start: Expected int, got bool"),
        (entry(KEY, local_shape=[1 << 39, 1 << 39]), "local_shape is [549755813888, 549755813888] in rank_00001"),
        (entry(KEY, local_shape=[[16], 6]), "local_shape[0]: Expected int, got array"),
        (entry(KEY, partition_dim=1), "partition_dim is 1 in rank_00001.safetensors and 0 in rank_00000"),
        (entry(KEY, tensor_rank=1), "tensor_rank 1 of 1"),
        (entry(KEY, tensor_size=2), "tensor_size is 2 in rank_00001.safetensors and 1 in"),
        (entry(KEY, key="master/../../x"), "key: Expected str matching regex"),
        (entry(KEY, key=5), "key: Expected str, got int"),
        (entry(MEMORY_KEY, first_lane=3), "memory/0/M: lanes 3 to 3 are in rank_00000.safetensors and in rank_00001"),
        (entry(MEMORY_KEY, first_lane=5), "memory/0/M is incomplete: lanes 4 to 4 of 9 are in no file"),
        (entry(MEMORY_KEY, first_head=1), "heads 4 to 4 of 5 are in no file"),
        (entry(MEMORY_KEY, first_lane=10**12), "first_lane: Expected int <= "),
        (entry(MEMORY_KEY, shape=[4, 4, 3, 4]), "shape is [4, 4, 3, 4] in rank_00001"),
        (entry(MEMORY_KEY, shape=[5, 4, 3, 3]), "rank_00001.safetensors: memory/0/M has shape [4, 4, 3, 3], not [5,"),
        (entry(MEMORY_KEY, file="../../elsewhere.safetensors", first_lane=4), None),
        (lambda content: content["tensors"].append(content["tensors"][0]), f"{KEY} stands in it twice"),
        (lambda content: content["tensors"].pop(), "holds a tensor 'memory/0/M', which does not belong"),
        (lambda content: content.pop("lanes"), "Object missing required field lanes"),
        (lambda content: content.update(tensors=None), "tensors: Expected array, got null"),
        (lambda content: content.update(lanes={"1": None}), "Expected object, got null"),
        (lambda content: content.update(lanes={"x": {}}), "Expected str matching regex"),
        (lambda content: [], "Expected object, got array"),
    ],
    ids=range(29),
)
def test_an_index_that_does_not_fit_is_refused(folder, change, reason):
    """Fragments that overlap left elements uninitialised, and `inspect` said whole."""
    expected = everything(folder)
    rewrite(folder, "rank_00001.json", change)
    if reason is None:  # a key that means nothing
        assert {key: x.sum() for key, x in everything(folder).items()} == {k: x.sum() for k, x in expected.items()}
        return
    message = refusal(folder)
    assert str(folder) in message and reason in message


CURSOR = {"taken": [1], "consumed": [0], "credit": [0], "stream": "s"}


@pytest.mark.parametrize(
    ("lanes", "reason"),
    [
        ({"0": CURSOR, "2": CURSOR}, "the cursor of lane 1 is in no file"),
        ({"0": CURSOR}, "memory/0/M has 8 lanes, but there are 1 cursors"),
        ({"0": CURSOR | {"taken": [-1]}}, "taken[0]: Expected int >= 0"),
        ({"0": CURSOR | {"set": "0"}}, "set: Expected int | null, got str"),
        ({"0": CURSOR | {"segment": 1e300}}, "segment: Expected int, got float"),
    ],
)
def test_cursors_are_checked(folder, lanes, reason):
    rewrite(folder, "rank_00000.json", lambda content: content.update(lanes=lanes))
    message = refusal(folder)
    assert str(folder) in message and reason in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.update(config="/etc/passwd"), "config: Expected object, got str"),
        (lambda s: s.update(config={"model": "/etc/passwd"}), "config"),
        (lambda s: s.update(config={"model": {"num_layers": 10**25}}), "num_layers"),
        (lambda s: s.update(step=-1), "step: Expected int >= 0"),
        (lambda s: s.update(tokens=1.5), "tokens: Expected int, got float"),
        (lambda s: s.update(vocab_size=10**30), "vocab_size"),
        (lambda s: s.update(recent_losses=["x"]), "recent_losses[0]: Expected float, got str"),
        (lambda s: s.update(files=[]), "files: Expected object, got array"),
        (lambda s: s["files"].update({"../../secret.json": {"bytes": 0, "sha256": "0" * 64}}), "regex"),
        (lambda s: s["files"].update({"/etc/passwd": {"bytes": 0, "sha256": "0" * 64}}), "regex"),
        (lambda s: s["files"].pop("rank_00001.safetensors"), "lists rank_00001.json, but no rank_00001.safetensors"),
        (lambda s: s["files"]["rank_00001.json"].update(sha256="x"), "Expected str matching regex"),
        (lambda s: s.update(layout=None), "layout: Expected object, got null"),
        (lambda s: s.update(source={"path": 5}), "source.path: Expected str, got int"),
        (lambda s: s.update(format_version="1" * 10**6), "format version"),
        (lambda s: [s], "Expected object, got array"),
    ],
    ids=range(16),
)
def test_a_summary_that_does_not_fit_is_refused(folder, change, reason):
    rewrite(folder, SUMMARY, change)
    message = refusal(folder)
    assert str(folder / SUMMARY) in message and reason in message and len(message) < 1000


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, '{"step": NaN}', '{"step": 1e999}', '{"a": 1, "a": 2}', "\x00" * 99]
)
@pytest.mark.parametrize("name", [SUMMARY, "rank_00000.json"])
def test_text_that_is_no_json_is_refused(folder, name, content):
    (folder / name).write_text(content)
    if name != SUMMARY:
        record(folder, name)
    assert str(folder / name) in refusal(folder)


@pytest.mark.parametrize("name", [SUMMARY, "rank_00000.json", "rank_00000.safetensors"])
def test_files_are_files_of_this_folder(folder, tmp_path, name):
    path, outside = folder / name, tmp_path / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)
    assert "a link that leads out of" in refusal(folder)
    path.unlink()
    os.mkfifo(path)
    assert f"{path} is a fifo, not a file" in refusal(folder)
    path.unlink()
    path.mkdir()
    assert f"{path} is a folder, not a file" in refusal(folder)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({KEY: torch.zeros(48, dtype=torch.int64)}, f"{KEY} is of I64"),
        ({KEY: torch.zeros(48, dtype=torch.float16)}, f"{KEY} is of F16, but of F32 in rank_00000.safetensors"),
        ({KEY: torch.zeros(49)}, f"{KEY} has shape [49], not [48]"),
        ({KEY: torch.zeros(2, 24)}, f"{KEY} has shape [2, 24], not [48]"),
        ({"master/other": torch.zeros(3)}, "holds a tensor 'master/other', which does not belong to it"),
    ],
)
def test_tensors_are_those_of_the_index(folder, tensors, reason):
    path = folder / "rank_00001.safetensors"
    write_tensors(path, {KEY: torch.zeros(48), MEMORY_KEY: torch.zeros(4, 4, 3, 3)} | tensors)
    record(folder, path.name)
    message = refusal(folder)
    assert str(path) in message and reason in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("../elsewhere", "holds '../elsewhere', which is not a checkpoint's name"),
        ("/etc", "holds '/etc', which is not a checkpoint's name"),
        ("\x1b[2J", r"holds '\x1b[2J', which"),
        ("step_00000007", "names step_00000007, which is not a checkpoint here"),
        ("x" * (LATEST_LIMIT + 1), f"has more than {LATEST_LIMIT:,} bytes"),
        ("", "holds ''"),
    ],
)
def test_latest_names_a_checkpoint_of_its_folder(folder, content, reason):
    pointer = folder.parent / LATEST
    pointer.write_text(content)
    with pytest.raises(CheckpointError) as error:
        find_checkpoint(folder.parent)
    assert str(pointer) in str(error.value) and reason in str(error.value) and len(str(error.value)) < 500
    assert any(reason in message for message in read_run(folder.parent.parent, verify=False).damage)


def test_latest_is_no_link_out_and_names_none(folder, tmp_path):
    pointer = folder.parent / LATEST
    (tmp_path / "secret").write_text("step_00000001")
    pointer.symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="a link that leads out of"):
        find_checkpoint(folder.parent)
    pointer.unlink()
    shutil.move(folder, tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    pointer.write_text("step_00000001")
    with pytest.raises(CheckpointError, match="names step_00000001, which is not a checkpoint here"):
        find_checkpoint(folder.parent)


def test_random_damage_is_refused_by_name_or_changes_nothing(tmp_path):
    """Flips, cuts, swapped and missing files of a real checkpoint; every other time with hashes that fit again."""
    chance, refused = random.Random(0), 0
    shutil.copytree(FIXTURE, tmp_path / "whole")
    expected = everything(tmp_path / "whole")
    names = sorted(path.name for path in FIXTURE.iterdir())
    for number in range(120):
        folder = tmp_path / "step_00000002"
        shutil.copytree(FIXTURE, folder)
        path = folder / chance.choice(names)
        damaged = bytearray(path.read_bytes())
        place = chance.randrange(len(damaged))
        kind = chance.choice(("flip", "flip", "cut", "insert", "digit", "swap", "remove"))
        if kind == "flip":
            damaged[place] ^= 1 << chance.randrange(8)
        elif kind == "cut":
            del damaged[place : place + chance.choice((1, 8, len(damaged)))]
        elif kind == "insert":
            damaged[place:place] = chance.randbytes(3)
        elif kind == "digit":
            places = [i for i, byte in enumerate(damaged[:20_000]) if chr(byte).isdigit()]
            damaged[chance.choice(places)] = ord(chance.choice("0123456789-e"))
        elif kind == "swap":
            damaged = bytearray((folder / chance.choice(names)).read_bytes())
        path.write_bytes(damaged)
        if kind == "remove":
            path.unlink()
        elif number % 2 and path.name != SUMMARY:
            record(folder, path.name)
        elif number % 2:
            try:
                path.write_text(json.dumps(sealed(json.loads(path.read_text()))))
            except (ValueError, AttributeError):
                pass  # no JSON any more
        try:
            found = everything(folder)
            assert found.keys() == expected.keys()
            assert all(found[key].shape == expected[key].shape for key in found)
        except CheckpointError as error:
            assert str(folder) in str(error) and len(str(error)) < 2000
            refused += 1
        shutil.rmtree(folder)
    assert refused > 70
