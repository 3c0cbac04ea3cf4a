"""What saving costs a run: the stall per save, and the write rate against plain file writing on the same disk."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from pipeline.benchmarks.repeated_step import random_batch
from pipeline.checkpoint.run_state import CarriedMemory, Progress, RandomState, SavedOptimizer
from pipeline.checkpoint.writer import CheckpointSaver, SaveReport, Snapshot, take_snapshot
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.parallel.optimizer import ZeroOptimizer
from pipeline.parallel.setup import build_stage
from pipeline.parallel.topology import initialize
from pipeline.schedule.executor import Executor
from pipeline.schedule.operations import build_schedule

MODEL = [
    "model.num_layers=4",
    "model.num_attention_heads=8",
    "model.segment_length=64",
    "model.memory.rule=delta",
    "train.lanes=2",
    "train.segments_per_window=2",
]
BLOCK_BYTES = 8 << 20


@dataclass
class SaveCosts:
    """Repeated measurements, in seconds."""

    parameters: int
    bytes: int
    """Of one checkpoint."""
    step_s: list[float] = field(default_factory=list)
    """Steps while nothing is written."""
    plain_s: list[float] = field(default_factory=list)
    """Writing as many bytes to a plain file, with fsync."""
    stall_s: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    """How long the training waited, by whether saving was asynchronous."""
    write_s: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    """Writing, hashing, syncing and renaming."""
    step_during_write_s: list[float] = field(default_factory=list)
    """Steps while an asynchronous save was being written."""


class _Bench:
    """One process that trains on random tokens and saves."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.topology = initialize(tensor=1, pipeline=1, timeout_s=600)
        self.stage = build_stage(config, self.topology, config.model.vocab_size)
        self.optimizer = ZeroOptimizer(self.stage, self.topology, config)
        self.executor = Executor(self.stage, self.topology, chunks=1, carry_gradient=True)
        self.schedule = build_schedule(stages=1, stage=0, microbatches=1, chunks=1, replay=False)
        self.memory = self.stage.empty_memory(config.train.lanes, self.topology.device)
        self.batch = random_batch(config)
        self.savers = {
            mode: CheckpointSaver(folder / ("behind" if mode else "waiting"), keep=1, asynchronous=mode)
            for mode in (False, True)
        }
        self.steps = 0

    def step(self) -> float:
        """One optimizer step; how long it took, in seconds."""
        start = time.perf_counter()
        lanes = self.config.train.lanes
        with self.optimizer.accumulate():
            result = self.executor.run(
                self.schedule, self.batch, self.memory, lanes_per_microbatch=lanes, loss_scale=1e-3
            )
        self.optimizer.step(1e-4)
        self.memory = result.memory
        self.steps += 1
        return time.perf_counter() - start

    def snapshot(self) -> Snapshot:
        layout = {"tensor": 1, "pipeline": 1, "data": 1, "zero_stage": 1, "world_size": 1}
        lanes = (0, self.config.train.lanes)
        parts = {
            "progress": Progress(self.steps, 0, self.steps),
            "optimizer": SavedOptimizer(self.optimizer, self.topology),
            "memory": CarriedMemory(self.memory, list(self.stage.layers), self.topology, lanes),
            "random": RandomState(),
        }
        return take_snapshot(parts, {"layout": layout}, owns_lanes=True)

    def save(self, costs: SaveCosts, *, asynchronous: bool) -> SaveReport:
        """One save; steps go on until an asynchronous one is written."""
        saver = self.savers[asynchronous]
        saver.save(self.snapshot)
        while (report := saver.finished()) is None:
            costs.step_during_write_s.append(self.step())
        if report.error:
            raise OSError(report.error)
        costs.stall_s[asynchronous].append(report.stall_s)
        costs.write_s[asynchronous].append(report.write_s)
        return report


def write_plainly(path: Path, count: int) -> float:
    """Seconds to write `count` bytes of noise to a new file and to sync it."""
    block = os.urandom(BLOCK_BYTES)
    start = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(count // BLOCK_BYTES):
            file.write(block)
        file.write(block[: count % BLOCK_BYTES])
        file.flush()
        os.fsync(file.fileno())
    took = time.perf_counter() - start
    path.unlink()
    return took


def measure(folder: str, hidden_size: int, repeats: int) -> SaveCosts:
    """Save again and again, in turn synchronously, asynchronously and to a plain file; for a process of its own.

    Args:
        folder: on the disk to be measured.
        hidden_size: of the model; the checkpoint's size grows with its square.
    """
    sizes = [f"model.hidden_size={hidden_size}", f"model.ffn_hidden_size={3 * hidden_size}", "model.vocab_size=8192"]
    config = load_config(None, [*MODEL, *sizes])
    bench = _Bench(config, Path(folder))
    bench.step()  # the first one makes the optimizer's state
    parameters = sum(parameter.numel() for parameter in bench.stage.parameters())
    warm_up = SaveCosts(parameters, 0)
    costs = SaveCosts(parameters, bench.save(warm_up, asynchronous=False).bytes)
    for _ in range(repeats):
        costs.step_s.append(bench.step())
        costs.plain_s.append(write_plainly(Path(folder) / "plain", costs.bytes))
        bench.save(costs, asynchronous=False)
        costs.step_s.append(bench.step())
        bench.save(costs, asynchronous=True)
    dist.destroy_process_group()
    return costs
