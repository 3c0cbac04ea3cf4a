"""Saves of one process: what they write, what they remove, and what they leave alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.checkpoint.folder import candidates, checkpoint_name, find_checkpoint
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.writer import CheckpointSaver, Snapshot
from pipeline.reporting.inspect import read_run


@pytest.fixture(scope="module", autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def snapshot(step: int) -> Snapshot:
    layout = {"tensor": 1, "pipeline": 1, "data": 1, "zero_stage": 1, "world_size": 1}
    summary = {"optimizer_steps": step, "layout": layout, "vocab_size": 257, "config": {}}
    entry = {"key": "master/a", "start": 0, "count": 3, "local_shape": [3], "partition_dim": None}
    entry |= {"partition_stride": 1, "tensor_rank": 0, "tensor_size": 1}
    tensors = {"master/a": torch.full((3,), float(step)), "rng": torch.get_rng_state()}
    numbers = {"step": step, "tokens": 0, "windows": step, "recent_losses": []}
    return Snapshot(step, numbers, {}, tensors, [entry], summary, owns_lanes=True)


def save(folder: Path, *steps: int, asynchronous: bool = True, **options) -> list[str]:
    """Save one after the other; everything that was noted."""
    saver, notes = CheckpointSaver(folder, keep=1, asynchronous=asynchronous, **options), []
    for step in steps:
        saver.save(lambda step=step: snapshot(step))
        saver.wait()
        report = saver.finished()
        assert report.error is None
        notes += report.notes
    saver.close()
    return notes


def user_file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    return path


def test_what_is_the_users_stays_and_stops_no_save(tmp_path):
    folder = tmp_path / "checkpoints"
    own = [
        user_file(folder / name)
        for name in (
            "step_00000010_before_lr_change/notes",
            "step_5/notes",
            "step_00000003",
            "step_000000002/checkpoint.json",
            ".step_00000009.partial/thesis.txt",
            ".step_00000009.0123456789abcdef.partial/thesis.txt",
            ".step_mine.partial/x",
        )
    ]
    elsewhere = user_file(tmp_path / "elsewhere" / "checkpoint.json")
    (folder / "step_00000000").symlink_to(elsewhere.parent)
    ours = user_file(folder / ".step_00000007.0123456789abcdef.partial" / "rank_00000.json").parent
    old = user_file(folder / ".step_00000006.replaced" / ".checkpoint.json.partial").parent
    notes = save(folder, 1, 2, 4)
    assert all(path.read_text() == "mine" for path in (*own, elsewhere))
    assert not ours.exists() and not old.exists()
    assert len(notes) == 2 and all("is not removed: 'thesis.txt' in it" in note for note in notes)  # once each
    assert [path.name for path in candidates(folder)] == ["step_00000004"]
    CheckpointReader(find_checkpoint(tmp_path)).verify()
    told = [note for note in read_run(tmp_path, verify=False).notes if "passed over" in note]
    assert told == [
        f"{folder / 'step_00000000'} is a link and was passed over: name the folder that it leads to instead"
    ]


def test_a_checkpoint_with_a_file_of_the_users_is_kept(tmp_path):
    save(tmp_path, 1)
    note = user_file(tmp_path / "step_00000001" / "notes.txt")
    (told,) = save(tmp_path, 2, 3)
    assert "step_00000001 is not removed: 'notes.txt' in it was not put there by a save" in told
    assert note.read_text() == "mine" and not (tmp_path / "step_00000002").exists()
    save(tmp_path, 1)  # the same step again takes the name; what was there is set aside
    (aside,) = tmp_path.glob(".step_00000001.*.replaced")
    assert (aside / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_links_under_predictable_names_are_not_followed(tmp_path, asynchronous):
    victim = user_file(tmp_path / "victim")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".latest.partial").symlink_to(victim)
    (folder / ".step_00000001.partial").symlink_to(tmp_path)
    save(folder, 1, asynchronous=asynchronous)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_all_files_have_the_modes_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        save(tmp_path / "checkpoints", 1, asynchronous=False)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert len(files) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}
    assert (tmp_path / "checkpoints" / checkpoint_name(1)).stat().st_mode & 0o777 == 0o777 & ~umask
