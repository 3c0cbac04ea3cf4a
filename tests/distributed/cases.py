"""What the ranks run in the distributed tests."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import io
import math
import os
import resource
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from data.lanes.window import WindowPart
from data.prepared.shards import BadDocumentError, PreparedSet
from model.rules.state import map_memory, named_tensors
from model.sharding import partition_of, unshard
from pipeline.config.load import ConfigError, load_config
from pipeline.config.validate import validate
from pipeline.parallel import groups
from pipeline.parallel.groups import host_groups
from pipeline.parallel.topology import on_main
from pipeline.training.agreement import DifferentWindowsError
from pipeline.training.skipped_steps import NonFiniteError
from pipeline.training.trainer import Trainer
from tests.distributed.grid import join

TINY = [
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.ffn_hidden_size=48",
    "model.segment_length=16",
    "model.memory.rule=delta",
    "train.lanes=4",
    "train.segments_per_window=4",
    "train.steps=20",
    "train.seed=3",
    "optimizer.lr=3e-3",
    "optimizer.warmup_steps=3",
    "metrics.interval=5",
    "metrics.memory_interval=10",
    "metrics.tensorboard=false",
    "checkpoint.interval=0",
    "data.prefetch=1",
]


def make_trainer(folder: str, data: str, overrides: list[str]) -> Trainer:
    """A trainer of the tiny model; `folder` is the run folder."""
    sets = [f"data.sets=[{{path: {data}, answer_weight: 3.0}}]"]
    config = load_config(None, [*TINY, *sets, f"run_dir={folder}", *overrides])
    validate(config, dist.get_world_size() if dist.is_initialized() else None)
    parallel = config.parallel
    topology = join(
        tensor=parallel.tensor, pipeline=parallel.pipeline, context=parallel.context, timeout_s=parallel.timeout_s
    )
    return Trainer(config, topology)


def full_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All parameters of the model, whole, on every rank (float32 masters)."""
    optimizer, topology = trainer.optimizer, trainer.topology
    mine = []
    for fragment in optimizer.fragments():
        partition = partition_of(fragment.parameter)
        mine.append(
            (
                fragment.name,
                topology.tensor_rank,
                fragment.start,
                optimizer.local_shape(fragment.parameter),
                partition,
                {kind: tensor.clone() for kind, tensor in fragment.tensors.items()},
            )
        )
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    local: dict[tuple[str, str, int], torch.Tensor] = {}
    partitions = {}
    for name, tensor_rank, start, shape, partition, tensors in (x for rank in gathered for x in rank):
        partitions[name] = partition
        for kind, tensor in tensors.items():
            whole = local.setdefault(
                (kind, name, tensor_rank), torch.full((torch.Size(shape).numel(),), torch.nan, dtype=tensor.dtype)
            )
            whole[start : start + tensor.numel()] = tensor
            local[kind, name, tensor_rank] = whole
    shapes = {(name, r): shape for rank in gathered for name, r, _, shape, _, _ in rank}
    result = {}
    for kind, name in {(kind, name) for kind, name, _ in local}:
        ranks = [r for r in range(topology.tensor_size) if (kind, name, r) in local]
        parts = [local[kind, name, r].view(shapes[name, r]) for r in ranks]
        result[f"{kind}/{name}"] = unshard(parts, partitions[name])
    return result


def full_memory(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The memory carried by all lanes, heads and layers, whole, on every rank."""
    place = (trainer.topology.data_rank, trainer.topology.tensor_rank)
    mine = [
        (name, *place, tensor.clone())
        for name, tensor in named_tensors(trainer.stage.layers, trainer.memory.value)
        if trainer.topology.context_rank == 0
    ]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    parts: dict[str, dict[int, dict[int, torch.Tensor]]] = {}
    for key, data_rank, tensor_rank, tensor in (part for rank in gathered for part in rank):
        parts.setdefault(key, {}).setdefault(data_rank, {})[tensor_rank] = tensor
    return {
        key: torch.cat([torch.cat([heads[r] for r in sorted(heads)], dim=1) for _, heads in sorted(lanes.items())])
        for key, lanes in parts.items()
    }


def finish(trainer: Trainer) -> None:
    """Let go of what a process that trains once would keep until it ends."""
    trainer.close()


def train_steps(
    folder: str,
    data: str,
    overrides: list[str],
    steps: int,
    resume: str | None = None,
    save: bool = False,
    save_at: int | None = None,
    damage: str | None = None,
) -> dict[str, Any]:
    """Train some steps.

    Args:
        resume: see `Trainer.start`.
        save: write a checkpoint at the end.
        save_at: begin one after this step and go on; it is written to disk only when the last step is over.
        damage: break the run on purpose, to see that the comparison notices: `gradient` scales one gradient by 1.01.

    Returns:
        Losses, gradient norms and batches (hashes, by lane and segment) of every step; and on rank 0 the final weights,
        moments and carried memory.
    """
    trainer = make_trainer(folder, data, overrides)
    trainer.start(resume)
    losses, norms = [], []
    batches: dict[int, list[dict[int, str]]] = {}
    context = trainer.topology.context_rank, trainer.topology.context_size
    own = WindowPart(trainer.config.bptt.chunks_per_window, *context)
    forward_backward, update = trainer.forward_backward, trainer.update

    def watched_forward_backward(batch, **kwargs):
        places = [segment for span in own.spans(batch.reset.shape[1]) for segment in span]
        for row, lane in enumerate(batch.lane_ids.tolist()):
            hashes = {}
            for i, segment in enumerate(places):
                parts = (batch.tokens, batch.labels, batch.loss_weight, batch.position_in_document)
                content = b"".join(part[row, i].numpy().tobytes() for part in parts)
                content += (batch.reset if batch.starts is None else batch.starts)[row].numpy().tobytes()
                hashes[segment] = hashlib.sha256(content).hexdigest()
            batches.setdefault(lane, []).append(hashes)
        return forward_backward(batch, **kwargs)

    def watched_update(*arguments):
        sums, outcome, rate = update(*arguments)
        losses.append(sums["loss"] / sums["weight"])
        norms.append(outcome.gradient_norm)
        return sums, outcome, rate

    trainer.forward_backward, trainer.update = watched_forward_backward, watched_update
    if damage == "gradient":
        parameter = dict(trainer.stage.named_parameters()).get("layers.1.attention.qkv.weight")
        if parameter is not None:
            parameter.register_hook(lambda gradient: gradient * 1.01)
    # The slowest disk there is: what later steps do must not reach a checkpoint that is still being written.
    steps_done, write = threading.Event(), trainer.saver._write
    trainer.saver._write = lambda snapshot: steps_done.wait() and write(snapshot)
    last = trainer.progress.step + steps
    while trainer.progress.step < last:
        trainer.train_step()
        if trainer.progress.step == save_at:
            trainer.save()
    steps_done.set()
    if save:
        trainer.save()
    tensors = full_weights(trainer) | full_memory(trainer)
    finish(trainer)
    return {
        "losses": losses,
        "norms": norms,
        "batches": batches,
        "tensors": tensors if dist.get_rank() == 0 else {},
        "saved": sorted(p.name for p in (Path(folder) / "checkpoints").glob("step_*")),
    }


def host_sums() -> dict[str, list[float]]:
    """Numbers reduced over all processes around one ring, and in a grid of two axes."""
    found = {}
    for name, widest in (("ring", 32), ("grid", 2)):
        with mock.patch.object(groups, "WIDEST_AXIS", widest):
            topology = dataclasses.replace(join(tensor=1, pipeline=1, timeout_s=60.0), host_groups=host_groups(60.0))
        rank = dist.get_rank()
        numbers = [float(rank), 2.0**rank, rank / 3]
        found[name] = [*topology.all_reduce(numbers), *topology.all_reduce(numbers, op=dist.ReduceOp.MAX)]
        found[f"{name} axes"] = len(topology.host_groups)
    return found


def try_to_resume(folder: str, data: str, overrides: list[str], resume: str) -> dict[str, Any]:
    """Start from a checkpoint that may be no good: the error, the step reached, what was printed."""
    trainer = make_trainer(folder, data, overrides)
    printed, error = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        try:
            trainer.start(resume)
        except ValueError as problem:
            error = (type(problem).__name__, str(problem))
    finish(trainer)
    return {"error": error, "step": trainer.progress.step, "printed": printed.getvalue()}


def train_on_full_disk(
    folder: str, data: str, overrides: list[str], where: str, rank: int, failures: int
) -> dict[str, Any]:
    """Train to the end while the disk is full for one rank.

    Args:
        where: `tensors` limits the size of the rank's files, as a quota would; `fsync` lets the disk refuse later.
        failures: saves that meet the full disk before there is room again.
    """
    trainer = make_trainer(folder, data, overrides)
    trainer.start(None)
    run, met, error = trainer.saver._run, 0, None

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    def save(snapshot):
        nonlocal met
        met += 1
        if met > failures or dist.get_rank() != rank:
            return run(snapshot)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if where == "tensors":
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        fsync, os.fsync = os.fsync, full if where == "fsync" else os.fsync
        try:
            return run(snapshot)
        finally:
            os.fsync = fsync
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    trainer.saver._run = save
    try:
        trainer.train()
    except OSError as problem:
        error = str(problem)
    dist.barrier()
    left = sorted(path.name for path in (Path(folder) / "checkpoints").iterdir())
    finish(trainer)
    return {"error": error, "left": left, "saves": met, "step": trainer.progress.step}


def poisoned_steps(folder: str, data: str, overrides: list[str], poison: str, first: int, count: int) -> dict[str, Any]:
    """Train, with numbers that are not finite for `count` steps from step `first` on, on one rank alone.

    Args:
        poison: `loss` makes the activations NaN, `gradient` their gradient infinite.

    Returns:
        What was the same after those steps as before, and how training went on; or the message of NonFiniteError.
    """
    trainer = make_trainer(folder, data, overrides)
    trainer.start(None)
    while trainer.progress.step < first - 1:
        trainer.train_step()
    before, lanes = full_weights(trainer), trainer.loader.state_dict()["lanes"]
    memory = map_memory(trainer.memory.value, torch.clone)
    seen: list[torch.Tensor] = []
    next_batch = trainer.loader.next_batch

    def watched_next_batch():
        batch = next_batch()
        seen.append(batch.reset.any(dim=1))
        return batch

    trainer.loader.next_batch = watched_next_batch

    def hurt(module, inputs, output):
        if poison == "gradient" and output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)
        return output * math.nan if poison == "loss" else output

    topology, hook = trainer.topology, None
    if topology.replica_rank == topology.tensor_rank == 0 and "1" in trainer.stage.layers:
        hook = trainer.stage.layers["1"].mlp.register_forward_hook(hurt)
    try:
        for _ in range(count):
            trainer.train_step()
    except NonFiniteError as error:
        finish(trainer)
        return {"error": str(error)}
    finally:
        if hook is not None:
            hook.remove()
    after, moved = full_weights(trainer), trainer.loader.state_dict()["lanes"]
    started = torch.stack(seen).any(dim=0)
    rolled_back = all(
        torch.equal(x[~started], y[~started]) and not x[started].any()
        for state, old in zip(trainer.memory.value, memory, strict=True)
        for x, y in zip(state, old, strict=True)
    )
    result = {
        "error": None,
        "weights_unchanged": before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before),
        "memory_rolled_back": rolled_back,
        "lanes_started": started.tolist(),
        "lanes_moved": all(lanes[lane] != moved[lane] for lane in lanes),
        "step": trainer.progress.step,
    }
    trainer.train_step()
    later = full_weights(trainer)
    result["goes_on"] = all(x.isfinite().all() and not torch.equal(x, after[name]) for name, x in later.items())
    result["optimizer_steps"] = trainer.optimizer.steps_taken()[0]
    finish(trainer)
    return result


def one_rank_skips(folder: str, data: str, overrides: list[str], rank: int, document: int) -> dict[str, Any]:
    """Train while rank `rank` alone cannot read a document: the error, and the steps that were taken before it."""
    trainer = make_trainer(folder, data, ["data.skip_bad_documents=true", *overrides])
    trainer.start(None)
    read, error = PreparedSet.read, None

    def unreadable(self, i, *span):
        if i == document:
            raise BadDocumentError(f"document {self.document_name(i)} cannot be read: Input/output error")
        return read(self, i, *span)

    if dist.get_rank() == rank:
        PreparedSet.read = unreadable
    try:
        for _ in range(20):
            trainer.train_step()
    except DifferentWindowsError as problem:
        error = str(problem)
    finally:
        PreparedSet.read = read
    skipped = trainer.loader.skipped_documents
    finish(trainer)
    return {"error": error, "step": trainer.progress.step, "skipped": skipped}


class OddError(RuntimeError):
    """An error that cannot be made from its message."""

    def __init__(self, number: int, other: int) -> None:
        super().__init__(f"{number} is not {other}")


def on_main_outcomes() -> list[tuple[str, str] | int]:
    """What this process gets of actions of the main process: results, or errors as (type, message)."""

    def fail(error: Exception) -> None:
        raise error

    join(tensor=1, pipeline=1, timeout_s=60)
    outcomes, ran = [], []
    errors = [ConfigError(["a.b = 1: no"]), PermissionError(13, "Permission denied", "/run"), OddError(1, 2)]
    for error in (None, *errors, UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")):
        try:
            outcomes.append(on_main(lambda e=error: fail(e) if e else ran.append(1) or 7))
        except Exception as problem:
            outcomes.append((type(problem).__name__, str(problem)))
    return [*outcomes, len(ran)]


def start_in(folder: str, data: str, overrides: list[str], resume: str | None) -> tuple[str, str] | None:
    """Start a run whose folder the main process may not be able to use: the error."""
    trainer = make_trainer(folder, data, overrides)
    error = None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.start(resume)
    except (ValueError, OSError) as problem:
        error = (type(problem).__name__, str(problem))
    dist.barrier()  # nobody is left behind in a collective of its own
    finish(trainer)
    return error
