"""The batch script on a real Slurm: whatever happens on the way, the run is the one that nobody disturbed."""

from __future__ import annotations

import re
import signal

import pytest

from tests.cluster.lab import Lab, wait_for

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


def take_the_nodes(lab: Lab) -> None:
    """Submit a job that both nodes are taken for, from whoever has them."""
    options = ["-p", "urgent", "-N2", "--exclusive", "--time=1", "-o", "/dev/null"]
    lab.run("sbatch", *options, "--wrap", "true")


def test_told_to_stop_and_hurt_on_the_way_it_goes_on_each_time(job, calm):
    """USR1 to the batch script, as --signal=B:USR1@180 sends it: while the ranks start, and in a step. Then a rank is
    killed. From a folder that is not the project's."""
    hurt = job()
    hurt.submit()
    wait_for(lambda: hurt.ranks_on("n1") and hurt.ranks_on("n2"), "the ranks")
    hurt.signal("USR1", "--batch")
    hurt.await_requeue()
    assert "USR1 received, all ranks save and leave" in hurt.text() and "stopping after step 0: " in hurt.text()
    assert "was killed" not in hurt.text()

    hurt.await_checkpoint()
    hurt.signal("USR1", "--batch")
    hurt.await_requeue()
    assert hurt.text().count("stopping after step") == 2

    hurt.await_checkpoint()
    for rank in hurt.ranks_on("n2"):
        rank.send_signal(signal.SIGKILL)
    hurt.await_requeue()
    assert re.search(r"rank \d on n2 was killed by SIGKILL", hurt.text()) and "failed with code 137" in hurt.text()
    assert hurt.text().count("infini: error:") == 1 + hurt.text().count("because a rank elsewhere failed")
    assert "and no rank has said why" not in hurt.text()
    hurt.finish_as(calm)
    assert hurt.facts()["Restarts"] == "3"


def test_preempted_with_time_of_grace_it_is_requeued_and_goes_on(job, calm, lab):
    """Slurm sends TERM to the script, the step and all of its processes."""
    preempted = job()
    preempted.submit()
    preempted.await_checkpoint()
    take_the_nodes(lab)
    preempted.await_requeue()
    assert "requeueing job" in preempted.text()
    preempted.finish_as(calm)


def test_preempted_without_grace_it_is_requeued_by_slurm_and_goes_on(job, calm, lab):
    """TERM comes twice, and ten seconds later KILL; the script leaves the requeueing to Slurm."""
    preempted = job()
    preempted.submit("--partition=abrupt")
    preempted.await_checkpoint()
    take_the_nodes(lab)
    preempted.await_requeue()
    preempted.finish_as(calm)


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


def test_a_node_that_is_set_up_otherwise_is_refused_before_the_first_step(job, tmp_path):
    """A setting and a library's version differ there."""
    odd = job()
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as metadata\nknown = metadata.version\n"
        "metadata.version = lambda name: '0.1' if name == 'webdataset' else known(name)\n"
    )
    odd.submit(
        PYTHON=odd.python_with("n2", 'set -- "$@" optimizer.lr=0.5', f"export PYTHONPATH={tmp_path}:$PYTHONPATH")
    )
    assert odd.await_end() == ("FAILED", "2:0"), odd.text()
    differs = (
        r"rank 1 on n(\d) is not started like rank 0 on n\d: optimizer.lr is 0.\d+ here, 0.\d+ there, webdataset is "
    )
    assert re.search(differs, odd.text()), odd.text()
    assert not (odd.folder / "metrics.jsonl").exists()


def test_a_node_with_the_wrong_interface_is_named(job):
    odd = job()
    odd.submit(PYTHON=odd.python_with("n2", "export GLOO_SOCKET_IFNAME=lo"))
    assert odd.await_end() == ("FAILED", "2:0"), odd.text()
    assert "n2 at 127.0.0.1 (GLOO_SOCKET_IFNAME=lo) is not reached from n1 (Connection refused)" in odd.text()
    assert odd.text().count("is not reached from") == 1 and "Traceback" not in odd.text()
