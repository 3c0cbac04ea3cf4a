"""The batch script on a real Slurm: whatever happens on the way, the run is the one that nobody disturbed."""

from __future__ import annotations

import re
import signal
import sys

import pytest

from tests.cluster.jobs import Job
from tests.cluster.lab import Lab, wait_for
from tests.distributed.runs import Run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


def finish(job: Job, calm: Run) -> None:
    """Let it come to its end, and compare."""
    assert job.await_end() == ("COMPLETED", "0:0"), job.text()[-3000:]
    assert job.losses() == calm.losses()
    assert job.result() == calm.result()
    assert "Traceback" not in job.text()
    assert sorted(path.name for path in job.home.iterdir()) == ["run", "run.log", "run.yaml"]


def take_the_nodes(lab: Lab) -> None:
    """Submit a job that both nodes are taken for, from whoever has them."""
    options = ["-p", "urgent", "-N2", "--exclusive", "--time=1", "-o", "/dev/null"]
    lab.run("sbatch", *options, "--wrap", "true")


def test_told_to_stop_before_the_time_limit_it_is_requeued_and_goes_on(job, calm):
    """USR1 to the batch script, as --signal=B:USR1@180 sends it; from a folder that is not the project's."""
    told = job()
    told.submit()
    told.await_checkpoint()
    told.signal("USR1", "--batch")
    told.await_requeue()
    assert "USR1 received, all ranks save and leave" in told.text()
    finish(told, calm)
    assert told.facts()["Restarts"] == "1"


def test_preempted_with_time_of_grace_it_is_requeued_and_goes_on(job, calm, lab):
    """Slurm sends TERM to the script, the step and all of its processes."""
    preempted = job()
    preempted.submit()
    preempted.await_checkpoint()
    take_the_nodes(lab)
    preempted.await_requeue()
    assert "requeueing job" in preempted.text()
    finish(preempted, calm)


def test_preempted_without_grace_it_is_requeued_by_slurm_and_goes_on(job, calm, lab):
    """TERM comes twice, and ten seconds later KILL; the script leaves the requeueing to Slurm."""
    preempted = job()
    preempted.submit("--partition=abrupt")
    preempted.await_checkpoint()
    take_the_nodes(lab)
    preempted.await_requeue()
    finish(preempted, calm)


def test_told_to_stop_while_starting_no_rank_is_killed(job, calm):
    early = job()
    early.submit()
    wait_for(lambda: early.ranks_on("n1") and early.ranks_on("n2"), "the ranks")
    early.signal("USR1", "--batch")
    early.await_requeue()
    assert "stopping after step 0: " in early.text() and "killed" not in early.text()
    finish(early, calm)


def test_a_killed_rank_costs_a_requeue(job, calm):
    killed = job()
    killed.submit()
    killed.await_checkpoint()
    for rank in killed.ranks_on("n2"):
        rank.send_signal(signal.SIGKILL)
    killed.await_requeue()
    assert "on n2 was killed by SIGKILL" in killed.text() and "failed with code 137" in killed.text()
    finish(killed, calm)


def test_one_run_a_folder_and_a_cancelled_job_saves_and_is_not_requeued(job):
    first, second = job("first", "train.steps=100000"), job("second")
    first.submit()
    first.await_checkpoint()
    second.overrides.append(f"run_dir={first.folder}")
    second.submit(resume=True)
    assert second.await_end() == ("FAILED", "2:0")
    assert f"{first.folder} is in use by process " in second.text() and f"Slurm job {first.id}, since" in second.text()
    before = first.newest()
    first.cancel()
    assert first.await_end()[0] == "CANCELLED"
    wait_for(lambda: not first.ranks_on("n1") and not first.ranks_on("n2"), "the ranks to leave")
    first.await_text("stopping after step")
    assert first.newest() >= before and "requeueing" not in first.text()


def test_a_time_limit_within_the_signals_lead_is_refused(job):
    short = job()
    short.submit("--time=4")
    assert short.await_end() == ("FAILED", "2:0")
    assert "--time is 240 s" in short.text()


def test_a_setting_that_differs_on_one_node_is_refused_before_the_first_step(job):
    odd = job()
    wrapper = odd.home.parent / "python"
    wrapper.write_text(
        f'#!/usr/bin/env bash\n[[ $(hostname) == n1 ]] || set -- "$@" optimizer.lr=0.5\nexec {sys.executable} "$@"\n'
    )
    wrapper.chmod(0o755)
    odd.submit(PYTHON=str(wrapper))
    assert odd.await_end() == ("FAILED", "2:0"), odd.text()
    assert re.search(r"rank 1 on n\d is not started like rank 0 on n\d: optimizer.lr is 0.\d+ here", odd.text())
    assert not (odd.folder / "metrics.jsonl").exists()
