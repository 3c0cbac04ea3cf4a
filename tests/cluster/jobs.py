"""Runs of the tiny model as jobs of the Slurm in `tests.cluster.lab`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import psutil

from tests.cluster.lab import Lab, wait_for
from tests.distributed.runs import ROOT, Run

SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"


class Job(Run):
    """One process on each of the two nodes. Submitted from a folder of its own, which is not the project's."""

    def __init__(self, lab: Lab, folder: Path, data: Path, *overrides: str) -> None:
        super().__init__(folder / "run", data, *overrides)
        self.lab = lab
        self.home = folder
        self.id = ""
        folder.mkdir(parents=True)

    def submit(self, *options: str, resume: bool = False, **settings: str) -> None:
        """Submit it, with options for sbatch and environment variables for the script."""
        (self.home / "run.yaml").write_text("{}\n")
        settings = {"PYTHON": sys.executable, "NPROC": "1", "OMP_NUM_THREADS": "1"} | settings
        # Not all of the tests' own environment: a rank's variables may be in it.
        exported = ",".join(["PATH", "SLURM_CONF", *(f"{name}={value}" for name, value in settings.items())])
        command = ["sbatch", "--parsable", "-N2", "--time=20", f"--export={exported}"]
        command += ["-o", str(self.output), *options, str(SCRIPT), "run.yaml", *self.overrides]
        command += ["--resume"] if resume else []
        self.id = self.lab.run(*command, cwd=self.home).strip()

    def facts(self) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.lab.run("scontrol", "show", "job", "-o", self.id)))

    @property
    def state(self) -> str:
        return self.facts()["JobState"]

    def signal(self, name: str, *options: str) -> None:
        self.lab.run("scancel", f"--signal={name}", *options, self.id)

    def cancel(self) -> None:
        self.lab.run("scancel", self.id)

    def text(self) -> str:
        return super().text() if self.output.exists() else ""

    def await_text(self, text: str, times: int = 1) -> None:
        wait_for(lambda: self.text().count(text) >= times, f"{text!r} from job {self.id}: {self.text()[-2000:]}")

    def await_checkpoint(self) -> None:
        """Until it has made a checkpoint since this call."""
        before = self.newest()
        wait_for(lambda: self.newest() > before, f"a checkpoint of job {self.id}: {self.text()[-2000:]}")

    def await_requeue(self) -> None:
        """Until it is in the queue again, where it need not wait the two minutes that Slurm gives it.

        Two seconds it has to: the node takes a job for the killed one that it starts in the same second.
        """
        wait_for(
            lambda: self.state == "PENDING", f"job {self.id} in the queue, not {self.state}: {self.text()[-2000:]}"
        )
        self.lab.run("scontrol", "update", f"JobId={self.id}", "StartTime=now+2")

    def await_end(self) -> tuple[str, str]:
        """Its last state, and its exit code with the signal that ended it."""

        def ended():
            facts = self.facts()
            ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
            return (facts["JobState"], facts["ExitCode"]) if facts["JobState"] in ends else None

        return wait_for(ended, f"the end of job {self.id}")

    def finish_as(self, calm: Run) -> None:
        """Let it come to its end, which must be that of the run that nobody has disturbed."""
        assert self.await_end() == ("COMPLETED", "0:0"), self.text()[-3000:]
        assert self.losses() == calm.losses()
        assert self.result() == calm.result()
        assert "Traceback" not in self.text()
        assert sorted(path.name for path in self.home.iterdir()) == ["run", "run.log", "run.yaml"]

    def python_with(self, node: str, *commands: str) -> str:
        """An interpreter for `submit` that runs these commands of bash first on that node."""
        wrapper = self.home.parent / "python"
        lines = ["#!/usr/bin/env bash", f"if [[ $(hostname) == {node} ]]; then", *commands, "fi"]
        wrapper.write_text("\n".join([*lines, f'exec {sys.executable} "$@"\n']))
        wrapper.chmod(0o755)
        return str(wrapper)

    def ranks_on(self, node: str) -> list[psutil.Process]:
        """The run's processes on that node."""
        found = []
        for process in self.lab.nodes[node].processes():
            try:
                environment = process.environ()
                if "RANK" in environment and environment.get("SLURM_JOB_ID") == self.id:
                    found.append(process)
            except psutil.Error:
                continue
        return found
