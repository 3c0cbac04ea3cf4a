"""The batch script against stand-ins for srun and scontrol that record how they are called."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm" / "train.sbatch"

SRUN = """#!/usr/bin/env bash
trap 'got=1' USR1
got=0
echo "$*" > srun.arguments
env > srun.environment
until [[ -e let-go ]] || ((got)); do sleep 0.05; done
[[ ! -e $INFINI_STOP_FILE ]] || echo seen > stop.file
echo "$got" > srun.signalled
exit "${SRUN_CODE:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'alpha1\\nalpha2\\n'; else echo "$*" >> scontrol.calls; fi
"""


@pytest.fixture
def job(tmp_path):
    """Starts the script as Slurm would; what the stand-ins saw lies in `tmp_path`."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def start(**settings) -> subprocess.Popen:
        environment = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)}
        environment |= {"SLURM_JOB_ID": "41234", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "alpha[1-2]"}
        environment |= {"SLURM_CPUS_ON_NODE": "4"} | settings
        process = subprocess.Popen(
            ["bash", str(SCRIPT), "run.yaml", "train.steps=5"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.monotonic() + 10
        while not (tmp_path / "srun.environment").exists() or not (tmp_path / "srun.environment").read_text():
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()
            time.sleep(0.02)
        return process

    return start


def test_starts_one_torchrun_per_node_and_returns_its_exit_code(job, tmp_path):
    process = job(SRUN_CODE="3", SLURM_GPUS_ON_NODE="8")
    (tmp_path / "let-go").touch()
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 3, output
    assert (tmp_path / "srun.arguments").read_text().endswith("launch/torchrun.sh train run.yaml train.steps=5\n")
    environment = (tmp_path / "srun.environment").read_text().splitlines()
    assert {"NNODES=2", "NPROC=8", "RDZV_ENDPOINT=alpha1:21234", "RDZV_ID=41234-0"} <= set(environment)
    assert not (tmp_path / "scontrol.calls").exists()


def test_signal_reaches_the_step_and_the_job_is_requeued(job, tmp_path):
    process = job(SLURM_RESTART_COUNT="2")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 0, output
    assert (tmp_path / "srun.signalled").read_text() == "1\n"
    assert (tmp_path / "stop.file").exists()
    assert not list(tmp_path.glob(".stop-*"))
    assert (tmp_path / "scontrol.calls").read_text() == "requeue 41234\n"
    assert "RDZV_ID=41234-2" in (tmp_path / "srun.environment").read_text().splitlines()
    assert (tmp_path / "srun.arguments").read_text().endswith("train.steps=5 --resume\n")


def test_requeues_are_capped(job, tmp_path):
    process = job(SLURM_RESTART_COUNT="3", MAX_REQUEUES="3")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "MAX_REQUEUES=3 reached" in output
    assert not (tmp_path / "scontrol.calls").exists()


def test_the_log_is_appended_and_the_signal_goes_to_the_shell():
    directives = [
        line.removeprefix("#SBATCH ") for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")
    ]
    assert {"--open-mode=append", "--requeue", "--signal=B:USR1@180"} <= set(directives)
