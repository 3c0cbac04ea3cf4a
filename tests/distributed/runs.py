"""Real runs of `infini train --nproc N`, to be killed, stopped and taken up again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

from pipeline.checkpoint.folder import SUMMARY
from pipeline.checkpoint.reader import CheckpointReader
from tests.distributed import saving_cases
from tests.distributed.cases import TINY

ROOT = Path(__file__).parents[2]
PATIENCE_S = 240
"""For a busy machine."""

Found = TypeVar("Found")


def wait_for(condition: Callable[[], Found], what: str, *, pause_s: float = 0.02) -> Found:
    """Poll until `condition()` is true; returns its value."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for {what}"
        time.sleep(pause_s)
    return found


class Run:
    """A run of the tiny model in a folder of its own."""

    def __init__(self, folder: Path, data: Path, *overrides: str, nproc: int = 2) -> None:
        self.folder, self.nproc = folder, nproc
        self.data, self.own_overrides = data, overrides
        self.checkpoints = folder / "checkpoints"
        self.overrides = [*TINY, f"data.sets=[{{path: {data}, answer_weight: 3.0}}]", f"run_dir={folder}", *overrides]
        self.output = folder.with_suffix(".log")
        self.process: psutil.Popen | None = None

    def start(self, *options: str, **environment: str) -> None:
        """Start `infini train` with these options; its output is added to `output`."""
        config = self.folder.with_suffix(".yaml")
        config.write_text("{}\n")
        command = [sys.executable, "-m", "launch.cli", "train", str(config), "--nproc", str(self.nproc)]
        inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "INFINI_DEBUG")}
        with open(self.output, "a") as output:
            self.process = psutil.Popen(
                [*command, *options, *self.overrides],
                env=inherited | {"PYTHONPATH": str(ROOT)} | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def train_in(self, pools) -> None:
        """The whole run, undisturbed, in ranks that are there already: no start-up to pay for."""
        arguments = {"folder": str(self.folder), "data": str(self.data), "overrides": list(self.own_overrides)}
        for rank in pools.run(self.nproc, saving_cases.train, **arguments):
            assert rank["error"] is None

    def ranks(self) -> list[psutil.Process]:
        """The running ranks, in order."""
        found = {}
        for child in self.process.children():
            try:
                rank = child.environ().get("RANK")
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
            if rank is not None:
                found[int(rank)] = child
        return [found[rank] for rank in sorted(found)]

    def wait(self, patience_s: float = PATIENCE_S) -> int:
        """Wait for the end; the exit code."""
        try:
            return self.process.wait(timeout=patience_s)
        finally:
            self.kill()

    def kill(self) -> None:
        """Leave nothing of the run behind."""
        if self.process is None or self.process.returncode is not None:
            return
        family = [self.process, *self.process.children(recursive=True)]
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        self.process.wait()

    def text(self) -> str:
        """What was printed, without the console's line breaks."""
        return " ".join(self.output.read_text().split())

    def partial(self) -> set[tuple[str, int]]:
        """Folders of saves that are being made, or were cut short: name, and when the folder was last changed."""
        found = set()
        for path in self.checkpoints.glob(".step_*.partial"):
            try:
                found.add((path.name, path.stat().st_mtime_ns))
            except FileNotFoundError:
                continue
        return found

    def newest(self) -> int:
        """Step of the newest complete checkpoint; -1 without one."""
        whole = self.checkpoints.glob(f"step_*/{SUMMARY}")
        return max((int(path.parent.name.removeprefix("step_")) for path in whole), default=-1)

    def verify_all(self) -> int:
        """Verify every folder that bears a checkpoint's name; their number."""
        folders = sorted(self.checkpoints.glob("step_*"))
        for folder in folders:
            CheckpointReader(folder).verify()
        return len(folders)

    def result(self) -> dict:
        """What the run has come to: step, tokens and every rank's weights, moments, memory and lanes, as hashes."""
        pointer = (self.checkpoints / "latest").read_text().strip()
        reader = CheckpointReader(self.checkpoints / pointer)
        reader.verify()
        keys = ("step", "tokens", "windows", "recent_losses", "optimizer_steps", "files")
        return {key: getattr(reader.summary, key) for key in keys}

    def losses(self) -> dict[int, float]:
        """Training loss by step, as in metrics.jsonl."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss/train"] for line in lines if "loss/train" in line}
