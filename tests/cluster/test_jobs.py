"""The batch script on a real Slurm: whatever happens on the way, the run is the one that nobody disturbed."""

from __future__ import annotations

import signal

import pytest

from tests.cluster.jobs import Job
from tests.cluster.lab import wait_for
from tests.distributed.runs import Run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


def finish(job: Job, calm: Run) -> None:
    """Let it come to its end, and compare."""
    assert job.await_end() == ("COMPLETED", "0:0"), job.text()[-3000:]
    assert job.losses() == calm.losses()
    assert job.result() == calm.result()
    assert "Traceback" not in job.text()
    assert sorted(path.name for path in job.home.iterdir()) == ["run", "run.log", "run.yaml"]


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
    urgent = ["sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "--time=1", "-o", "/dev/null"]
    lab.run(*urgent, "--wrap", "true")
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
    assert "was killed by SIGKILL" in killed.text() and "failed with code 137" in killed.text()
    finish(killed, calm)
