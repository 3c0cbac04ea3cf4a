"""Inside a Slurm batch job: starts one launcher per node, and decides what follows when they have ended.

| the step ends with | then |
| --- | --- |
| 0 | done |
| 85, or anything after Slurm has asked to stop | requeued, `MAX_REQUEUES` times at the most |
| 85, because of the run folder's stop file | the end, with 85 |
| 2 (something to put right), 130 (interrupted) | the end, with that code |
| any other code | requeued, `MAX_FAILURES` times at the most, only with a newer checkpoint than at the failure before |

A job that is being cancelled, or that Slurm requeues by itself, is left to Slurm. What must last over requeues stands
in the job's folder, `.infini-job-<id>` in its working folder, which goes with the job.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.processes.meeting import HERE, NODES
from launch.processes.worker import FOLLOWED
from launch.processes.world import first_node, int_variable
from pipeline.training.stopping import JOB_FOLDER, JOB_SAVED, JOB_STOPPED, STOP_FILE, STOPPED

ROOT = Path(__file__).parents[2]
FINAL = (0, 2, 130)
"""Codes after which trying again does not help."""
EARLY_S = 60
"""Slurm sends the signal before the time limit up to so much earlier than it was told."""
SPARE_S = 30
"""For putting the job back into the queue, of the time between signal and limit."""
LINGER_S = 60
"""srun should return within this time when the launchers of all nodes have ended."""
PATIENT_S = 300
"""srun ends a launcher that outlives the first one by more: they wait for one another for so long at the end."""
CALL_S = 60
"""For a call to Slurm's controller."""


class Job:
    """This batch job."""

    def __init__(self, arguments: Sequence[str]) -> None:
        env = os.environ
        self.id = env["SLURM_JOB_ID"]
        self.restarts = int(env.get("SLURM_RESTART_COUNT", "0"))
        self.nodes = int(env.get("SLURM_NNODES", "1"))
        self.min_nodes = number("MIN_NODES", self.nodes)
        self.max_requeues = number("MAX_REQUEUES", 50)
        self.max_failures = number("MAX_FAILURES", 5)
        self.lead_s = number("STOP_LEAD", 180)
        self.stop_signal = signal.Signals[f"SIG{env.get('STOP_SIGNAL', 'USR1')}"]
        self.arguments = [*arguments, *(["--resume"] if self.restarts else [])]
        self.folder = Path.cwd() / f".infini-job-{self.id}"
        self.stop_file = self.folder / "stop"
        self.asked: signal.Signals | None = None
        """What has asked to stop."""
        self._arrived: list[signal.Signals] = []

    def run(self) -> int:
        """Start the step, wait for it, and see to what follows; returns the job's exit code.

        Raises:
            ValueError: the time limit leaves no time; MIN_NODES is none of the job's numbers of nodes.
        """
        for each in (self.stop_signal, signal.SIGTERM):
            signal.signal(each, lambda number, frame: self._arrived.append(signal.Signals(number)))
        self._check_time()
        if not 1 <= self.min_nodes <= self.nodes:
            raise ValueError(f"MIN_NODES={self.min_nodes}: must be from 1 to the job's {self.nodes} node(s)")
        self._make_folder()
        code = self._wait(self._start())
        requeued = self._follow(code)
        if not requeued:
            shutil.rmtree(self.folder, ignore_errors=True)
        return 0 if requeued else code

    # The step

    def _check_time(self) -> None:
        limit_s = seconds(self._facts().get("TimeLimit", ""))
        if limit_s is not None and limit_s <= self.lead_s + EARLY_S:
            raise ValueError(
                f"--time is {limit_s} s, but Slurm asks to stop up to {self.lead_s + EARLY_S} s before that (--signal, "
                f"STOP_LEAD={self.lead_s}): nothing would ever be trained; give more time, or a shorter "
                "--signal=B:USR1@SECONDS with STOP_LEAD=SECONDS"
            )

    def _make_folder(self) -> None:
        self.folder.mkdir(exist_ok=True)
        # Of the launch before.
        left = [path for pattern in ("ended-*", f"{HERE}*") for path in self.folder.glob(pattern)]
        for path in (self.stop_file, self.folder / JOB_STOPPED, *left):
            path.unlink(missing_ok=True)
        nodes = call("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).stdout
        (self.folder / NODES).write_text(nodes)

    def _start(self) -> subprocess.Popen:
        env = dict(os.environ)
        endpoint = f"{first_node(env['SLURM_JOB_NODELIST'])}:{env.get('RDZV_PORT') or 20000 + int(self.id) % 10000}"
        env["NNODES"] = f"{self.min_nodes}:{self.nodes}" if self.is_elastic else str(self.nodes)
        env.setdefault("RDZV_ENDPOINT", endpoint)
        # A requeued job keeps its id: without the count its nodes would join the rendezvous that has ended.
        env["RDZV_ID"] = f"{env.get('RDZV_ID', self.id)}-{self.restarts}"
        env |= {JOB_FOLDER: str(self.folder), STOP_FILE: str(self.stop_file)}
        # sbatch --export=NAMES would have srun keep all of this from the nodes, and every node train by itself.
        env["SLURM_EXPORT_ENV"] = "ALL"
        if "SLURM_CPUS_PER_TASK" in env:  # since Slurm 22.05 srun does not inherit it
            env.setdefault("SRUN_CPUS_PER_TASK", env["SLURM_CPUS_PER_TASK"])
        say(
            f"job {self.id}, restart {self.restarts}, {self.nodes} node(s) x {env.get('NPROC', 'all devices of a')} "
            f"process(es), rendezvous {env['RDZV_ENDPOINT']}"
        )
        launcher = ["bash", str(ROOT / "launch" / "torchrun.sh"), "train", *self.arguments]
        # Of a node that is lost the others' launchers know by themselves.
        one_for_all = ["--kill-on-bad-exit=1", f"--wait={PATIENT_S}"]
        options = ["--no-kill", "--kill-on-bad-exit=0", "--wait=0"] if self.is_elastic else one_for_all
        return subprocess.Popen(["srun", *options, *launcher], env=env)

    def _wait(self, step: subprocess.Popen) -> int:
        """The step's exit code. One that does not come to its end is ended."""
        leave_by = ended_at = None
        while True:
            try:
                code = step.wait(0.2)
                return self._reason(code)
            except subprocess.TimeoutExpired:
                pass
            now = time.monotonic()
            if arrived := self._pop_arrived():
                if leave_by is None:
                    say(f"{arrived.name} received, all ranks save and leave")
                    leave_by = now + max(self.lead_s - SPARE_S, 1)
                self.asked = arrived
                self.stop_file.touch()
                # srun hands it to every process of the step. TERM would have it kill them.
                step.send_signal(self.stop_signal)
            codes = self._node_codes()
            if len(codes) == self.nodes or (codes and self.is_elastic):  # a lost node says nothing
                ended_at = ended_at or now
            if ended_at and now - ended_at > LINGER_S:
                say(f"the launchers of all nodes have ended, but srun has not for {LINGER_S} s: it is ended")
                end(step)
                return first_reason(codes) or max(codes)
            if leave_by and now > leave_by:
                say(
                    f"the ranks have not left within {self.lead_s - SPARE_S} s: they are ended, without saving; if a "
                    "save takes so long, give more: --signal=B:USR1@SECONDS with STOP_LEAD=SECONDS"
                )
                end(step)
                return STOPPED

    def _reason(self, code: int) -> int:
        """The step's exit code, when srun says this one: it says the highest, and ends the others with TERM."""
        codes = self._node_codes()
        if self.is_elastic and codes:  # srun's may be that of a node which was lost on the way
            return first_reason(codes) or max(codes)
        if code and (first := first_reason(codes)):
            return first
        # A process that a signal has ended has a negative code. Stopping and following the launchers tell here alone.
        return max([code, *codes]) if code >= 0 else 128 - code

    @property
    def is_elastic(self) -> bool:
        """Whether the run goes on with fewer nodes than the job has."""
        return self.min_nodes < self.nodes

    def _pop_arrived(self) -> signal.Signals | None:
        return self._arrived.pop(0) if self._arrived else None

    def _node_codes(self) -> list[int]:
        """Exit codes of the launchers that have ended, the first one first."""
        marks = sorted(self.folder.glob("ended-*"), key=lambda path: path.stat().st_mtime_ns)
        texts = [self._read(path.name) for path in marks]
        return [int(text) for text in texts if text.isdecimal()]

    # What follows

    def _follow(self, code: int) -> bool:
        """Put the job back into the queue if that is right."""
        asked = self.asked or self._pop_arrived()
        if code == 0 or (code in FINAL and not asked):
            return False
        if not self._is_running():
            return False
        if asked or code == STOPPED:
            reason = self._read(JOB_STOPPED)
            if not asked and reason.startswith("stop file") and str(self.stop_file) not in reason:
                say(f"stopped by {reason}: not requeued; submit it again with --resume to go on")
                return False
            return self._requeue("MAX_REQUEUES", self.restarts, self.max_requeues)
        return self._follow_failure(code)

    def _follow_failure(self, code: int) -> bool:
        saved, failures = self._read(JOB_SAVED) or "none", self._failures()
        if failures and failures[-1] == saved:
            say(f"failed with code {code}, and so before, with no newer checkpoint since (step {saved}): not requeued")
            return False
        say(f"failed with code {code}; newest checkpoint of this job: step {saved}")
        (self.folder / "failures").write_text(json.dumps([*failures, saved]))
        return self._requeue("MAX_FAILURES", len(failures), self.max_failures)

    def _failures(self) -> list[str]:
        """The newest checkpoint at every failure so far."""
        try:
            return json.loads(self._read("failures") or "[]")
        except ValueError:
            return []

    def _requeue(self, cap: str, times: int, most: int) -> bool:
        if times >= most:
            say(f"not requeued, {cap}={most} reached")
            return False
        say(f"requeueing job {self.id}")
        for pause_s in (5, 15, 0):  # a busy controller
            done = call("scontrol", "requeue", self.id)
            if done.returncode == 0:
                return True
            if not self._is_running():
                return False
            time.sleep(pause_s)
        say(f"not requeued: {done.stderr.strip()}")
        return False

    # Looking

    def _is_running(self) -> bool:
        """Whether the job is still this script's; says so when it is not, as when Slurm has taken a node for lost."""
        state = self._facts().get("JobState", "RUNNING")
        if state != "RUNNING":
            say(f"the job is {state}: what follows is Slurm's affair")
        return state == "RUNNING"

    def _facts(self) -> dict[str, str]:
        """What Slurm says of this job; empty when it does not."""
        return dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", call("scontrol", "show", "job", "-o", self.id).stdout))

    def _read(self, name: str) -> str:
        try:
            return (self.folder / name).read_text().strip()
        except OSError:
            return ""


def first_reason(codes: Sequence[int]) -> int | None:
    """The first code that is a failure's, and not of a node that left because of another one's."""
    return next((code for code in codes if code not in (0, STOPPED, FOLLOWED)), None)


def number(name: str, default: int) -> int:
    """A whole number from the environment."""
    return int_variable(name) if os.environ.get(name) else default


def seconds(limit: str) -> int | None:
    """Slurm's `[days-]hours:minutes:seconds`; None where there is no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", limit)
    if match is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def call(*command: str) -> subprocess.CompletedProcess:
    """A command of Slurm's, which may fail: its controller may be away."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=CALL_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def end(step: subprocess.Popen) -> None:
    """End srun, which ends its tasks when it is told to with TERM."""
    for number_ in (signal.SIGTERM, signal.SIGKILL):
        step.send_signal(number_)
        try:
            step.wait(10)
            return
        except subprocess.TimeoutExpired:
            continue


def say(text: str) -> None:
    print(f"train.sbatch: {text}", flush=True)


def main() -> int:
    """Arguments: those of `infini train`."""
    try:
        return Job(sys.argv[1:]).run()
    except (KeyError, ValueError) as problem:
        reason = f"{problem.args[0]} is not set: is this a batch job?" if isinstance(problem, KeyError) else problem
        print(f"train.sbatch: error: {reason}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
