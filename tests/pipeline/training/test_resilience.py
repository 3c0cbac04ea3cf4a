"""Spikes, requests to stop, what `infini inspect` says: without process groups."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import statistics
import time

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from data.files import sealed
from launch import cli
from pipeline.checkpoint.folder import LATEST, SUMMARY, candidates, file_hash
from pipeline.checkpoint.schema import FORMAT_VERSION
from pipeline.config.schema import ResilienceConfig
from pipeline.training import resilience, stopping
from pipeline.training.resilience import SpikeDetector, StopRequest, Watchdog, _Progress, late_ranks
from tests.prepared import write_set


def test_score_is_the_distance_in_robust_deviations():
    detector = SpikeDetector(window=50, threshold=8)
    noise = random.Random(0)
    losses = [noise.gauss(3, 0.1) for _ in range(80)]
    for loss in losses:
        detector.add(loss)
    recent = losses[-50:]
    median = statistics.median(recent)
    deviation = statistics.median(abs(loss - median) for loss in recent) * 1.4826
    assert detector.score(4.0) == pytest.approx((4.0 - median) / deviation)
    assert 7 < detector.score(4.0) < 14
    assert detector.score(2.0) < 0  # a fall is no spike


def test_no_spike_before_there_is_something_to_compare_with():
    detector = SpikeDetector(window=100, threshold=8)
    for _ in range(9):
        detector.add(3.0)
        assert detector.score(1e9) == 0
    detector.add(3.0)
    assert detector.score(1e9) > 8 and math.isfinite(detector.score(1e9))  # all losses equal: no division by zero
    assert detector.score(3.001) < 8


def test_one_spike_does_not_hide_the_next():
    detector = SpikeDetector(window=20, threshold=8)
    noise = random.Random(1)
    for _ in range(20):
        detector.add(noise.gauss(3, 0.1))
    before = detector.score(6.0)
    detector.add(1e6)
    assert detector.score(6.0) == pytest.approx(before, rel=0.3)


def test_restored_detector_goes_on_as_the_old_one():
    detector, other = SpikeDetector(20, 8), SpikeDetector(20, 8)
    for step in range(30):
        detector.add(3 + 0.1 * math.sin(step))
    other.add(99.0)
    other.load_state_dict(json.loads(json.dumps(detector.state_dict())))
    assert other.score(5.0) == detector.score(5.0) > 8


def test_late_ranks_are_named_with_their_operations():
    def at(count, phase, operation=""):
        return _Progress(count, 7, phase, False, operation, "n1")

    waiting, working = "wait for hidden states, microbatch 0, chunk 1", "forward, microbatch 0, chunk 1"
    assert late_ranks([at(20, "data"), at(21, "forward_backward", waiting), at(20, "data")]) == (
        "late: ranks 0, 2 on n1 in data of step 7"
    )
    assert late_ranks([at(21, "forward_backward", o) for o in (working, waiting, waiting)]) == (
        f"all ranks are in the same phase: rank 0 on n1 in forward_backward of step 7 ({working}); "
        f"ranks 1, 2 on n1 in forward_backward of step 7 ({waiting})"
    )


def test_the_watchdog_is_patient_until_the_first_step_and_with_the_disk(tmp_path):
    watchdog = Watchdog(300, 1620, tmp_path)
    watchdog.progress(1, "forward_backward")
    assert watchdog.limit_s == 1620
    watchdog.warm = True
    assert watchdog.limit_s == 300
    watchdog.progress(2, "save", patient=True)
    assert watchdog.limit_s == 1620
    watchdog.progress(3, "data")
    watchdog.operation("forward")
    assert watchdog.limit_s == 300


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(resilience.dist, "get_rank", lambda: 0)
    monkeypatch.delenv(stopping.STOP_FILE, raising=False)
    monkeypatch.delenv(resilience.LAUNCH_TIME, raising=False)


def test_stop_files(alone, tmp_path, monkeypatch):
    launchers = tmp_path / "elsewhere"
    monkeypatch.setenv(stopping.STOP_FILE, str(launchers))
    stop = StopRequest(ResilienceConfig(stop_file="halt"), tmp_path)
    assert stop.reason is None
    launchers.touch()
    assert stop.reason == f"stop file {launchers}"
    (tmp_path / "halt").touch()
    assert stop.reason == f"stop file {tmp_path / 'halt'}"
    stop.clear_file()
    assert not (tmp_path / "halt").exists() and launchers.exists()
    monkeypatch.setattr(resilience.dist, "get_rank", lambda: 1)
    assert stop.reason is None  # one process looks, so that a shared disk is asked once


def test_time_limit_counts_from_the_launch(alone, tmp_path, monkeypatch):
    assert StopRequest(ResilienceConfig(max_minutes=1e6), tmp_path).reason is None
    assert StopRequest(ResilienceConfig(max_minutes=1e-6), tmp_path).reason == "resilience.max_minutes is over"
    monkeypatch.setenv(resilience.LAUNCH_TIME, str(time.time() - 3600))  # earlier attempts have used up the hour
    assert StopRequest(ResilienceConfig(max_minutes=59), tmp_path).reason == "resilience.max_minutes is over"
    assert StopRequest(ResilienceConfig(max_minutes=61), tmp_path).reason is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_signals_count_while_installed(alone, tmp_path, number):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)}
    stop = StopRequest(ResilienceConfig(stop_signal="USR2"), tmp_path)
    stop.install()
    try:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == f"signal {number.name}"
    finally:
        stop.uninstall()
    assert {n: signal.getsignal(n) for n in before} == before


# Inspecting


def write_checkpoint(run, step: int, data, lanes: int = 2):
    """A checkpoint of one layer, as one process writes it."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    tensors = {
        "master/layers.0.attention.beta": torch.tensor([0.0, math.log(3.0)]),
        "master/layers.0.attention.write_gate.bias": torch.tensor([1.5]),
        "memory/0/M": torch.full((lanes, 1, 2, 2), 2.0),
        "memory/0/z": torch.zeros(lanes, 1, 2),
    }
    entries = []
    for key, tensor in tensors.items():
        if key.startswith("memory"):
            entries.append({"key": key, "first_lane": 0, "first_head": 0, "shape": list(tensor.shape)})
        else:
            place = {"start": 0, "count": tensor.numel(), "local_shape": list(tensor.shape)}
            entries.append({"key": key, "partition_dim": None, "partition_stride": 1, **place})
            entries[-1] |= {"tensor_rank": 0, "tensor_size": 1}
    save_file(tensors, folder / "rank_00000.safetensors")
    common = {"consumed": [0], "credit": [0], "stream": "s"}
    cursors = [common | {"set": 0, "document": 1, "segment": 7, "taken": [5]}, common | {"set": None, "taken": [6]}]
    index = {"tensors": entries, "lanes": dict(zip(("0", "1"), cursors, strict=True))}
    (folder / "rank_00000.json").write_text(json.dumps(index))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in sorted(folder.iterdir())}
    memory = {"rule": "delta", "write_gate": "hard"}
    model = {"num_layers": 1, "hidden_size": 4, "num_attention_heads": 2, "segment_length": 16, "memory": memory}
    content = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "tokens": 1000 * step,
        "windows": step,
        "recent_losses": [],
        "optimizer_steps": step - 1,
        "files": files,
        "layout": {"tensor": 1, "pipeline": 1, "data": 1, "zero_stage": 2, "world_size": 1},
        "vocab_size": 257,
        "config": {"name": "small", "model": model, "data": {"sets": [{"path": str(data)}]}},
        "versions": {"torch": "2"},
    }
    (folder / SUMMARY).write_text(json.dumps(sealed(content)))
    (run / "checkpoints" / LATEST).write_text(folder.name + "\n")
    return folder


def inspect(capsys, *arguments) -> tuple[int, str]:
    code = cli.main(["inspect", *map(str, arguments)])
    return code, " ".join(capsys.readouterr().out.split())


def test_inspecting_a_checkpoint(tmp_path, capsys):
    data = write_set(tmp_path / "set", [37, 500])
    folder = write_checkpoint(tmp_path / "run", 9, data)
    code, text = inspect(capsys, folder)
    assert code == 0
    for part in (
        "step 9 (8 of them applied)",
        "tokens 9,000",
        "tensor 1 x context 1 x pipeline 1 x data 1, ZeRO 2, 1 processes",
        f"0 {data}/train-000000.tar:00000001 7 5",
        "1 between documents 0 6",
        "0 0.500 / 0.625 / 0.750 1.500 4 0",  # sigmoid(beta), bias, norms of M and z
        "whole: all hashes match",
    ):
        assert part in text, part
    (data / "manifest.json").unlink()
    code, text = inspect(capsys, folder)
    assert code == 0 and "document 1 of set 0" in text and "note: documents of" in text


def test_inspecting_damage(tmp_path, capsys):
    run = tmp_path / "run"
    old, new = (write_checkpoint(run, step, tmp_path / "set") for step in (4, 8))
    assert inspect(capsys, run)[0] == 0
    tensors = new / "rank_00000.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    for folder in (new, run):
        code, text = inspect(capsys, folder)
        assert code == 1 and f"DAMAGED {tensors} was changed after it was written" in text
        assert inspect(capsys, folder, "--no-verify")[0] == 0  # nobody looked
    assert f"newest whole checkpoint: {old}" in inspect(capsys, run)[1]
    (new / SUMMARY).unlink()
    assert f"DAMAGED {new / SUMMARY}" in inspect(capsys, new)[1]
    (run / "checkpoints" / LATEST).write_text("step_00000099\n")
    code, text = inspect(capsys, run)
    assert code == 1 and "latest names step_00000099, which is not a checkpoint here" in text


def test_checkpoints_that_the_run_has_left_aside_come_last(tmp_path):
    folders = [write_checkpoint(tmp_path, step, tmp_path) for step in (4, 8, 12, 16)]
    (tmp_path / "checkpoints" / LATEST).write_text("step_00000008\n")
    assert candidates(tmp_path / "checkpoints") == [folders[1], folders[0], folders[3], folders[2]]
    (tmp_path / "checkpoints" / LATEST).write_bytes(b"\xff\xfe")
    assert set(candidates(tmp_path / "checkpoints")) == set(folders)


def test_a_rank_that_gives_no_sign_of_life_is_told_from_one_that_is_late(tmp_path, monkeypatch):
    """Three ranks in one process: rank 1 goes on to publish, rank 2 does not."""
    store, rank = dist.HashStore(), {"now": 0}
    monkeypatch.setattr(resilience.dist, "get_rank", lambda: rank["now"])
    monkeypatch.setattr(resilience.dist, "get_world_size", lambda: 3)
    watchdogs = []
    for number in range(3):
        monkeypatch.setattr(resilience.socket, "gethostname", lambda number=number: f"n{number}")
        watchdogs.append(Watchdog(8, 8, tmp_path))
        rank["now"] = number
        watchdogs[-1].progress(5, "data")
        watchdogs[-1]._publish(store)
    rank["now"] = 0
    watchdogs[0].progress(5, "backward")

    def publish_another(_):
        rank["now"] = 1
        watchdogs[1]._publish(store)
        rank["now"] = 0

    monkeypatch.setattr(watchdogs[0]._done, "wait", publish_another)
    told = watchdogs[0]._late(store, 0.1)
    assert told == "no sign of life from rank 2 on n2: is the node gone, or the network to it?"
    watchdogs[2].progress(5, "data")

    def publish_others(_):
        for number in (1, 2):
            rank["now"] = number
            watchdogs[number]._publish(store)
        rank["now"] = 0

    monkeypatch.setattr(watchdogs[0]._done, "wait", publish_others)
    assert watchdogs[0]._late(store, 0.1) == "late: rank 1 on n1 in data of step 5"
