"""Reading a checkpoint without a run: parts are put together by what they are, and damage is told by file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from data.files import sealed
from model.sharding import Partition, shard
from pipeline.checkpoint.folder import (
    LATEST,
    SUMMARY,
    CheckpointError,
    candidates,
    file_hash,
    find_checkpoint,
)
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.schema import FORMAT_VERSION

WEIGHT = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
MEMORY = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(1))
FIRST_VERSION = Path(__file__).parents[2] / "fixtures" / "first_version"
KEY, MEMORY_KEY = "master/layers.0.mlp.linear_fc1.weight", "memory/0/M"


def write(folder: Path, *, tensor_size=1, fragments=1, lane_parts=1, partition=Partition(0, 2)) -> Path:  # noqa: B008
    """A checkpoint of one weight and one memory, written as `tensor_size` x max(fragments, lane_parts) ranks would."""
    folder.mkdir(parents=True)
    files = {}
    for tensor_rank in range(tensor_size):
        local = shard(WEIGHT, partition, tensor_rank, tensor_size)
        pieces = local.flatten().tensor_split(fragments)
        lanes = MEMORY.chunk(lane_parts)
        start = 0
        for data_rank in range(max(fragments, lane_parts)):
            tensors, entries = {}, []
            if data_rank < fragments:
                piece = pieces[data_rank]
                tensors[KEY] = piece.clone()
                entry = {"key": KEY, "start": start, "count": piece.numel(), "local_shape": list(local.shape)}
                entry |= {"partition_dim": partition.dim, "partition_stride": partition.stride}
                entries.append(entry | {"tensor_rank": tensor_rank, "tensor_size": tensor_size})
                start += piece.numel()
            if data_rank < lane_parts:
                heads = MEMORY.shape[1] // tensor_size
                part = lanes[data_rank][:, tensor_rank * heads : (tensor_rank + 1) * heads].contiguous()
                tensors[MEMORY_KEY] = part
                first = data_rank * lanes[0].shape[0]
                entry = {"key": MEMORY_KEY, "first_lane": first, "first_head": tensor_rank * heads}
                entries.append(entry | {"shape": list(part.shape)})
            name = f"rank_{tensor_rank * 100 + data_rank:05d}"
            save_file(tensors, folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps({"tensors": entries, "lanes": {}}))
            for file in (f"{name}.safetensors", f"{name}.json"):
                path = folder / file
                files[file] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    write_summary(folder, summary_of(files))
    return folder


def summary_of(files: dict) -> dict:
    return {
        "format_version": FORMAT_VERSION,
        **dict.fromkeys(("step", "tokens", "windows", "optimizer_steps"), 1),
        "recent_losses": [],
        "files": files,
        "layout": {"tensor": 1, "pipeline": 1, "data": 1, "zero_stage": 1, "world_size": 1},
        "vocab_size": 257,
        "config": {},
    }


def write_summary(folder: Path, content: dict) -> None:
    (folder / SUMMARY).write_text(json.dumps(sealed(content)))


def read_weight(reader: CheckpointReader, rank: int, size: int, partition=Partition(0, 2)):  # noqa: B008
    shape = shard(WEIGHT, partition, rank, size).shape
    return reader.local_tensor(KEY, shape, partition, rank, size)


@settings(max_examples=40, deadline=None)
@given(
    written=st.sampled_from([1, 2, 4]),
    read=st.sampled_from([1, 2, 4]),
    fragments=st.integers(1, 3),
    lane_parts=st.sampled_from([1, 2, 4]),
    partition=st.sampled_from([Partition(0, 2), Partition(0), Partition(1)]),
)
def test_any_layout_reads_any_other(tmp_path_factory, written, read, fragments, lane_parts, partition):
    if partition.dim == 1 and 4 in (written, read):
        return  # 6 columns
    folder = tmp_path_factory.mktemp("checkpoint") / "step_00000001"
    options = {"tensor_size": written, "fragments": fragments, "lane_parts": lane_parts, "partition": partition}
    reader = CheckpointReader(write(folder, **options))
    reader.verify()
    for rank in range(read):
        expected = shard(WEIGHT, partition, rank, read)
        assert torch.equal(read_weight(reader, rank, read, partition), expected)
        heads = 4 // read
        for first_lane in (0, 2, 6):
            like = torch.empty(2, heads, 3, 3)
            found = reader.memory_tensor("memory/0/M", like, first_lane, rank * heads)
            assert torch.equal(found, MEMORY[first_lane : first_lane + 2, rank * heads : (rank + 1) * heads])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("fragments", "tensor_size"), [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (1, 4)])
def test_data_parallel_ranks_read_a_tensor_once_between_them(tmp_path, ranks, fragments, tensor_size):
    """Each reads its own range of the flattened tensor and its own lanes, from whatever files hold them."""
    folder = write(
        tmp_path / "step_00000001", fragments=fragments, tensor_size=tensor_size, lane_parts=(1, 2, 4)[fragments % 3]
    )
    read = 0
    for rank, wanted in enumerate(WEIGHT.flatten().tensor_split(ranks)):
        reader, start = CheckpointReader(folder), rank * wanted.numel()
        found = reader.local_range(KEY, (16, 6), Partition(0, 2), 0, 1, start, start + wanted.numel())
        assert torch.equal(found, wanted)
        lanes = MEMORY.chunk(ranks)[rank]
        assert torch.equal(reader.memory_tensor("memory/0/M", lanes, rank * len(lanes), 0), lanes)
        read += reader.bytes_read
    assert read == WEIGHT.nbytes + MEMORY.nbytes


def test_rows_of_padding_may_differ(tmp_path):
    """A vocabulary of 13 tokens, padded to 16 there and to 20 here, over two tensor-parallel ranks."""
    reader = CheckpointReader(write(tmp_path / "step_00000001", fragments=2, partition=Partition(0)))
    expected = torch.cat([WEIGHT[:13], torch.zeros(7, 6)])
    for rank, part in enumerate(expected.chunk(2)):
        found = reader.local_range(KEY, (10, 6), Partition(0), rank, 2, 7, 55, rows=13)
        assert torch.equal(found, part.flatten()[7:55])
    with pytest.raises(CheckpointError, match=r"has shape \(16, 6\); the model's has \(20, 6\)"):
        reader.local_range(KEY, (10, 6), Partition(0), 0, 2, 7, 55, rows=17)


def test_what_is_not_there_is_named(tmp_path):
    reader = CheckpointReader(write(tmp_path / "step_00000001", fragments=2))
    with pytest.raises(CheckpointError, match=r"step_00000001 holds no tensor master/absent"):
        reader.local_tensor("master/absent", (1,), Partition(None), 0, 1)
    with pytest.raises(CheckpointError, match=r"linear_fc1.weight has shape \(16, 6\); the model's has \(32, 6\)"):
        reader.local_tensor(KEY, (32, 6), Partition(0, 2), 0, 1)
    with pytest.raises(CheckpointError, match="memory/0/M does not hold lanes 6 to 9, heads 0 to 3; .* train.lanes"):
        reader.memory_tensor("memory/0/M", torch.empty(4, 4, 3, 3), 6, 0)
    with pytest.raises(CheckpointError, match="memory/0/M has shape"):
        reader.memory_tensor("memory/0/M", torch.empty(4, 4, 5, 5), 0, 0)


def test_missing_fragment_is_noticed(tmp_path):
    folder = write(tmp_path / "step_00000001", fragments=2)
    summary = json.loads((folder / SUMMARY).read_text())
    for name in ("rank_00001.json", "rank_00001.safetensors"):
        del summary["files"][name]
    write_summary(folder, summary)
    with pytest.raises(CheckpointError, match=r"linear_fc1.weight is incomplete: elements 48 to 95 of 96 are in no"):
        CheckpointReader(folder)


def test_sizes_are_checked_at_once_and_contents_by_verify(tmp_path):
    folder = write(tmp_path / "step_00000001")
    path = folder / "rank_00000.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"rank_00000.safetensors was changed after it was written"):
        CheckpointReader(folder).verify()
    path.write_bytes(content[:-1])
    size = len(content)
    with pytest.raises(CheckpointError, match=rf"{path} has {size - 1} bytes; the checkpoint recorded {size} bytes"):
        CheckpointReader(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path} is missing"):
        CheckpointReader(folder)


def test_garbage_instead_of_tensors_is_an_error_with_the_file(tmp_path):
    folder = write(tmp_path / "step_00000001")
    path = folder / "rank_00000.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(CheckpointError, match=r"rank_00000.safetensors is damaged or holds no tensors"):
        read_weight(CheckpointReader(folder), 0, 1)


def test_summary_that_was_edited(tmp_path):
    folder = write(tmp_path / "step_00000001")
    (folder / SUMMARY).write_text((folder / SUMMARY).read_text().replace('"step": 1', '"step": 2'))
    with pytest.raises(CheckpointError, match=r"checkpoint.json was changed after it was written"):
        CheckpointReader(folder)


@pytest.mark.parametrize("content", ["", "{", '{"format_version": 99, "files": {}}'])
def test_unreadable_summary(tmp_path, content):
    folder = write(tmp_path / "step_00000001")
    (folder / SUMMARY).write_text(content)
    with pytest.raises(CheckpointError, match=SUMMARY):
        CheckpointReader(folder)


def test_finding_a_checkpoint(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        find_checkpoint(run)
    first, second = (write(run / "checkpoints" / f"step_0000000{i}") for i in (1, 2))
    pointer = run / "checkpoints" / LATEST
    pointer.write_text("step_00000001\n")
    assert find_checkpoint(run) == find_checkpoint(run / "checkpoints") == first
    assert find_checkpoint(second) == second
    pointer.write_text("step_00000009\n")
    with pytest.raises(CheckpointError, match="latest names step_00000009, which is not a checkpoint"):
        find_checkpoint(run)


def test_candidates_go_back_from_the_one_that_latest_names(tmp_path):
    """Newer ones come last: a run that went back to an earlier checkpoint has left them aside."""
    assert candidates(tmp_path) == []
    first, second, third = folders = [write(tmp_path / f"step_0000000{i}") for i in (1, 2, 3)]
    (tmp_path / "step_00000004").mkdir()  # never finished
    assert candidates(tmp_path) == folders[::-1]
    (tmp_path / LATEST).write_text("step_00000002\n")
    assert candidates(tmp_path) == [second, first, third]
    (tmp_path / LATEST).write_text("step_00000007\n")
    assert candidates(tmp_path) == folders[::-1]


@pytest.mark.parametrize(
    ("section", "setting", "value", "expected"),
    [
        ("model", "num_layers", 2048, "describes a model of .* parameters, its files hold"),
        ("model", "hidden_size", 1 << 16, "describes a model of .* parameters, its files hold"),
        ("model", "num_layers", 10**9, "config: model.num_layers = 1000000000: must be at most 2,048"),
        ("model", "num_attention_heads", 0, "config: model.num_attention_heads = 0: must be at least 1"),
        ("train", "lanes", "8", "config: train.lanes = '8' has the wrong type"),
        ("data", "sets", [{"path": "${oc.env:HOME}"}], "reads the environment, which a stored configuration may not"),
    ],
)
def test_a_configuration_that_is_not_that_of_the_files(tmp_path, section, setting, value, expected):
    folder = tmp_path / "step_00000002"
    shutil.copytree(FIRST_VERSION / "run" / "checkpoints" / folder.name, folder)
    CheckpointReader(folder).check_model()
    content = json.loads((folder / SUMMARY).read_text())
    content["config"][section][setting] = value
    write_summary(folder, {name: item for name, item in content.items() if name != "sha256"})
    with pytest.raises(CheckpointError, match=f"^{folder}.*{expected}"):
        CheckpointReader(folder).check_model()
