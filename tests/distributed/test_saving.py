"""Checkpoints are whole or absent, hold what the run was at that step, and a run that goes back loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.folder import SUMMARY, CheckpointError
from pipeline.checkpoint.reader import CheckpointReader
from tests.distributed import cases, saving_cases
from tests.prepared import write_set

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

SHORT = ["optimizer.warmup_steps=1", "checkpoint.interval=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(write_set(tmp_path_factory.mktemp("saving") / "set", [37, 500, 130, 64, 250, 90, 17, 400]))


def files(checkpoint: Path) -> dict:
    return CheckpointReader(checkpoint).summary.files


def test_training_goes_on_during_the_write_and_does_not_show(pools, data, tmp_path):
    """The write of step 4 waits until step 7 is done; what it writes is step 4, as a synchronous save writes it."""
    settings = ["train.steps=7", "checkpoint.interval=4", "parallel.zero_stage=2"]
    for name, held in (("true", 7), ("false", None)):
        arguments = {"folder": str(tmp_path / name), "data": data, "hold_writing_until": held}
        pools.run(2, saving_cases.train, overrides=[*settings, f"checkpoint.asynchronous={name}"], **arguments)
    behind, at_once = (tmp_path / name / "checkpoints" for name in ("true", "false"))
    for step in ("step_00000004", "step_00000007"):
        assert files(behind / step) == files(at_once / step)
    assert files(behind / "step_00000004") != files(behind / "step_00000007")


def test_keep_newest_and_every(pools, data, tmp_path):
    settings = [*SHORT, "train.steps=7", "checkpoint.keep=2", "checkpoint.keep_every=3"]
    ranks = pools.run(1, saving_cases.train, folder=str(tmp_path / "run"), data=data, overrides=settings)
    assert ranks[0]["checkpoints"] == [3, 6, 7]


def test_run_that_goes_back_keeps_what_it_writes(pools, data, tmp_path):
    """Checkpoints of the steps that were given up neither push out the new ones nor are resumed in their place."""
    run = tmp_path / "run"
    arguments = {"folder": str(run), "data": data}
    settings = [*SHORT, "checkpoint.keep=4", "checkpoint.asynchronous=false"]
    pools.run(1, saving_cases.train, overrides=[*settings, "train.steps=6"], **arguments)
    old = str(run / "checkpoints" / "step_00000003")
    back = pools.run(1, saving_cases.train, overrides=[*settings, "train.steps=4"], resume=old, **arguments)
    assert back[0]["checkpoints"] == [3, 4, 5, 6]
    assert (run / "checkpoints" / "latest").read_text() == "step_00000004\n"
    shutil.rmtree(run / "checkpoints" / "step_00000004")  # what comes before it is of this run, what follows is not
    started = pools.run(1, cases.try_to_resume, overrides=[*settings, "train.steps=9"], resume="latest", **arguments)
    assert started[0]["step"] == 3


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_last_save_is_made_again_until_it_succeeds(pools, data, tmp_path, asynchronous):
    settings = ["train.steps=2", "optimizer.warmup_steps=1", f"checkpoint.asynchronous={asynchronous}"]
    arguments = {"data": data, "overrides": settings, "where": "fsync", "rank": 1}
    ranks = pools.run(2, cases.train_on_full_disk, folder=str(tmp_path / "two"), failures=2, **arguments)
    assert [(rank["error"], rank["saves"]) for rank in ranks] == [(None, 3)] * 2
    assert ranks[0]["left"] == ["latest", "step_00000002"]
    ranks = pools.run(2, cases.train_on_full_disk, folder=str(tmp_path / "three"), failures=3, **arguments)
    assert ranks[0]["error"] == ranks[1]["error"]
    assert "No space left on device: make room there" in ranks[0]["error"]
    assert "(3 attempts in a row)" in ranks[0]["error"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB at `run/checkpoints`, and a function to mount it with other options."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder, lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_disk_that_is_really_full(pools, data, small_disk, asynchronous):
    """No room for the first checkpoint: told, nothing left behind; with room made meanwhile the run saves and ends."""
    folder, remount = small_disk
    settings = ["train.steps=12", "checkpoint.interval=1", "checkpoint.attempts=99", "checkpoint.keep=1"]
    settings += [f"checkpoint.asynchronous={asynchronous}"]
    sign = folder.parent / "step-5"
    enlarge = threading.Thread(target=lambda: _when(sign, lambda: remount("size=20m")))
    enlarge.start()
    arguments = {"folder": str(folder.parent), "data": data, "overrides": settings}
    ranks = pools.run(2, saving_cases.train, **arguments, stop_at=(0, 5, str(sign)))
    enlarge.join()
    assert "CHECKPOINT OF STEP 1 FAILED, it will be tried again: rank" in ranks[0]["printed"]
    assert "o space left on device: make room there, or keep fewer checkpoints" in ranks[0]["printed"]
    assert [rank["error"] for rank in ranks] == [None, None]
    assert ranks[0]["checkpoints"] == [12]
    CheckpointReader(folder / "step_00000012").verify()


def _when(path: Path, action) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    action()


def test_read_only_folder_ends_the_run_with_the_reason(pools, data, small_disk):
    folder, remount = small_disk
    remount("ro")
    settings = [*SHORT, "train.steps=9", "checkpoint.attempts=2"]
    ranks = pools.run(2, saving_cases.train, folder=str(folder.parent), data=data, overrides=settings)
    assert ranks[0]["error"] == ranks[1]["error"]
    assert "OSError: rank 0 could not write the checkpoint" in ranks[0]["error"]
    assert "Read-only file system" in ranks[0]["error"] and "(2 attempts in a row)" in ranks[0]["error"]
    assert ranks[0]["printed"].count("FAILED, it will be tried again") == 1  # the last one is not


def test_any_byte_of_the_summary_counts(pools, data, tmp_path):
    """checkpoint.json has no hash elsewhere: its own must notice every change, and so must a missing key."""
    settings = ["train.steps=1", "optimizer.warmup_steps=0"]
    pools.run(1, saving_cases.train, folder=str(tmp_path / "run"), data=data, overrides=settings)
    path = tmp_path / "run" / "checkpoints" / "step_00000001" / SUMMARY
    content = path.read_bytes()
    reader = CheckpointReader(path.parent)
    for place in range(0, len(content), 41):
        for bit in (1, 16):
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            try:
                assert CheckpointReader(path.parent).summary == reader.summary  # white space
            except CheckpointError as error:
                assert SUMMARY in str(error)
    summary = json.loads(content)
    for key in summary:
        path.write_text(json.dumps({name: value for name, value in summary.items() if name != key}))
        with pytest.raises(CheckpointError, match=SUMMARY):
            CheckpointReader(path.parent)


# Spikes: a step that is left out leaves no trace

SPIKY = ["train.steps=17", "checkpoint.interval=6", "checkpoint.keep=9", "resilience.spike_threshold=1000"]


def assert_same_run(ranks: list[dict], expected: list[dict]) -> None:
    for rank, other in zip(ranks, expected, strict=True):
        assert (rank["error"], other["error"]) == (None, None)
        for key in ("step", "windows", "lanes"):
            assert rank[key] == other[key]
        tensors, wanted = rank["tensors"], other["tensors"]
        assert tensors.keys() == wanted.keys()
        assert [name for name in tensors if not torch.equal(tensors[name], wanted[name])] == []


@pytest.mark.parametrize("layout", ["parallel.zero_stage=2", "parallel.pipeline=2"])
def test_skipped_spike_leaves_no_trace(pools, data, tmp_path, layout):
    arguments = {"data": data, "overrides": [*SPIKY, layout, "resilience.spike_action=skip"]}
    ranks = pools.run(2, saving_cases.train, folder=str(tmp_path / "a"), spikes={14: 1e6}, **arguments)
    # The window is left out; the step counts, with its learning rate.
    expected = pools.run(2, saving_cases.train, folder=str(tmp_path / "b"), skip_after={13: (1, 1)}, **arguments)
    assert_same_run(ranks, expected)
    assert "loss spike at step 14" in ranks[0]["printed"] and "action: skip" in ranks[0]["printed"]
    # A run that was stopped in between still knows what it compares losses with.
    last = str(tmp_path / "a" / "checkpoints" / "step_00000012")
    again = pools.run(2, saving_cases.train, folder=str(tmp_path / "c"), spikes={14: 1e6}, resume=last, **arguments)
    assert_same_run(again, ranks)


@pytest.mark.parametrize("layout", ["parallel.zero_stage=2", "parallel.pipeline=2"])
def test_rolled_back_spikes_leave_no_trace(pools, data, tmp_path, layout):
    """The second spike comes before a new checkpoint: the lanes must pass both windows."""
    arguments = {"data": data, "overrides": [*SPIKY, layout, "resilience.spike_action=rollback"]}
    ranks = pools.run(2, saving_cases.train, folder=str(tmp_path / "a"), spikes={14: 1e6, 17: 1e6}, **arguments)
    expected = pools.run(2, saving_cases.train, folder=str(tmp_path / "b"), skip_after={12: (5, 0)}, **arguments)
    assert_same_run(ranks, expected)
    assert "rolled back to step 12; the lanes go on 2 windows later" in ranks[0]["printed"]
    assert "rolled back to step 12; the lanes go on 5 windows later" in ranks[0]["printed"]


def test_spikes_without_end_end_the_run(pools, data, tmp_path):
    spikes = dict.fromkeys(range(13, 40), 1e6)
    for action, reason in (
        ("rollback", "SpikeError: loss spike at step 13, after 2 roll-backs to the same checkpoint"),
        ("skip", "SpikeError: 3 steps in a row were skipped"),
    ):
        settings = [*SPIKY, f"resilience.spike_action={action}"]
        settings += ["resilience.max_rollbacks=2", "train.max_nonfinite_steps=3"]
        ranks = pools.run(
            1, saving_cases.train, folder=str(tmp_path / action), data=data, overrides=settings, spikes=spikes
        )
        assert ranks[0]["error"].startswith(reason)


def test_warned_spike_is_trained_on(pools, data, tmp_path):
    arguments = {"data": data, "spikes": {14: 1e6}}
    warned, plain = (
        pools.run(
            1,
            saving_cases.train,
            folder=str(tmp_path / action),
            overrides=[*SPIKY, f"resilience.spike_action={action}"],
            **arguments,
        )
        for action in ("warn", "none")
    )
    assert_same_run(warned, plain)
    assert "loss spike at step 14" in warned[0]["printed"] and "loss spike" not in plain[0]["printed"]


# Leaving: every rank at the same step, however only one is asked


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGUSR1", "file"])
def test_one_rank_that_is_asked_to_stop_stops_all(pools, data, tmp_path, how):
    run = tmp_path / "run"
    arguments = {"folder": str(run), "data": data, "overrides": ["train.steps=6", "optimizer.warmup_steps=1"]}
    rank, what = (0, str(run / "stop")) if how == "file" else (1, how)
    ranks = pools.run(2, saving_cases.train, **arguments, stop_at=(rank, 3, what))
    assert [(rank["step"], rank["checkpoints"], rank["error"]) for rank in ranks] == [(3, [3], None)] * 2
    reason = f"stop file {run / 'stop'}" if how == "file" else f"signal {how}"
    assert f"stopping after step 3: {reason}" in ranks[0]["printed"]
    assert not (run / "stop").exists()
