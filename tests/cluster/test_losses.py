"""What takes minutes to be noticed, or a limit to be reached: on a real Slurm, not on every run of the tests."""

from __future__ import annotations

import re
import shlex
import signal

import pytest

from launch.processes.worker import FOLLOWED
from pipeline.parallel.silence import SILENT_S
from tests.cluster.conftest import LONG
from tests.cluster.jobs import Job
from tests.cluster.lab import wait_for
from tests.cluster.test_meeting import launch
from tests.distributed.runs import ROOT, Run

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]

SILENT = r"error: HangError: no progress for \d+ s, .*; no sign of life from rank \d on n2: is the node gone"
CLOSED = r"error: on n1: the connection to n2 \(10.77.0.2\) was lost, and no rank has said why within 10 s: is its node"


def goes_back(job: Job, reason: str) -> None:
    """The one that is there says who is not, and the job goes back into the queue."""
    wait_for(lambda: re.search(reason, job.text()), f"the survivor's word: {job.text()[-2000:]}")
    wait_for(lambda: job.facts()["Restarts"] == "1", f"job {job.id} in the queue: {job.text()[-2000:]}")


def test_a_full_disk_ends_the_run_with_the_files_name(job, lab):
    full = job("job", f"run_dir={lab.small_disk}/run")
    full.submit()
    assert full.await_end() == ("FAILED", "2:0"), full.text()
    told = rf"rank \d could not write the checkpoint in {lab.small_disk}/run/\S+ \[Errno 28\] No space left on device"
    assert re.search(told, full.text()), full.text()
    assert "Traceback" not in full.text() and "requeueing" not in full.text()


def test_a_lost_node_is_named_and_the_run_goes_on_when_there_is_one_again(job, calm, lab):
    """All that ran on it ends at once, Slurm's daemon too. Its kernel closes the connections, as in a reboot."""
    lost = job("job", "resilience.hang_timeout_s=8")
    lost.submit()
    lost.await_checkpoint()
    lab.nodes["n2"].stop()
    goes_back(lost, CLOSED)
    lab.boot("n2")
    lab.await_nodes()
    lost.await_requeue()
    lost.finish_as(calm)


def test_a_cut_link_is_named_and_the_run_goes_on_when_it_is_mended(job, calm, lab):
    """Nothing says that the node is away, as when its power fails."""
    cut = job("job", "resilience.hang_timeout_s=8")
    cut.submit()
    cut.await_checkpoint()
    lab.cut("n2")
    goes_back(cut, SILENT)
    lab.mend("n2")
    lab.await_nodes()
    cut.await_requeue()
    cut.finish_as(calm)


def test_the_first_node_is_lost_and_the_run_goes_on_when_there_is_one_again(job, calm, lab):
    """The batch script, srun and the place to meet go with it: the job's log says nothing more, the run's own does."""
    lost = job("job", "resilience.hang_timeout_s=8")
    lost.submit()
    lost.await_checkpoint()
    lab.nodes["n1"].stop()
    told = r"\[rank 1\] error: on n2: the connection to n1 \(10.77.0.1\) was lost, and no rank has said why within 10 s"
    wait_for(lambda: re.search(told, (lost.folder / "console.log").read_text()), "the survivor's word")
    wait_for(lambda: lost.facts()["Restarts"] == "1", f"job {lost.id} in the queue: {lost.text()[-2000:]}")
    lab.boot("n1")
    lab.await_nodes()
    lost.await_requeue()
    lost.finish_as(calm)


def test_a_first_node_without_power_is_noticed_by_ranks_and_launchers(lab, data, tmp_path):
    """Started by hand. Nobody there closes a connection or says why, and all others ask that node's store: they wait
    for an answer for `SILENT_S`, and not as long as the kernel would."""
    run = Run(tmp_path / "run", data, *LONG, "train.steps=100000", "resilience.hang_timeout_s=8")
    (tmp_path / "run.yaml").write_text("{}\n")
    command = shlex.join(["bash", f"{ROOT}/launch/torchrun.sh", "train", str(tmp_path / "run.yaml"), *run.overrides])
    settings = {"command": command, "MODULE": "launch.cli", "RDZV_ID": "power", "OMP_NUM_THREADS": "1"}
    first, second = (launch(lab, node, **settings) for node in ("n1", "n2"))
    try:
        wait_for(lambda: run.newest() > 0, "a checkpoint")
        lab.cut("n1")
        lab.nodes["n1"].stop()
        output, _ = second.communicate(timeout=2 * SILENT_S)
    finally:
        for launcher in (first, second):
            launcher.kill()
        if lab.nodes["n1"].is_up:
            lab.nodes["n1"].stop()
        lab.boot("n1")
        lab.await_nodes()
    assert second.returncode == FOLLOWED, output
    assert "the launcher at n1:29400 has ended, or its node is lost" in output, output
    assert re.search("error: (HangError: no progress|on n2: the connection to n1)", output), output


def test_the_time_limit_is_reached_the_run_saves_and_goes_on(job, calm, lab):
    """Slurm's own signal, at most a minute early. The ranks are held until then, for steps are fast here."""
    long = job()
    long.submit("--time=2", "--signal=B:USR1@45", STOP_LEAD="45")
    long.await_checkpoint()
    held = [rank for node in ("n1", "n2") for rank in long.ranks_on(node)]
    for rank in held:
        rank.send_signal(signal.SIGSTOP)
    long.await_text("USR1 received, all ranks save and leave")
    for rank in held:
        rank.send_signal(signal.SIGCONT)
    long.await_requeue()
    assert "stopping after step" in long.text() and "TIME LIMIT" not in long.text()
    lab.run("scontrol", "update", f"JobId={long.id}", "TimeLimit=20")
    long.finish_as(calm)


def test_a_save_that_takes_longer_than_the_lead_is_ended_and_says_what_to_change(job):
    """The ranks are held for the whole of it."""
    slow = job()
    slow.submit(STOP_LEAD="40")
    slow.await_checkpoint()
    for node in ("n1", "n2"):
        for rank in slow.ranks_on(node):
            rank.send_signal(signal.SIGSTOP)
    slow.signal("USR1", "--batch")
    slow.await_text("the ranks have not left within 10 s: they are ended, without saving")
    slow.await_requeue()
    assert "--signal=B:USR1@SECONDS with STOP_LEAD=SECONDS" in slow.text()


def test_nodes_that_do_not_hold_the_layout_are_refused(job):
    few = job("job", "parallel.pipeline=4")
    few.submit()
    assert few.await_end() == ("FAILED", "2:0"), few.text()
    assert "2 process(es) cannot hold parallel.tensor = 1 x parallel.pipeline = 4" in few.text(), few.text()


SKEWED = """\
import datetime, os, runpy, sys
os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
import torch.distributed.elastic.rendezvous.dynamic_rendezvous as rendezvous

class Skewed(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime.now(tz) + datetime.timedelta(seconds=61)

rendezvous.datetime = Skewed
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def test_clocks_that_differ_by_a_minute_are_told(job, tmp_path):
    """For the launcher's rendezvous and for its ranks alike."""
    (tmp_path / "skewed.py").write_text(SKEWED)
    (tmp_path / "sitecustomize.py").write_text("import time\nright = time.time\ntime.time = lambda: right() + 61\n")
    odd = job()
    shift = f"export PYTHONPATH={tmp_path}:$PYTHONPATH"
    odd.submit(PYTHON=odd.python_with("n2", shift, f'set -- {tmp_path}/skewed.py "$@"'))
    assert odd.await_end() == ("FAILED", "2:0"), odd.text()
    assert "error: the clocks of n1 and n2 differ by 61 s" in odd.text(), odd.text()
    assert "Traceback" not in odd.text()
