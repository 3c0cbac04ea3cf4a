"""The training run: one small loop of named steps, and what must be saved to go on exactly."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.lanes import WindowBatch, build_loader
from data.shards import PreparedSet
from model.decoder import DecoderStage, StageOptions, split_layers
from pipeline import checkpoint, derived
from pipeline.config import Config
from pipeline.config_io import ConfigError, save_config
from pipeline.executor import Executor, Memory, StepResult, map_memory
from pipeline.learning_rate import learning_rate
from pipeline.monitor import Monitor
from pipeline.optimizer import ZeroOptimizer
from pipeline.schedule import build_schedule
from pipeline.topology import Topology, initialize, shutdown


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that was not finite."""


def train(config: Config, resume: str | None) -> int:
    """Train as one of the processes of a run; returns the exit code.

    Args:
        config: validated configuration.
        resume: None for a new run, `latest`, or the path of a checkpoint.
    """
    topology = initialize(
        tensor=config.parallel.tensor, pipeline=config.parallel.pipeline, timeout_s=config.parallel.timeout_s
    )
    trainer = Trainer(config, topology)
    trainer.start(resume)
    trainer.train()
    trainer.close()
    shutdown()
    return 0


def build_stage(config: Config, topology: Topology, vocab_size: int) -> DecoderStage:
    """This process's part of the model, with its initial values, on its device."""
    layers = split_layers(config.model.num_layers, topology.pipeline_size, config.parallel.layers_per_stage)
    first, last = layers[topology.pipeline_rank]
    options = StageOptions(
        precision=config.train.precision,
        recompute="none" if config.bptt.recompute == "window" else config.bptt.recompute,
        detach_reads=config.bptt.gradient == "detached",
        sequence_parallel=config.parallel.sequence_parallel,
    )
    stage = DecoderStage(
        config.model,
        options,
        vocab_size=vocab_size,
        first_layer=first,
        last_layer=last,
        tensor_rank=topology.tensor_rank,
        tensor_size=topology.tensor_size,
    )
    stage.initialize(config.train.seed)
    return stage.to(topology.device)


def vocabulary(config: Config) -> int:
    """The model's vocabulary: the configured one, or that of the prepared data.

    Raises:
        ConfigError: the data has tokens that the model does not know.
    """
    sets = {entry.path: PreparedSet(entry.path).vocab_size for entry in config.data.sets}
    largest = max(sets.values())
    if config.model.vocab_size is None:
        return largest
    if config.model.vocab_size < largest:
        path = max(sets, key=sets.get)
        raise ConfigError(
            [f"model.vocab_size is {config.model.vocab_size}, but the tokenizer of {path} has {largest} tokens"]
        )
    return config.model.vocab_size


class Trainer:
    """One process's part of a run."""

    def __init__(self, config: Config, topology: Topology) -> None:
        self.config = config
        self.topology = topology
        self.vocab_size = vocabulary(config)
        self.lane_range = topology.lanes(config.train.lanes)
        self.loader = build_loader(
            config.data,
            lanes=config.train.lanes,
            first_lane=self.lane_range[0],
            last_lane=self.lane_range[1],
            segments_per_window=config.train.segments_per_window,
            segment_length=config.model.segment_length,
            seed=config.train.seed,
        )
        self.stage = build_stage(config, topology, self.vocab_size)
        self.optimizer = ZeroOptimizer(self.stage, topology, config)
        self.executor = Executor(
            self.stage,
            topology,
            chunks=config.bptt.chunks_per_window,
            carry_gradient=config.bptt.gradient == "full",
        )
        lanes = self.lane_range[1] - self.lane_range[0]
        self.lanes_per_microbatch = derived.lanes_per_microbatch(config, dist.get_world_size())
        self.schedule = build_schedule(
            stages=topology.pipeline_size,
            stage=topology.pipeline_rank,
            windows=lanes // self.lanes_per_microbatch,
            chunks=config.bptt.chunks_per_window,
            replay=config.bptt.recompute == "window",
        )
        self.memory: Memory = self.stage.initial_memory(lanes, topology.device)
        self.run_dir = Path(config.run_dir)
        self.step = 0
        self.tokens = 0
        self.skipped: deque[tuple[int, list[str]]] = deque(maxlen=config.train.max_nonfinite_steps)
        self.monitor: Monitor | None = None

    # Starting and ending

    def start(self, resume: str | None) -> None:
        """Prepare the run folder, load the checkpoint if one is asked for, and say what is about to run.

        Raises:
            ConfigError: a new run would overwrite an old one, or the checkpoint does not fit the configuration.
            CheckpointError: there is no checkpoint, or it is damaged.
        """
        if resume is None and (self.run_dir / "metrics.jsonl").exists():
            raise ConfigError(
                [f"run_dir: {self.run_dir} holds a run already; go on with --resume, or choose another name or run_dir"]
            )
        if resume is not None:
            self.load(self.run_dir if resume == "latest" else Path(resume))
        dist.barrier()
        if self.topology.is_main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            save_config(self.config, self.run_dir / "config.yaml")
        self.monitor = Monitor(self, resume_step=self.step if resume is not None else None)
        self.monitor.introduce()

    def close(self) -> None:
        """End the background work of a run that ended well."""
        self.loader.close()
        if self.monitor:
            self.monitor.close()

    # The loop

    def train(self) -> None:
        """Train to the last step, saving on the way and at the end.

        Raises:
            NonFiniteError: too many steps in a row were skipped.
        """
        interval = self.config.checkpoint.interval
        saved = self.step
        while self.step < self.config.train.steps:
            self.train_step()
            if interval and self.step % interval == 0:
                self.save()
                saved = self.step
        if saved != self.step:
            self.save()

    def train_step(self) -> None:
        """One window of every lane: forward, backward, update; or none of it when a number is not finite."""
        monitor = self.monitor
        with monitor.phase("data"):
            batch = self._to_device(self.loader.next_batch())
        with_statistics = monitor.wants_statistics(self.step + 1)
        with monitor.phase("forward_backward"):
            result, sums = self.forward_backward(batch, statistics=with_statistics)
        with monitor.phase("step"):
            rate = learning_rate(self.config.optimizer, self.step, self.config.train.steps)
            outcome = self.optimizer.step(rate)
        self.step += 1
        if outcome.applied:
            self.memory = result.memory
            self.skipped.clear()
        else:
            self.memory = self._memory_after_skip(batch)
            self._note_skip(batch)
        self.tokens += int(sums["tokens"])
        monitor.after_step(batch, result, sums, outcome, rate)
        if len(self.skipped) == self.config.train.max_nonfinite_steps:
            self._stop_for_nonfinite()

    def forward_backward(self, batch: WindowBatch, *, statistics: bool = False) -> tuple[StepResult, dict[str, float]]:
        """Forward and backward passes of a step; gradients are synchronised afterwards.

        Returns:
            This rank's result, and the sums over the whole global batch (the same on all ranks): `loss` (the training
            objective's token part), `weight`, `answer_loss`, `answers`, `gate`, `tokens`, `padded`.
        """
        config, topology = self.config, self.topology
        weight = topology.all_reduce([float(batch.loss_weight.double().sum())], group=topology.data_group)[0]
        # DeepSpeed averages over data parallelism; the factor makes the average a sum over all lanes.
        scale = topology.data_size / max(weight, 1e-30)
        gate_scale = config.train.write_gate_penalty * topology.data_size / self.gate_count
        with self.optimizer.accumulate():
            result = self.executor.run(
                self.schedule,
                batch,
                self.memory,
                lanes_per_microbatch=self.lanes_per_microbatch,
                loss_scale=scale,
                gate_scale=gate_scale,
                statistics=statistics,
            )
            sums = self._sums(batch, result)
            if not math.isfinite(sums["loss"] + sums["gate"]):
                self.optimizer.poison()
        return result, sums | {"weight": weight}

    @property
    def gate_count(self) -> int:
        """Write gates in one step of the whole job: layers x key/value heads x tokens."""
        model, train = self.config.model, self.config.train
        heads = derived.num_query_groups(model)
        return model.num_layers * heads * train.lanes * train.segments_per_window * model.segment_length

    def _sums(self, batch: WindowBatch, result: StepResult) -> dict[str, float]:
        """Sums over the global batch, reduced over all processes; each part is contributed by one copy of it."""
        topology = self.topology
        local = dict.fromkeys(("loss", "answer_loss", "answers", "tokens", "padded"), 0.0)
        if topology.is_last_stage and topology.tensor_rank == 0:
            losses = result.token_loss.double()
            local["loss"] = float((losses * batch.loss_weight).sum())
            answers = batch.answer_mask & (batch.loss_weight > 0)  # not those of documents entered past their beginning
            local["answer_loss"] = float(losses[answers].sum())
            local["answers"] = float(answers.sum())
            local["padded"] = float(batch.padded_tokens)
            local["tokens"] = float(batch.tokens.numel() - batch.padded_tokens)
        local["gate"] = result.gate_sum
        return dict(zip(local, topology.all_reduce(list(local.values())), strict=True))

    def _memory_after_skip(self, batch: WindowBatch) -> Memory:
        """The memory from before a skipped window; empty where a document started in the window.

        The lanes have moved on: such a lane is now inside a document whose beginning it has not read, and must not
        read the document before it.
        """
        keep = (~batch.reset.any(dim=1)).to(self.topology.device)
        return map_memory(self.memory, lambda x: x * keep.view(-1, *(1,) * (x.dim() - 1)).to(x.dtype))

    def _note_skip(self, batch: WindowBatch) -> None:
        documents = [
            f"lane {int(lane)}: {', '.join(names)}" for lane, names in zip(batch.lane_ids, batch.documents, strict=True)
        ]
        self.skipped.append((self.step, documents))

    def _stop_for_nonfinite(self) -> None:
        first = self.skipped[0][0]
        documents: list[list[str]] = [None] * dist.get_world_size()
        dist.all_gather_object(documents, self.skipped[-1][1])
        lines = sorted({line for rank in documents for line in rank}, key=lambda line: int(line[5 : line.index(":")]))
        raise NonFiniteError(
            f"loss or gradient norm was not finite in {len(self.skipped)} steps in a row, since step {first}; "
            f"the last checkpoint before that can be resumed. In the last window: " + "; ".join(lines)
        )

    def _to_device(self, batch: WindowBatch) -> WindowBatch:
        if self.topology.device.type == "cpu":
            return batch
        for name, value in vars(batch).items():
            if isinstance(value, torch.Tensor):
                setattr(batch, name, value.to(self.topology.device, non_blocking=True))
        return batch

    # Saving and loading

    def save(self) -> Path:
        """Write a checkpoint; collective."""
        topology = self.topology
        state = checkpoint.RunState(self.step, self.tokens, self.loader.state_dict()["lanes"])
        path = checkpoint.save(
            self.run_dir / "checkpoints",
            state,
            self.optimizer,
            self.memory,
            topology,
            lane_range=self.lane_range,
            summary={
                "layout": {
                    "tensor": topology.tensor_size,
                    "pipeline": topology.pipeline_size,
                    "data": topology.data_size,
                    "zero_stage": self.config.parallel.zero_stage,
                    "world_size": dist.get_world_size(),
                },
                "vocab_size": self.vocab_size,
                "config": asdict(self.config),
                "versions": versions(),
            },
            keep=self.config.checkpoint.keep,
        )
        self.monitor.saved(path)
        return path

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint (a checkpoint's own folder, or that of a run)."""
        reader = checkpoint.CheckpointReader(checkpoint.find_checkpoint(folder))
        check_same_run(reader.summary["config"], self.config)
        self.memory = checkpoint.load_training(
            reader, self.optimizer, self.memory, self.topology, lane_range=self.lane_range
        )
        self.loader.load_state_dict({"lanes": reader.lanes})
        self.step, self.tokens = reader.summary["step"], reader.summary["tokens"]


FIXED_FOR_A_RUN: dict[str, Any] = {
    "model": None,
    "train": ("lanes", "segments_per_window", "seed"),
    "data": ("sets", "stagger"),
}
"""Sections (or keys of them) that a resumed run must share with its checkpoint: they decide what the saved numbers
mean. Everything else (layout, learning rate, intervals, number of steps) may change."""


def check_same_run(saved: dict[str, Any], config: Config) -> None:
    """Refuse to resume with settings that contradict the checkpoint.

    Raises:
        ConfigError: names every key that differs.
    """
    current = asdict(config)
    problems = []

    def compare(key: str, old: Any, new: Any) -> None:
        if isinstance(new, dict):
            for name in new:
                compare(f"{key}.{name}", old.get(name) if isinstance(old, dict) else None, new[name])
        elif old != new:
            problems.append(f"{key} is {new!r}, but the checkpoint was written with {old!r}")

    for section, keys in FIXED_FOR_A_RUN.items():
        for name in keys or current[section]:
            compare(f"{section}.{name}", saved[section].get(name), current[section][name])
    if problems:
        raise ConfigError(problems)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    packages = ("infini-pretrain", "torch", "megatron-core", "deepspeed", "webdataset")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
