"""Opening checkpoints together, and putting what they hold into a run: `pipeline.checkpoint.writer`'s counterpart."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from model.decoder import DecoderStage
from model.rules.state import Memory, map_named
from model.sharding import partition_of
from pipeline.checkpoint.folder import CheckpointError, candidates, linked, read_latest
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.parallel.optimizer import ZeroOptimizer
from pipeline.parallel.topology import Topology, on_main


def open_newest(run_dir: Path, warn) -> CheckpointReader | None:
    """The newest whole checkpoint of a run, verified; None when it has none. Collective: the ranks share the hashing.

    `warn(message)` is called on rank 0 for a damaged one that is passed over, and for a `latest` that names none.
    """
    folder = run_dir / "checkpoints"
    found, problem, passed_over = on_main(lambda: (candidates(folder), read_latest(folder)[1], linked(folder)))
    for message in passed_over if dist.get_rank() == 0 else ():
        warn(message)
    for path in found:
        try:
            reader = open_verified(path)
        except CheckpointError as error:
            if dist.get_rank() == 0:
                warn(f"DAMAGED CHECKPOINT, trying an older one: {error}")
            continue
        if problem and dist.get_rank() == 0:
            warn(f"{problem}: going on from {path.name}, the newest that is whole")
        return reader
    if problem and dist.get_rank() == 0:
        warn(f"{problem}, and there is no other whole checkpoint")
    return None


def open_verified(path: Path) -> CheckpointReader:
    """Open a checkpoint and check all its files; collective.

    Raises:
        CheckpointError: the same on all ranks.
    """
    reader, error = None, None
    try:
        reader = CheckpointReader(path)
        reader.check_model()
        reader.verify(dist.get_rank(), dist.get_world_size())
    except (ValueError, OSError) as problem:
        error = str(problem)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((error for error in errors if error), None)
    if first:
        raise CheckpointError(first)
    return reader


def _backbone_steps(reader: CheckpointReader) -> int:
    """Adam's step count of the plain model's parameters.

    Older checkpoints have it as the first stage counted it: 0 where that stage trained nothing of the plain model.
    """
    found = reader.summary.backbone_optimizer_steps
    return found or max(0, reader.summary.optimizer_steps - reader.config.train.freeze_backbone_steps)


def load_training(
    reader: CheckpointReader,
    optimizer: ZeroOptimizer,
    memory: Memory,
    topology: Topology,
    *,
    lane_range: tuple[int, int],
) -> Memory:
    """Restore weights, optimizer and random state in place; collective. Returns the carried memory.

    Raises:
        CheckpointError: the checkpoint holds weights alone, or does not fit.
    """
    summary = reader.summary
    if summary.weights_only:
        raise CheckpointError(
            f"{reader.folder} holds weights alone, there is nothing to resume: start a run from it with "
            f"train.init_from={reader.folder}"
        )
    optimizer.set_steps_taken(summary.optimizer_steps, _backbone_steps(reader))
    for fragment in optimizer.fragments():
        shape, partition = optimizer.local_shape(fragment.parameter), partition_of(fragment.parameter)
        for kind, tensor in fragment.tensors.items():
            tensor.copy_(
                reader.local_range(
                    f"{kind}/{fragment.name}",
                    shape,
                    partition,
                    topology.tensor_rank,
                    topology.tensor_size,
                    fragment.start,
                    fragment.start + tensor.numel(),
                )
            )
    optimizer.refresh_parameters()
    if summary.layout.world_size == dist.get_world_size():
        try:
            torch.set_rng_state(reader.rng_state(dist.get_rank()))
        except RuntimeError as error:
            raise CheckpointError(f"{reader.folder}: the random state of rank {dist.get_rank()}: {error}") from error

    def read(name: str, like: Tensor) -> Tensor:
        return reader.memory_tensor(name, like, lane_range[0], topology.tensor_rank * like.shape[1]).to(like.device)

    return map_named(optimizer.stage.layers, memory, read)


def load_weights(reader: CheckpointReader, stage: DecoderStage) -> None:
    """Load the parameters alone, for evaluation."""
    for name, parameter in stage.global_parameters():
        local = reader.local_tensor(
            f"master/{name}", tuple(parameter.shape), partition_of(parameter), stage.tensor_rank, stage.tensor_size
        )
        with torch.no_grad():
            parameter.copy_(local)
