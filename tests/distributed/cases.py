"""What the ranks run in the distributed tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.sharding import partition_of, unshard
from pipeline.config_io import load_config
from pipeline.trainer import Trainer
from pipeline.validate import validate
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
    topology = join(
        tensor=config.parallel.tensor, pipeline=config.parallel.pipeline, timeout_s=config.parallel.timeout_s
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
            whole = local.setdefault((kind, name, tensor_rank), torch.full((torch.Size(shape).numel(),), torch.nan))
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
        (f"memory/{layer}/{field}", *place, tensor.clone())
        for layer, state in zip(trainer.stage.layers, trainer.memory, strict=True)
        for field, tensor in ({} if state is None else state._asdict()).items()
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


def train_steps(
    folder: str,
    data: str,
    overrides: list[str],
    steps: int,
    resume: bool = False,
    save: bool = False,
    damage: str | None = None,
) -> dict[str, Any]:
    """Train some steps; returns losses and gradient norms per step, final weights, moments and carried memory.

    Args:
        damage: break the run on purpose, to see that the comparison notices: `gradient` scales one gradient by 1.01.
    """
    trainer = make_trainer(folder, data, overrides)
    trainer.start("latest" if resume else None)
    losses, norms = [], []
    forward_backward, step = trainer.forward_backward, trainer.optimizer.step

    def watched_forward_backward(*args, **kwargs):
        result, sums = forward_backward(*args, **kwargs)
        losses.append(sums["loss"] / sums["weight"])
        return result, sums

    def watched_step(rate):
        outcome = step(rate)
        norms.append(outcome.gradient_norm)
        return outcome

    trainer.forward_backward, trainer.optimizer.step = watched_forward_backward, watched_step
    if damage == "gradient":
        parameter = dict(trainer.stage.named_parameters()).get("layers.1.attention.qkv.weight")
        if parameter is not None:
            parameter.register_hook(lambda gradient: gradient * 1.01)
    last = trainer.step + steps
    while trainer.step < last:
        trainer.train_step()
    if save:
        trainer.save()
    tensors = full_weights(trainer) | full_memory(trainer)
    trainer.close()
    return {
        "losses": losses,
        "norms": norms,
        "tensors": tensors if dist.get_rank() == 0 else {},
        "saved": sorted(p.name for p in (Path(folder) / "checkpoints").glob("step_*")),
    }
