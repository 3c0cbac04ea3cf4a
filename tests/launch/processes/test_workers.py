"""Real ranks over gloo: the reason of a failure is told once and last, nobody hangs, signals arrive."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.processes.worker import FOLLOWED
from pipeline.training.stopping import ECHO_S, STOPPED

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
LAUNCH = (
    "import sys; from launch.processes.agent import launch_workers; "
    "sys.exit(launch_workers('rank_program', sys.argv[1:], 2))"
)
PATIENCE_S = 150
"""For a busy machine: some four seconds when it is not."""

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(2 * PATIENCE_S)]


def environment(**settings) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "INFINI_DEBUG")}
    return inherited | {"PYTHONPATH": f"{ROOT}:{HERE}", "PYTHON": sys.executable} | settings


def start(mode: str, run_dir: Path, **settings) -> subprocess.Popen:
    command = [sys.executable, "-c", LAUNCH, mode, str(run_dir)]
    return subprocess.Popen(
        command, env=environment(**settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    return process.returncode, output


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.05)


def test_first_failure_is_the_only_one_told(tmp_path):
    code, output = finish(start("bad-data", tmp_path))
    report = tmp_path / "error-rank1.txt"
    assert output == f"[rank 1] error: shard train-000003.tar is truncated\n(traceback in {report})\n"
    assert code == 2
    assert "rank_program.py" in report.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["console.log", "error-rank1.txt"]
    told = [line[21:] for line in (tmp_path / "console.log").read_text().splitlines()]
    assert told == output.splitlines()


def test_one_interrupted_rank_ends_all_before_there_is_a_run_folder(tmp_path):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    code, output = finish(start("interrupted-early", tmp_path, TMPDIR=str(temporary)))
    assert (code, output) == (130, "infini: error: rank 1 was interrupted\n")
    assert list(temporary.iterdir()) == []


def test_failing_thread_ends_a_rank_whose_main_thread_waits(tmp_path):
    code, output = finish(start("bad-thread", tmp_path))
    assert output.startswith("[rank 1] error: the writer's thread failed\n")
    assert code == 2
    assert "rank_program.py" in (tmp_path / "error-rank1.txt").read_text()


def test_same_error_on_every_rank_is_told_once(tmp_path):
    code, output = finish(start("everywhere", tmp_path))
    assert code == 2
    assert output.count("same mistake on every rank") == 1


def test_rank_blocked_for_ever_does_not_outlive_the_failure(tmp_path):
    code, output = finish(start("blocked", tmp_path))
    assert output.startswith("[rank 1] error: RuntimeError: wrong number\n")
    assert code == 1
    failed_at = (tmp_path / "error-rank1.txt").stat().st_mtime
    assert time.time() - failed_at < 20  # the agent alone takes 30 s to kill a rank that ignores SIGTERM


def test_killed_rank_is_named_last(tmp_path):
    code, output = finish(start("killed", tmp_path))
    assert output.splitlines()[-1].startswith(f"infini: error: rank 1 on {socket.gethostname()} was killed by SIGKILL")
    assert code == 128 + signal.SIGKILL
    assert (tmp_path / "console.log").read_text()[21:] == output.splitlines()[-1].removeprefix("infini: ") + "\n"


def test_signals_reach_the_ranks_which_leave_in_their_own_time(tmp_path):
    process = start("signals", tmp_path)
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    process.send_signal(signal.SIGUSR1)
    wait_for(tmp_path / "usr1-0", tmp_path / "usr1-1")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (0, "")


def test_signals_before_the_handlers_stand_wait_for_them_and_two_are_one(tmp_path):
    """TERM twice within milliseconds, as Slurm sends it, kills no rank. Told to stop is neither a failure nor done."""
    process = start("starting", tmp_path)
    wait_for(tmp_path / "up-0", tmp_path / "up-1")
    process.send_signal(signal.SIGUSR1)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    time.sleep(0.5)
    assert process.poll() is None
    (tmp_path / "go").touch()
    assert finish(process) == (STOPPED, "")
    assert {"usr1-0", "usr1-1", "ready-0", "ready-1"} <= {path.name for path in tmp_path.iterdir()}


def test_second_interrupt_kills_the_ranks_unless_it_is_an_echo(tmp_path):
    process = start("starting", tmp_path)
    wait_for(tmp_path / "up-0", tmp_path / "up-1")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    time.sleep(1.2 * ECHO_S)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert finish(process) == (128 + signal.SIGINT, "")


def test_a_launcher_that_waits_for_other_nodes_leaves_when_told(tmp_path, free_port):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    nodes = {"NNODES": "2", "NPROC": "1", "RDZV_ENDPOINT": f"127.0.0.1:{free_port}"}
    agent = torchrun("fine", tmp_path, TMPDIR=str(temporary), **nodes)
    deadline = time.monotonic() + PATIENCE_S
    while not list(temporary.glob("infini-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    agent.send_signal(signal.SIGTERM)
    code, output = finish(agent)
    assert (code, output) == (128 + signal.SIGTERM, "infini: SIGTERM, and no ranks are there: left\n")
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_interrupt_ends_ranks_without_handlers_quietly(tmp_path):
    process = start("wait", tmp_path)
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    process.send_signal(signal.SIGINT)
    assert finish(process) == (128 + signal.SIGINT, "")


def torchrun(mode: str, run_dir: Path, **settings) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / "torchrun.sh"), mode, str(run_dir)],
        env=environment(MODULE="rank_program", **settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("mode", "code", "reason"),
    [
        ("bad-data", 2, "[rank 1] error: shard train-000003.tar is truncated"),
        ("killed", 128 + signal.SIGKILL, f"infini: error: rank 1 on {socket.gethostname()} was killed by SIGKILL"),
    ],
)
def test_two_agents_are_two_nodes_and_tell_one_reason(tmp_path, free_port, mode, code, reason):
    nodes = {"NNODES": "2", "NPROC": "1", "RDZV_ENDPOINT": f"127.0.0.1:{free_port}"}
    # An earlier launch under the same name has left its claim: it must not silence this one.
    stale = tmp_path / ".first-error-same-name-0-0"
    stale.touch()
    os.utime(stale, (time.time() - 60, time.time() - 60))
    agents = [torchrun(mode, tmp_path, RDZV_ID="same-name", **nodes) for _ in range(2)]
    results = sorted((finish(agent) for agent in agents), key=lambda result: result[0] == FOLLOWED)
    assert [found for found, _ in results] == [code, FOLLOWED], results
    assert results[0][1].startswith(reason) and results[0][1].count("error:") == 1
    assert results[1][1] == "infini: error: the ranks of this node left because a rank elsewhere failed\n"


def test_nodes_that_do_not_come_are_told(tmp_path, free_port):
    nodes = {"NNODES": "2", "NPROC": "1", "RDZV_ENDPOINT": f"127.0.0.1:{free_port}", "RDZV_CONF": "join_timeout=2"}
    code, output = finish(torchrun("fine", tmp_path, **nodes))
    assert code == 2 and output.count("\n") == 1, output
    assert output.startswith(f"infini: error: not all of 2 nodes have come to 127.0.0.1:{free_port} in time")


def test_two_numbered_nodes(tmp_path, free_port):
    nodes = {"NNODES": "2", "NPROC": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    agents = [torchrun("fine", tmp_path, NODE_RANK=str(rank), **nodes) for rank in range(2)]
    assert [finish(agent) for agent in agents] == [(0, ""), (0, "")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fine-0-of-2-threads-1", "fine-1-of-2-threads-1"]


@pytest.mark.parametrize(
    ("mode", "code", "attempts"),
    [
        pytest.param("bad-data", 2, ["attempt 0, the first"], marks=pytest.mark.slow),  # decided as on fixed nodes
        ("bug", 1, ["attempt 0, the first", "attempt 1, on the same nodes"]),
    ],
)
def test_ranks_of_an_open_number_of_nodes_start_again_where_that_may_help(tmp_path, free_port, mode, code, attempts):
    nodes = {"NNODES": "1:2", "NPROC": "2", "RDZV_ENDPOINT": f"127.0.0.1:{free_port}", "MAX_RESTARTS": "1"}
    found, output = finish(torchrun(mode, tmp_path, RDZV_CONF="last_call_timeout=1", **nodes))
    assert found == code, output
    assert re.findall("attempt .*", output) == attempts
    assert output.count("[rank 1] error: ") == len(attempts)


@pytest.mark.parametrize(("mode", "code", "starts"), [("bad-data", 2, 1), ("bug", 1, 2)])
def test_ranks_of_fixed_nodes_start_again_where_that_may_help(tmp_path, free_port, mode, code, starts):
    nodes = {"NNODES": "2", "NPROC": "1", "RDZV_ENDPOINT": f"127.0.0.1:{free_port}", "MAX_RESTARTS": "1"}
    agents = [torchrun(mode, tmp_path, **nodes) for _ in range(2)]
    results = [finish(agent) for agent in agents]
    assert {found for found, _ in results} == {code, FOLLOWED}, results
    assert "".join(output for _, output in results).count("[rank 1] error: ") == starts, results


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"NNODES": "2"}, "NNODES=2 needs RDZV_ENDPOINT"),
        ({"NNODES": "1:2"}, "nodes that come and go have no numbers"),
        ({"RDZV_ENDPOINT": "a:1", "NODE_RANK": "0"}, "exclude each other"),
        ({"RDZV_ENDPOINT": "nowhere"}, "must be host:port"),
        ({"NODE_RANK": "0"}, "needs MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_torchrun_script_refuses_what_cannot_meet(tmp_path, settings, expected):
    code, output = finish(torchrun("fine", tmp_path, **settings))
    assert code == 2
    assert expected in output


@pytest.fixture
def free_port():
    # Not one that the kernel gives to outgoing connections: between this probe and its use another process, or the
    # waiting node's own connection attempt, may sit on it.
    for port in random.sample(range(20000, 32000), 50):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise RuntimeError("no free port")
