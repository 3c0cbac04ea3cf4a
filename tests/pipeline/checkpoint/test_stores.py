"""Checkpoints in object stores: a copy counts when all of it is there, and is read in slices."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from data.files import FileError, StoreError, StorePath, place, store
from launch.cli import main
from model.megatron import parallel_state
from pipeline.checkpoint.folder import LATEST, SUMMARY, CheckpointError, candidates, find_checkpoint, superfluous
from pipeline.checkpoint.loading import open_newest, open_verified
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.tensor_file import write_tensors
from pipeline.checkpoint.tensor_reader import TensorReader
from pipeline.checkpoint.uploading import check_new_store, checkpoints_in
from pipeline.checkpoint.writer import CheckpointSaver
from pipeline.config.load import ConfigError
from pipeline.parallel.topology import initialize
from pipeline.reporting.inspect import find_damage
from pipeline.training.starting import _go_on_from
from tests.data.test_stores import FailingMemory, upload
from tests.data.test_stores import fresh as fresh  # the stores are empty, and impatient
from tests.pipeline.checkpoint.test_saving import one_process as one_process
from tests.pipeline.checkpoint.test_saving import snapshot
from tests.tiny_run import write_run

RUN = "failing://bucket/run"


@pytest.fixture
def saver(tmp_path):
    made = CheckpointSaver(
        tmp_path / "run" / "checkpoints", keep=2, keep_every=4, asynchronous=True, store=checkpoints_in(RUN)
    )
    yield made
    made.close()


def save(saver: CheckpointSaver, *steps: int):
    """Save one after the other; the last report."""
    for step in steps:
        saver.save(lambda step=step: snapshot(step))
        saver.wait()
        report = saver.finished()
        assert report.error is None
    return report


def objects() -> list[str]:
    inside = StorePath(RUN).key + "/"
    return sorted(name.removeprefix(inside) for name in FailingMemory.store if name.startswith(inside))


def whole() -> list[str]:
    return [path.name for path in sorted(candidates(checkpoints_in(RUN)), key=str)]


def test_copies_are_the_checkpoints_and_are_kept_like_them(saver, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: x\n")
    assert save(saver, 1).upload.names == ["step_00000001"]
    save(saver, *range(2, 8))
    assert whole() == ["step_00000004", "step_00000006", "step_00000007"]
    assert find_checkpoint(place(RUN)) == checkpoints_in(RUN) / "step_00000007"
    here, there = (CheckpointReader(find_checkpoint(place(at))) for at in (str(tmp_path / "run"), RUN))
    there.verify()
    assert there.summary == here.summary and torch.equal(there.whole_tensor("master/a"), here.whole_tensor("master/a"))
    assert torch.equal(there.rng_state(0), here.rng_state(0))
    assert "config.yaml" in objects() and (StorePath(RUN) / "config.yaml").read(0, 8) == b"name: x\n"
    with pytest.raises(ConfigError, match="holds checkpoints already"):
        check_new_store(RUN)


class Down(Exception):
    """What a driver raises."""


def fail_writes(monkeypatch, when) -> list[str]:
    """Uploads and writes of keys for which `when` is true fail; the keys of all that were tried."""
    tried: list[str] = []
    for name in ("put_file", "pipe_file"):
        true = getattr(fsspec.implementations.memory.MemoryFileSystem, name)

        def write(self, *arguments, _true=true, _key=1 if name == "put_file" else 0, **options):
            tried.append(arguments[_key])
            if when(arguments[_key]):
                raise Down("SlowDown")
            return _true(self, *arguments, **options)

        monkeypatch.setattr(FailingMemory, name, write, raising=False)
    return tried


@pytest.mark.parametrize("where", ["rank_00000.safetensors", "rank_00000.json", SUMMARY, LATEST])
def test_a_copy_that_fails_does_not_count_and_goes_with_the_next(saver, tmp_path, monkeypatch, where):
    save(saver, 1)
    monkeypatch.setenv(store.PATIENCE, "0.01")
    with monkeypatch.context() as patch:
        tried = fail_writes(patch, lambda key: key.endswith(where))
        report = save(saver, 2)
        assert "rank 0: " in report.upload.error and "SlowDown" in report.upload.error and RUN in report.upload.error
        assert sum(key.endswith(where) for key in tried) > 1  # asked again first
    # The one before stays what the store gives; the new one is on the disk.
    assert find_checkpoint(place(RUN)).name == "step_00000001"
    assert whole() == ["step_00000001"] + (["step_00000002"] if where == LATEST else [])
    assert find_checkpoint(tmp_path / "run").name == "step_00000002"
    assert save(saver, 3).upload.names == ["step_00000003"] + ([] if where == LATEST else ["step_00000002"])
    assert whole() == ["step_00000002", "step_00000003"] and find_checkpoint(place(RUN)).name == "step_00000003"
    assert {name.split("/")[1] for name in objects()} == {LATEST, "step_00000002", "step_00000003"}


def test_the_same_step_again_takes_the_place_of_the_old_one(saver, monkeypatch):
    save(saver, 1, 2, 3)
    first = CheckpointReader(checkpoints_in(RUN) / "step_00000002").summary
    monkeypatch.setenv(store.PATIENCE, "0")
    with monkeypatch.context() as patch:
        # The run has gone back to step 1; step 2 is another one now, and its copy breaks off.
        fail_writes(patch, lambda key: key.endswith(".json"))
        saver.save(lambda: _other(snapshot(2)))
        saver.wait()
        assert saver.finished().upload.error
        assert whole() == ["step_00000003"]  # never half of the one and half of the other
    assert saver.upload().error is None
    second = CheckpointReader(checkpoints_in(RUN) / "step_00000002")
    assert second.summary != first and second.whole_tensor("master/a").tolist() == [9.0] * 3
    assert find_checkpoint(place(RUN)).name == "step_00000002"


def test_a_run_that_goes_back_to_what_its_store_lacks(saver, tmp_path):
    """`latest` there names what is there at all times, and what the run goes on from once that is copied."""
    save(saver, 4, 5, 6)  # 4 is kept for good
    here, there = tmp_path / "run" / "checkpoints", checkpoints_in(RUN)
    for name, size in (there / "step_00000005").sizes().items():
        assert size is not None
        (there / "step_00000005" / name).remove()
    _go_on_from(here / "step_00000005", [here, there])
    assert find_checkpoint(here).name == "step_00000005" and find_checkpoint(there).name == "step_00000004"
    assert candidates(here, there)[0] == here / "step_00000005"  # a restart's
    assert saver.upload().names == ["step_00000005"]
    assert find_checkpoint(there).name == "step_00000005"


def test_a_store_that_is_not_this_runs_is_left_alone(tmp_path):
    """Neither a copy that is begun nor one whose end comes after another run has taken the store."""
    asked, allowed = [], [0]

    def confirm() -> None:
        asked.append(objects())
        if len(asked) > allowed[0]:
            raise ConfigError(["checkpoint.store: in use"])

    made = CheckpointSaver(tmp_path / "run" / "checkpoints", keep=2, store=checkpoints_in(RUN), confirm_store=confirm)
    assert "in use" in save(made, 1).upload.error and objects() == []
    allowed[0] = 2
    assert "in use" in save(made, 2).upload.error and whole() == [] and len(objects()) == 2
    allowed[0] = 99
    assert made.upload().names == ["step_00000002", "step_00000001"]
    made.close()


def _other(made):
    made.tensors["master/a"] = torch.full((3,), 9.0)
    return made


def test_a_run_goes_on_from_the_newest_wherever_it_is(saver, tmp_path, monkeypatch):
    monkeypatch.setattr(CheckpointReader, "check_model", lambda reader: None)  # there is no model
    save(saver, 1, 2)
    here, there = tmp_path / "run" / "checkpoints", checkpoints_in(RUN)
    told: list[str] = []
    assert open_newest([here, there], told.append).folder == here / "step_00000002"
    shutil.rmtree(here / "step_00000002")
    (here / LATEST).write_text("step_00000001\n")
    assert open_newest([here, there], told.append).folder == there / "step_00000002"
    assert open_newest([tmp_path / "bare" / "checkpoints", there], told.append).folder == there / "step_00000002"
    assert told == []
    # A copy without its last file is none; one whose file is too short is told.
    shard = there / "step_00000002" / "rank_00000.safetensors"
    contents = shard.read(0, shard.size())
    shard.write(contents[:-1])
    assert open_newest([tmp_path / "bare", there], told.append).folder == there / "step_00000001"
    assert len(told) == 1 and "DAMAGED CHECKPOINT, trying an older one" in told[0] and str(shard) in told[0]
    shard.write(contents[:-1] + bytes([contents[-1] ^ 1]))
    assert find_damage(there / "step_00000002", contents=False) == []
    assert "SHA-256 differs" in find_damage(there / "step_00000002", contents=True)[0]
    told.clear()
    shard.remove()
    assert open_newest([tmp_path / "bare", there], told.append).folder == there / "step_00000001"
    assert len(told) == 1 and f"{shard} is missing" in told[0]
    with pytest.raises(CheckpointError, match=f"{shard} is missing"):
        open_verified(there / "step_00000002")
    # A store that is silent: the disk's is taken, and that is said; with nothing on the disk the store is named.
    monkeypatch.setenv(store.PATIENCE, "0")
    monkeypatch.setattr(FailingMemory, "info", lambda *_: (_ for _ in ()).throw(Down("no route")))
    told.clear()
    assert open_newest([here, there], told.append).folder == here / "step_00000001"
    assert "STORE LEFT OUT" in told[0] and "no route" in told[0]
    with pytest.raises(StoreError, match="no route"):
        open_newest([tmp_path / "bare", there], told.append)


def test_what_is_the_users_stays(saver):
    own = ["step_00000001/thesis.txt", "step_5/x", "notes"]
    save(saver, 1)
    for name in own:
        (checkpoints_in(RUN) / name).write(b"mine")
    notes = save(saver, 2, 3).upload.notes
    assert notes == [f"{RUN}/checkpoints/step_00000001 is not removed: 'thesis.txt' in it was not put there by a save"]
    assert save(saver, 5).upload.notes == []  # once
    assert all((checkpoints_in(RUN) / name).read(0, 4) == b"mine" for name in own)


def test_slices_of_a_file_in_a_store_and_no_more(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "flat": torch.randn(1000, generator=generator),
        "memory": torch.randn(4, 6, 5, 3, generator=generator, dtype=torch.float64),
        "half": torch.randn(7, 3, generator=generator).bfloat16(),
        "rng": torch.arange(9, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.0),
    }
    write_tensors(tmp_path / "x.safetensors", tensors, {"made": "here"})
    path = place("failing://bucket/x.safetensors")
    path.upload(tmp_path / "x.safetensors")
    there, true = TensorReader(path), load_file(tmp_path / "x.safetensors")
    assert there.metadata == {"made": "here"} and there.shapes == {name: tuple(t.shape) for name, t in true.items()}
    for name, tensor in true.items():
        assert torch.equal(there.read(name), tensor) and there.read(name).dtype == tensor.dtype
    FailingMemory.requests.clear()
    for ranges in ([slice(10, 500)], [slice(0, 0)]):
        assert torch.equal(there.read("flat", *ranges), true["flat"][tuple(ranges)])
    for ranges in ([slice(1, 3)], [slice(1, 3), slice(2, 5)], [slice(0, 4), slice(5, 6)], [slice(2, 2), slice(0, 6)]):
        assert torch.equal(there.read("memory", *ranges), true["memory"][tuple(ranges)])
    fetched = sum(stop - start for _, start, stop in FailingMemory.requests)
    assert fetched == 4 * 490 + 8 * 15 * (2 * 6 + 2 * 3 + 4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:-1], "its header describes"),
        (lambda data: b"\xff" * 8 + data[8:], "its header does not fit"),
        (lambda data: data[:4], "its header does not fit"),
        (lambda data: data.replace(b"[0,12]", b"[4,16]"), "does not lie where"),
        (lambda data: data.replace(b'"F32"', b'"X32"'), "is of X32, which is not read"),
        (lambda data: data[:12] + b"\x00" + data[13:], "is damaged"),
    ],
)
def test_damaged_headers_in_a_store_are_refused(tmp_path, change, reason):
    write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(3)})
    path = place("memory://bucket/x.safetensors")
    path.write(change((tmp_path / "x.safetensors").read_bytes()))
    with pytest.raises(FileError, match=f"memory://bucket/x.safetensors.*{reason}"):
        TensorReader(path)
    assert isinstance(path, StorePath)


def test_what_keep_holds_after_going_back():
    found = [Path(f"step_{step:08d}") for step in (1, 2, 3, 4, 5, 6)]
    assert [path.name[-1] for path in superfluous(found, 3, keep=2, keep_every=5)] == ["4", "6", "1"]
    assert superfluous(found, 6, keep=9, keep_every=0) == []


def test_a_run_in_a_store_is_inspected_and_exported_like_the_one_on_the_disk(tmp_path, capsys):
    initialize(tensor=1, pipeline=1, timeout_s=60)
    url = upload(write_run(tmp_path / "run"), "memory://bucket/run")
    parallel_state.destroy_model_parallel()
    assert main(["inspect", str(find_checkpoint(place(url)))]) == 0
    assert "whole: all hashes match" in capsys.readouterr().out
    assert main(["export-hf", url, "--out", str(tmp_path / "there")]) == 0
    assert main(["export-hf", str(tmp_path / "run"), "--out", str(tmp_path / "here")]) == 0
    here, there = ({f.name: f.read_bytes() for f in (tmp_path / at).iterdir()} for at in ("here", "there"))
    assert here == there and "model.safetensors" in here


def test_an_index_that_was_changed_is_refused(saver):
    save(saver, 1)
    index = checkpoints_in(RUN) / "step_00000001" / "rank_00000.json"
    contents = index.read(0, index.size())
    index.write(contents.replace(b"master/a", b"master/b"))
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        open_verified(checkpoints_in(RUN) / "step_00000001")
    assert dist.get_rank() == 0
