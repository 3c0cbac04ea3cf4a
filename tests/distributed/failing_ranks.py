"""Ranks of real runs, of which one fails where it is told to: `failing_ranks FOLDER DATA FAULT...`, see `Fault.parse`.

For every fault four processes train (two stages, two data-parallel or context ranks) in FOLDER/<place>; the results
come as JSON in FOLDER/results.json. The ranks are forked, so that the libraries are imported once, and no launcher ends
them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import model.rules.context
import model.rules.scan
import pipeline.checkpoint.writer
import pipeline.evaluation.evaluate
import pipeline.training.monitor
import pipeline.training.trainer
from data.lanes.loader import LaneLoader
from launch.processes.worker import run_rank
from model.decoder import DecoderStage
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.config.load import load_config
from pipeline.training.run import train
from pipeline.training.trainer import Trainer
from tests.distributed.cases import TINY

WORLD = 4
LAYOUT = ["parallel.pipeline=2", "bptt.chunks_per_window=2", "checkpoint.interval=2", "metrics.memory_interval=2"]
CONTEXT_LAYOUT = [*LAYOUT, "parallel.context=2"]
"""Where the ranks of a stage exchange what their segments come to: of the places below."""
IN_EXCHANGE = ("exchange", "exchange_backward", "killed")
FORWARDS = 4
"""Two windows of two chunks. On the last stage the others' gradients are there when the last one begins."""
PATIENCE_S = 40
"""Then the ranks are taken to hang, and are killed."""


@dataclass(frozen=True)
class Fault:
    """`rank` fails in step `step`, when it comes to `place`."""

    place: str
    rank: int
    step: int

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Raises: ValueError unless `text` is PLACE:RANK:STEP."""
        place, rank, step = text.split(":")
        return cls(place, int(rank), int(step))


ERRORS = {
    "loader": ValueError("shard train-000003.tar is truncated"),
    "forward": torch.OutOfMemoryError("out of memory in the forward pass"),
    "backward": torch.OutOfMemoryError("out of memory in the backward pass"),
    "exit": SystemExit("a library has had enough"),
}
"""Errors of some places; elsewhere it is a RuntimeError with the place's name."""


def fail_at(fault: Fault, folder: Path) -> None:
    """Make this process fail; what it runs is left as it is."""
    now = {"step": 0, "forwards": 0}
    train_step = Trainer.train_step

    def counted(trainer: Trainer) -> None:
        now.update(step=trainer.progress.step + 1, forwards=0)
        train_step(trainer)

    def fail(*_):
        (folder / "failed-at").write_text(str(time.time()))
        if fault.place == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ERRORS.get(fault.place, RuntimeError(f"something is wrong in {fault.place}"))

    def failing(function):
        def call(*args, **kwargs):
            return fail() if now["step"] >= fault.step else function(*args, **kwargs)

        return call

    def last_forward(function):
        def call(*args, **kwargs):
            now["forwards"] += 1
            failing_now = now["step"] == fault.step and now["forwards"] == FORWARDS
            return fail() if failing_now else function(*args, **kwargs)

        return call

    Trainer.train_step = counted
    owner, name = {
        "loader": (LaneLoader, "_read_window"),
        "to_device": (pipeline.training.trainer, "to_device"),
        "forward": (DecoderStage, "forward"),
        "backward": (pipeline.training.trainer, "build_stage"),
        "exit": (DecoderStage, "forward"),
        "statistics": (pipeline.training.monitor, "gather_statistics"),
        "optimizer": (torch.optim.AdamW, "step"),
        "writer": (pipeline.checkpoint.writer, "_write_part"),
        "save": (pipeline.training.trainer, "take_snapshot"),
        "load": (CheckpointReader, "local_range"),
        "evaluate": (DecoderStage, "forward"),
        "exchange": (model.rules.context, "_gather"),
        "exchange_backward": (model.rules.scan, "pass_back"),
        "killed": (model.rules.context, "_gather"),
    }[fault.place]
    original = getattr(owner, name)
    if fault.place == "backward":

        def build_stage(*args, **options):
            stage = original(*args, **options)
            hook = failing(lambda gradient: gradient)
            next(p for n, p in stage.named_parameters() if n.endswith("qkv.weight")).register_hook(hook)
            return stage

        setattr(owner, name, build_stage)
    else:
        setattr(owner, name, (last_forward if fault.place == "forward" else failing)(original))


def work(fault: Fault, run_dir: Path, data: str) -> int:
    """What a rank runs."""
    if fault.place == "evaluate":
        pipeline.evaluation.evaluate.evaluate_run(
            run_dir, data=[data], with_synthetic=False, overrides=["parallel.pipeline=2"]
        )
        return 0
    layout = CONTEXT_LAYOUT if fault.place in IN_EXCHANGE else LAYOUT
    settings = [*TINY, *layout, f"data.sets=[{{path: {data}}}]", f"run_dir={run_dir}"]
    settings += ["train.steps=2", "optimizer.warmup_steps=1"] if fault.place == "none" else []
    return train(load_config(None, settings), "latest" if fault.place == "load" else None)


def run(fault: Fault, folder: Path, run_dir: Path, data: str) -> dict:
    """Start the ranks and wait for them: what they printed, their exit codes, and for how long they outlived the
    failure."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = {}
    for rank in range(WORLD):
        child = os.fork()
        if child == 0:
            output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            if rank == fault.rank:
                fail_at(fault, folder)
            code = run_rank(lambda: work(fault, run_dir, data), run_dir)
            sys.stdout.flush()
            os._exit(code)
        ranks[child] = rank
    codes: dict[int, int] = {}
    deadline = time.monotonic() + 120
    failed_at = folder / "failed-at"
    while ranks:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[ranks.pop(child)] = os.waitstatus_to_exitcode(status)
            continue
        late = failed_at.exists() and time.time() - failed_at.stat().st_mtime > PATIENCE_S
        if late or time.monotonic() > deadline:
            for child in ranks:
                os.kill(child, 9)
        time.sleep(0.05)
    outlived_s = time.time() - failed_at.stat().st_mtime if failed_at.exists() else None
    text = (folder / "output.txt").read_text()
    return {"codes": [codes[rank] for rank in range(WORLD)], "outlived_s": outlived_s, "output": text}


def main() -> None:
    folder, data = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    results = {}
    for fault in map(Fault.parse, sys.argv[3:]):
        # What loads a checkpoint takes the one of the run that nothing happened to.
        run_dir = folder / ("none" if fault.place in ("load", "evaluate") else fault.place) / "run"
        results[fault.place] = run(fault, folder / fault.place, run_dir, data)
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
