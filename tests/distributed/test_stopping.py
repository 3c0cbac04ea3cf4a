"""Real runs that are asked to stop, that are told to leave at once, and that hang."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.training.stopping import ECHO_S, STOPPED
from tests.distributed.runs import PATIENCE_S, ROOT, Run, wait_for
from tests.prepared import write_set

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("stopping") / "set", [37, 500, 130, 64, 250, 90, 17, 400])


@pytest.fixture(scope="module")
def calm(pools, data, tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("calm") / "run", data, *LONG)
    run.train_in(pools)
    return run


LONG = ("train.steps=60", "checkpoint.interval=2", "parallel.pipeline=2")


def stop_with(run: Run, number: signal.Signals) -> None:
    """Let the run take a few steps, and ask the launcher to end it."""
    before = run.newest()
    wait_for(lambda: run.newest() > before, "a checkpoint")
    run.process.send_signal(number)
    assert run.wait() == STOPPED, run.text()[-2000:]


def test_stopped_again_and_again_it_is_the_same_run(data, calm, tmp_path):
    """A signal, a time limit, the launcher's stop file: an exit code of their own, and in the end nothing shows."""
    run = Run(tmp_path / "run", data, *LONG)
    run.start()
    stop_with(run, signal.SIGTERM)
    assert "signal SIGTERM" in run.text()
    first = run.newest()
    assert 2 <= first < 60
    run.overrides.append("resilience.max_minutes=0.0001")
    run.start("--resume")
    assert run.wait() == STOPPED
    assert f"stopping after step {first + 1}: resilience.max_minutes is over" in run.text()
    run.overrides.pop()
    asked = tmp_path / "asked-by-the-launcher"
    asked.touch()
    run.start("--resume", INFINI_STOP_FILE=str(asked))
    assert run.wait() == STOPPED
    assert f"stopping after step {first + 1}: stop file {asked}" in run.text()  # asked before the first step
    assert asked.exists()  # it is the launcher's
    run.start("--resume")
    assert run.wait() == 0, run.text()[-2000:]
    assert run.result() == calm.result()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_every_signal_saves_and_ends_well(data, calm, tmp_path, number):
    run = Run(tmp_path / "run", data, *LONG, *(["resilience.stop_signal=USR2"] if number == signal.SIGUSR2 else []))
    run.start()
    stop_with(run, number)
    assert f"signal {number.name}" in run.text()
    run.start("--resume")
    assert run.wait() == 0, run.text()[-2000:]
    assert run.result() == calm.result()


def start_script(script: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


INTERRUPTED = """
import pathlib, time
import torch.distributed as dist
dist.get_rank = lambda: 0
from pipeline.config.schema import ResilienceConfig
from pipeline.training.resilience import StopRequest
stop = StopRequest(ResilienceConfig(), pathlib.Path("nowhere"))
stop.install()
print("ready", flush=True)
while stop.reason is None:
    time.sleep(0.01)
print(stop.reason, flush=True)
time.sleep(600)  # a step that takes long
"""


def test_second_interrupt_leaves_at_once():
    process = start_script(INTERRUPTED)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "signal SIGINT\n"
    process.send_signal(signal.SIGINT)  # an echo: Slurm and terminals send it to launcher and ranks
    time.sleep(1.2 * ECHO_S)
    assert process.poll() is None
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (130, "second interrupt: leaving without saving\n")
    assert time.monotonic() - start < 10


HANG = """
import sys
from pathlib import Path
from launch.processes.agent import launch_workers
sys.exit(launch_workers("tests.distributed.hanging_rank", sys.argv[1:], 2))
"""


def test_rank_that_hangs_is_named_and_ends_the_run(tmp_path):
    """Rank 1 sleeps while it reads the data of step 3, rank 0 waits for it in a collective."""
    start = time.monotonic()
    process = start_script(HANG, str(tmp_path))
    output, _ = process.communicate(timeout=PATIENCE_S)
    ready = (tmp_path / "hangs").stat().st_mtime
    assert process.returncode == 1
    told = r"\[rank [01]\] error: HangError: no progress for \d s, in \w+ of step 3; late: "
    told += r"rank 1 on \S+ in data of step 3; "
    assert re.match(told, output) and output.count("error") == 2, output  # and the name of the traceback's file
    stacks = (tmp_path / "hang-rank1.txt").read_text()
    assert "hanging_rank.py" in stacks and "read_slowly" in stacks
    assert "all_reduce" in (tmp_path / "hang-rank0.txt").read_text()
    assert time.time() - ready < 30 and time.monotonic() - start < PATIENCE_S
