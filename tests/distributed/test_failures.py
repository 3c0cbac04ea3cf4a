"""Training when things go wrong: bad numbers, dead ranks, broken data, settings that cannot run."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.processes.worker import FOLLOWED
from launch.processes.world import VARIABLES
from tests.distributed import cases, failing_ranks
from tests.prepared import write_set

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("failures") / "set", [37, 500, 130, 64, 250, 90, 17, 400])


# One rank of four


FAULTS = [
    "none:-1:0",
    "loader:1:3",
    "to_device:3:2",
    "forward:3:3",
    "backward:2:3",
    "statistics:2:2",
    "optimizer:0:3",
    "writer:3:2",
    "save:1:2",
    "exit:0:2",
    "load:2:0",
    "evaluate:3:0",
    "exchange:1:2",
    "exchange_backward:2:2",
    "killed:3:2",
]
"""PLACE:RANK:STEP, see `failing_ranks`. The first is nowhere: the run whose checkpoint the last ones load."""


@pytest.fixture(scope="module")
def faults(data, tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-m", "tests.distributed.failing_ranks", str(folder), str(data), *FAULTS]
    ran = subprocess.run(command, env=environment() | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads((folder / "results.json").read_text())


def errors_told(output: str) -> list[str]:
    """The errors that a run tells; gloo's lines, of a connection to a rank that has gone meanwhile, are not its own."""
    return [line for line in output.splitlines() if "error:" in line.lower() and "/gloo/transport/" not in line]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", FAULTS[1:-1])
def test_a_failing_rank_says_why_and_takes_the_others_along(faults, fault):
    """From every place of a step, out of DeepSpeed's context and out of collectives, without a launcher that kills."""
    place, rank, _ = fault.split(":")
    assert faults["none"]["codes"] == [0, 0, 0, 0], faults["none"]["output"]
    found = faults[place]
    expected = failing_ranks.ERRORS.get(place, RuntimeError(f"something is wrong in {place}"))
    reason = str(expected) if isinstance(expected, ValueError) else f"{type(expected).__name__}: {expected}"
    told = errors_told(found["output"])
    assert told == [f"[rank {rank}] error: {reason}"], found["output"]
    assert "Traceback" not in found["output"]
    codes = [FOLLOWED] * 4
    codes[int(rank)] = 2 if isinstance(expected, ValueError) else 1
    assert found["codes"] == codes
    assert found["outlived_s"] < 10


@pytest.mark.timeout(600)
def test_the_others_of_a_rank_killed_in_the_exchange_say_so(faults):
    """No process is left to say why: the first of the others to notice says whom it has lost, and all leave."""
    found = faults["killed"]
    told = errors_told(found["output"])
    assert len(told) == 1 and re.match(r"\[rank [012]\] error: on .*: the connection to .* was lost", told[0])
    assert "is its node gone" in told[0] and "Traceback" not in found["output"]
    assert found["codes"][3] == -signal.SIGKILL
    assert sorted(found["codes"][:3])[1:] == [FOLLOWED] * 2 and 0 not in found["codes"]
    assert found["outlived_s"] < 30


# Numbers that are not finite


POISONED = {
    "1111": (1, []),
    "2111": (2, ["parallel.tensor=2"]),
    "1211": (2, ["parallel.pipeline=2", "bptt.chunks_per_window=2"]),
    "1122": (2, ["parallel.zero_stage=2"]),
    "1123": (2, ["parallel.zero_stage=3"]),
    "context2": (2, ["parallel.context=2"]),
}


@pytest.mark.parametrize(
    ("name", "poison"),
    [
        *((name, "loss") for name in POISONED),
        # What follows is the same: a norm that is not finite.
        *(
            pytest.param(name, "gradient", marks=[] if name in ("2111", "1123") else pytest.mark.slow)
            for name in POISONED
        ),
    ],
)
def test_step_with_bad_numbers_never_happened(pools, data, tmp_path, name, poison):
    """Skipped on all ranks though one alone is hurt: weights, moments and memory as before, lanes moved on."""
    world, layout = POISONED[name]
    arguments = {"folder": str(tmp_path), "data": str(data), "overrides": ["metrics.interval=1", *layout]}
    ranks = pools.run(world, cases.poisoned_steps, **arguments, poison=poison, first=4, count=2)
    for rank in ranks:
        assert rank["error"] is None
        assert rank["step"] == 5
        assert rank["optimizer_steps"] == 4  # three before, one after
        for promise in ("weights_unchanged", "memory_rolled_back", "lanes_moved", "goes_on"):
            assert rank[promise], promise
    lanes = [started for rank in ranks for started in rank["lanes_started"]]
    assert any(lanes) and not all(lanes)  # both kinds of lane were seen
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    skipped = {line["step"]: line["progress/skipped_steps"] for line in lines if "progress/skipped_steps" in line}
    assert [skipped[step] for step in range(1, 7)] == [0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_too_many_bad_steps_end_the_run_with_their_circumstances(pools, data, tmp_path, poison):
    arguments = {"folder": str(tmp_path), "data": str(data), "overrides": ["train.max_nonfinite_steps=3"]}
    ranks = pools.run(2, cases.poisoned_steps, **arguments, poison=poison, first=3, count=9)
    assert ranks[0]["error"] == ranks[1]["error"]
    message = ranks[0]["error"]
    assert "not finite in 3 steps in a row, since step 3;" in message
    assert re.findall(r"lane (\d+): ", message) == ["0", "1", "2", "3"]
    assert all("train-000000.tar" in lane for lane in message.split("lane ")[1:])


# What the main process does alone


def test_all_processes_share_what_came_of_the_main_ones_action(pools):
    main, other = pools.run(2, cases.on_main_outcomes)
    assert main[0] == other[0] == 7
    assert main[1][0] == "ConfigError" and main[1][1].endswith("a.b = 1: no")
    assert main[2:4] == [("PermissionError", "[Errno 13] Permission denied: '/run'"), ("OddError", "1 is not 2")]
    assert main[1:4] == other[1:4]
    assert main[4][0] == "UnicodeDecodeError" and other[4] == ("ValueError", main[4][1])
    assert (main[5], other[5]) == (1, 0)


@pytest.mark.parametrize(
    ("make", "resume", "reason"),
    [
        (lambda run: run.write_text("a file"), None, "File exists"),
        (lambda run: (run / "config.yaml").mkdir(parents=True), None, "config.yaml"),
        (lambda run: (run / "metrics.jsonl").mkdir(parents=True), "latest", "metrics.jsonl"),
        (lambda run: None, "nowhere", "nowhere"),
    ],
    ids=["folder", "config", "metrics", "checkpoint"],
)
def test_a_start_that_fails_on_the_main_process_fails_on_all(pools, data, tmp_path, make, resume, reason):
    run = tmp_path / "run"
    make(run)
    arguments = {"folder": str(run), "data": str(data), "overrides": [], "resume": resume}
    main, other = pools.run(2, cases.start_in, **arguments)
    assert main == other and reason in main[1]


# Windows that differ


@pytest.mark.parametrize(
    ("layout", "rank"), [("parallel.tensor=2", 1), ("parallel.pipeline=2", 0), ("parallel.context=2", 1)]
)
def test_ranks_that_share_lanes_and_read_different_windows_stop(pools, data, tmp_path, layout, rank):
    arguments = {"folder": str(tmp_path), "data": str(data), "overrides": [layout, "data.stagger=false"]}
    ranks = pools.run(2, cases.one_rank_skips, **arguments, rank=rank, document=1)
    assert [r["skipped"] > 0 for r in ranks] == [rank == 0, rank == 1]
    assert ranks[0]["error"] == ranks[1]["error"] and ranks[0]["step"] == ranks[1]["step"]
    message = ranks[0]["error"]
    assert re.match(rf"step {ranks[0]['step'] + 1}: processes that share .* lane \d: rank \d read ", message), message
    reading = {int(r): names for r, names in re.findall(r"rank (\d) read ([^;]*?)(?=, rank|;|\. Is)", message)}
    assert sorted(reading) == [0, 1]
    assert "train-000000.tar:00000001" in reading[1 - rank] and "00000001" not in reading[rank]
    assert "data.skip_bad_documents" in message


# The real command


def environment() -> dict[str, str]:
    launcher = (*VARIABLES, "INFINI_DEBUG")
    return {k: v for k, v in os.environ.items() if k not in launcher} | {"PYTHONPATH": str(ROOT)}


def infini_train(folder: Path, data: Path, *arguments: str) -> subprocess.Popen:
    """`infini train` on the tiny model, in a session of its own."""
    config = folder / "run.yaml"
    config.write_text(f"data: {{sets: [{{path: {data}}}]}}\nrun_dir: {folder / 'run'}\n")
    command = [sys.executable, "-m", "launch.cli", "train", str(config), *cases.TINY, *arguments]
    return subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float = 120) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {timeout} s:\n{output}")
    return process.returncode, output


def wait_for_metrics(process: subprocess.Popen, folder: Path, lines: int = 2) -> None:
    """Until the run has written some steps."""
    metrics = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
        if process.poll() is not None or time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"the run did not get going:\n{process.communicate()[0]}")
        time.sleep(0.05)


def ranks_of(process: subprocess.Popen) -> dict[int, psutil.Process]:
    """The training processes, by rank."""
    children = psutil.Process(process.pid).children(recursive=True)
    return {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}


LONG = ["train.steps=100000", "metrics.interval=1", "parallel.pipeline=2"]


def test_killed_rank_takes_the_run_down_within_seconds(tmp_path, data):
    process = infini_train(tmp_path, data, "--nproc", "2", *LONG)
    wait_for_metrics(process, tmp_path)
    ranks = ranks_of(process)
    assert sorted(ranks) == [0, 1]
    ranks[1].kill()
    began = time.monotonic()
    code, output = finish(process)
    assert time.monotonic() - began < 20
    assert code == 128 + signal.SIGKILL
    assert f"rank 1 on {socket.gethostname()} was killed by SIGKILL" in output.splitlines()[-1]
    assert not any(rank.is_running() for rank in ranks.values())
    assert list((tmp_path / "run").glob("checkpoints/step_*")) == []


def test_shard_broken_while_training(tmp_path):
    """The windows that could be read are trained on; then the run ends with the shard's name, once."""
    data = write_set(tmp_path / "set", [400] * 40)
    process = infini_train(tmp_path, data, "--nproc", "2", *LONG)
    wait_for_metrics(process, tmp_path)
    shard = data / "train-000000.tar"
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size // 4)
    code, output = finish(process)
    assert code == 2
    assert output.count("error:") == 1
    assert "train-000000.tar" in next(line for line in output.splitlines() if "error:" in line)
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc", "3", "parallel.tensor=2"], "3 process(es) cannot hold parallel.tensor = 2"),
        (
            ["--nproc", "2", "parallel.pipeline=2", "parallel.zero_stage=3"],
            "parallel.zero_stage = 3 with",
        ),
        (["--nproc", "2", "data.sets=[{path: nowhere}]"], "data.sets.0.path = nowhere: no prepared set there"),
        (["train.lanez=3"], "train.lanez"),
    ],
)
def test_settings_that_cannot_run_start_nothing(tmp_path, data, arguments, message):
    code, output = finish(infini_train(tmp_path, data, *arguments))
    assert code == 2
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_shard_that_is_gone_is_told_before_training(tmp_path):
    data = write_set(tmp_path / "set", [400] * 4)
    (data / "train-000000.tar").unlink()
    code, output = finish(infini_train(tmp_path, data, "--nproc", "2"))
    assert code == 2
    assert output.count("train-000000.tar") == 1 and "error:" in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
