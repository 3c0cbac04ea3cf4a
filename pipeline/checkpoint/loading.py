"""Opening checkpoints, all processes together, and loading a model's weights from them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from model.decoder import DecoderStage
from model.sharding import partition_of
from pipeline.checkpoint.folder import CheckpointError, candidates, linked, read_latest
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.parallel.topology import on_main


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


def load_weights(reader: CheckpointReader, stage: DecoderStage) -> None:
    """Load the parameters alone, for evaluation."""
    for name, parameter in stage.global_parameters():
        local = reader.local_tensor(
            f"master/{name}", tuple(parameter.shape), partition_of(parameter), stage.tensor_rank, stage.tensor_size
        )
        with torch.no_grad():
            parameter.copy_(local)
