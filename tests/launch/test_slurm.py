"""The batch script against stand-ins for srun and scontrol that record how they are called."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.processes import job as job_module
from launch.processes.job import seconds
from pipeline.training.stopping import STOPPED

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"
PATIENCE_S = 60
"""For a busy machine."""

# It ends when it is let go or gets USR1; then every node's launcher leaves the code of CODES for it, and it returns 0.
SRUN = """#!/usr/bin/env bash
trap 'got=1' USR1
trap 'echo term >> srun.ended; exit 143' TERM
got=0
echo "$*" >> srun.arguments
[[ -z ${SAVED:-} ]] || echo "$SAVED" > "$INFINI_JOB_FOLDER/saved"
env > srun.environment.partial && mv srun.environment.partial srun.environment
until [[ -e let-go ]] || ((got)); do sleep 0.05; done
[[ ! -e $INFINI_STOP_FILE ]] || echo seen > stop.file
echo "$got" > srun.signalled
[[ -z ${REASON:-} ]] || echo "$REASON" > "$INFINI_JOB_FOLDER/stopped"
n=0
for code in ${NODE_CODES:-}; do echo "$code" > "$INFINI_JOB_FOLDER/ended-$((n++))"; done
[[ -z ${HANGS:-} ]] || until false; do sleep 0.05; done
exit "${SRUN_CODE:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show job")
        echo "JobId=41234 JobState=${STATE:-RUNNING} TimeLimit=${LIMIT:-1-00:00:00}"
        echo "   Command=${COMMAND:-}" ;;
    "show hostnames") printf 'alpha1\\nalpha2\\n' ;;
    *) echo "$*" >> scontrol.calls ;;
esac
"""


class Batch:
    """A job, started again and again as Slurm would; what the stand-ins saw lies in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tools = folder / "bin"
        self.tools.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (self.tools / name).write_text(text)
            (self.tools / name).chmod(0o755)
        self.process: subprocess.Popen | None = None

    def start(self, **settings: str) -> None:
        (self.folder / "srun.environment").unlink(missing_ok=True)
        environment = {"PATH": f"{self.tools}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(self.folder)}
        environment |= {"SLURM_JOB_ID": "41234", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "alpha[1-2]"}
        environment |= {"PYTHON": sys.executable, "COMMAND": f"{SCRIPT} run.yaml train.steps=5"} | settings
        self.process = subprocess.Popen(
            ["bash", str(self.folder / "script"), "run.yaml", "train.steps=5"],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline and self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)

    def finish(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, output

    def run(self, **settings: str) -> tuple[int, str]:
        """One launch whose step ends by itself."""
        (self.folder / "let-go").touch()
        self.start(**settings)
        return self.finish()

    def stop(self, number: signal.Signals = signal.SIGUSR1, **settings: str) -> tuple[int, str]:
        """One launch that gets a signal."""
        self.start(**settings)
        self.wait_for("srun.environment")
        self.process.send_signal(number)
        return self.finish()

    def seen(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def requeued(self) -> int:
        return self.seen("scontrol.calls").count("requeue 41234")

    def leftovers(self) -> list[str]:
        return [path.name for path in self.folder.glob(".*")]


@pytest.fixture
def batch(tmp_path):
    (tmp_path / "script").write_text(SCRIPT.read_text())  # Slurm runs a copy of it
    return Batch(tmp_path)


def test_starts_one_torchrun_per_node_from_any_folder_and_returns_its_exit_code(batch):
    code, output = batch.run(SRUN_CODE="2", SLURM_GPUS_ON_NODE="8", SLURM_CPUS_PER_TASK="6", SLURM_EXPORT_ENV="PATH")
    assert code == 2 and not batch.requeued, output
    assert batch.seen("srun.arguments")[0].endswith(f"bash {ROOT}/launch/torchrun.sh train run.yaml train.steps=5")
    environment = set(batch.seen("srun.environment"))
    assert {"NNODES=2", "RDZV_ENDPOINT=alpha1:21234", "RDZV_ID=41234-0", "SRUN_CPUS_PER_TASK=6"} <= environment
    assert "SLURM_EXPORT_ENV=ALL" in environment  # else the nodes see none of this, and each trains by itself
    assert batch.leftovers() == []


def test_with_min_nodes_a_lost_node_ends_nothing_and_its_code_does_not_count(batch):
    code, output = batch.run(MIN_NODES="1", SRUN_CODE="137", NODE_CODES="0")
    assert code == 0 and not batch.requeued, output
    assert batch.seen("srun.arguments")[0].startswith("--no-kill --kill-on-bad-exit=0 --wait=0 bash ")
    assert "NNODES=1:2" in batch.seen("srun.environment")
    code, output = batch.run(MIN_NODES="3")
    assert code == 2 and "MIN_NODES=3: must be from 1 to the job's 2 node(s)" in output


def test_the_first_launchers_code_counts_whatever_srun_makes_of_it(batch):
    """It ends the other nodes with TERM, and returns the highest code: a mistake would look like a failure."""
    code, output = batch.run(SRUN_CODE="143", NODE_CODES="2 143")
    assert code == 2 and not batch.requeued, output
    code, output = batch.run(SRUN_CODE="2", NODE_CODES="75 2")  # the first has only followed
    assert code == 2 and not batch.requeued, output


def test_what_the_user_says_about_meeting_is_taken(batch):
    code, output = batch.run(RDZV_ENDPOINT="beta:7", RDZV_ID="mine", NPROC="3")
    assert code == 0, output
    assert {"RDZV_ENDPOINT=beta:7", "RDZV_ID=mine-0", "NPROC=3"} <= set(batch.seen("srun.environment"))


def test_both_scripts_take_the_processes_of_a_node_from_one_place(batch):
    batch.run(SLURM_CPUS_ON_NODE="64")
    assert not any(line.startswith("NPROC=") for line in batch.seen("srun.environment"))
    assert "SLURM_GPUS_ON_NODE" in (ROOT / "launch" / "torchrun.sh").read_text()


def test_a_project_that_is_nowhere_is_said(batch):
    code, output = batch.run(COMMAND="/copied/train.sbatch run.yaml")
    assert code == 2 and "set INFINI_ROOT" in output
    code, output = batch.run(COMMAND="/copied/train.sbatch run.yaml", INFINI_ROOT=str(ROOT))
    assert code == 0, output


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_reaches_the_step_and_the_job_is_requeued(batch, number):
    """TERM, which a preempted job gets, too: srun would kill its tasks, so USR1 goes on to it."""
    code, output = batch.stop(number, SLURM_RESTART_COUNT="2", NODE_CODES=f"{STOPPED} {STOPPED}")
    assert code == 0 and batch.requeued == 1, output
    assert batch.seen("srun.signalled") == ["1"] and batch.seen("stop.file") == ["seen"]
    assert "RDZV_ID=41234-2" in batch.seen("srun.environment")
    assert batch.seen("srun.arguments")[0].endswith("train.steps=5 --resume")
    # The next launch begins without it.
    code, output = batch.run(SLURM_RESTART_COUNT="3")
    assert code == 0 and batch.requeued == 1, output
    assert batch.leftovers() == []


def test_finished_in_spite_of_the_signal_is_finished(batch):
    code, output = batch.stop()
    assert code == 0 and not batch.requeued, output


def test_requeues_are_capped(batch):
    code, output = batch.stop(SLURM_RESTART_COUNT="3", MAX_REQUEUES="3", NODE_CODES=f"{STOPPED} {STOPPED}")
    assert code == STOPPED and not batch.requeued
    assert "MAX_REQUEUES=3 reached" in output


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING", "TIMEOUT"])
def test_a_job_that_slurm_is_ending_is_left_to_it(batch, state):
    code, output = batch.stop(signal.SIGTERM, STATE=state, NODE_CODES=f"{STOPPED} {STOPPED}")
    assert code == STOPPED and not batch.requeued and f"the job is {state}" in output


@pytest.mark.parametrize(("reason", "requeued"), [("stop file runs/a/stop", 0), ("resilience.max_minutes is over", 1)])
def test_who_has_stopped_the_run_by_hand_wants_it_stopped(batch, reason, requeued):
    code, output = batch.run(NODE_CODES=f"{STOPPED} {STOPPED}", REASON=reason)
    assert batch.requeued == requeued and code == (0 if requeued else STOPPED), output


def test_failures_are_tried_again_while_there_is_progress(batch):
    """Three launches fail; the third has no newer checkpoint than the second."""
    for restart, saved in enumerate(["", "100"]):
        code, output = batch.run(SRUN_CODE="137", SAVED=saved, SLURM_RESTART_COUNT=str(restart))
        assert code == 0 and batch.requeued == restart + 1, output
    code, output = batch.run(SRUN_CODE="137", SAVED="100", SLURM_RESTART_COUNT="2")
    assert code == 137 and batch.requeued == 2 and "no newer checkpoint since (step 100)" in output
    assert batch.leftovers() == []


def test_failures_have_a_cap_of_their_own(batch):
    for restart in range(3):
        code, output = batch.run(SRUN_CODE="1", SAVED=str(restart), SLURM_RESTART_COUNT=str(restart), MAX_FAILURES="2")
    assert code == 1 and batch.requeued == 2 and "MAX_FAILURES=2 reached" in output


def test_a_time_limit_that_leaves_no_time_is_refused(batch):
    code, output = batch.run(LIMIT="00:04:00")
    assert code == 2 and "--time is 240 s" in output and not batch.seen("srun.arguments")
    code, output = batch.run(LIMIT="00:04:00", STOP_LEAD="60")
    assert code == 0, output


def test_limits_of_time():
    assert seconds("1-02:03:04") == 93784 and seconds("00:10:00") == 600
    assert seconds("UNLIMITED") is None and seconds("") is None


def test_srun_that_does_not_return_is_ended(batch, tmp_path, monkeypatch):
    """After the launchers have ended, and after the signal when the ranks do not leave."""
    patched = tmp_path / "patched.py"
    patched.write_text(
        "import sys\nfrom launch.processes import job\njob.LINGER_S = 0.5\njob.SPARE_S = 0.5\nsys.exit(job.main())\n"
    )
    script = tmp_path / "script"
    script.write_text(SCRIPT.read_text().replace("-m launch.processes.job", str(patched)))
    assert "patched.py" in script.read_text() and job_module.LINGER_S > 1
    code, output = batch.run(HANGS="1", NODE_CODES="0 0")
    assert code == 0 and "srun has not" in output and batch.seen("srun.ended") == ["term"], output
    (tmp_path / "let-go").unlink()
    code, output = batch.stop(HANGS="1", STOP_LEAD="1")
    assert code == 0 and batch.requeued == 1 and "without saving" in output, output


def test_the_log_is_appended_and_the_signal_goes_to_the_shell():
    directives = [
        line.removeprefix("#SBATCH ") for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")
    ]
    assert {"--open-mode=append", "--requeue", "--signal=B:USR1@180"} <= set(directives)
