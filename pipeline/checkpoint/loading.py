"""Opening checkpoints, all processes together, and loading a model's weights from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from model.decoder import DecoderStage
from model.sharding import partition_of
from pipeline.checkpoint.folder import CheckpointError, candidates, linked, read_index, read_latest, read_summary
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.parallel.topology import on_main

Found = TypeVar("Found")


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
    """Open a checkpoint and check all its files, of which every process reads some; collective.

    Raises:
        CheckpointError: the same on all ranks.
    """
    summary = on_main(lambda: read_summary(path))
    rank, world = dist.get_rank(), dist.get_world_size()
    names = sorted(name for name in summary.files if name.endswith(".json"))
    own = _shared(lambda: {name: read_index(path, name, summary.files[name]) for name in names[rank::world]})
    indices = {name: contents for part in own for name, contents in part.items()}

    def check() -> None:
        reader = CheckpointReader(path, summary=summary, indices=indices)
        reader.check_model()
        reader.verify(rank, world)
        checked.append(reader)

    checked: list[CheckpointReader] = []
    _shared(check)
    return checked[0]


def _shared(action: Callable[[], Found]) -> list[Found]:
    """What `action` gives on every process; collective.

    Raises:
        CheckpointError: the first process's where it has failed, the same on all.
    """
    found, error = None, None
    try:
        found = action()
    except (ValueError, OSError) as problem:
        error = str(problem)
    everyone: list[tuple[Found | None, str | None]] = [(None, None)] * dist.get_world_size()
    dist.all_gather_object(everyone, (found, error))
    if first := next((error for _, error in everyone if error), None):
        raise CheckpointError(first)
    return [found for found, _ in everyone]


def load_weights(reader: CheckpointReader, stage: DecoderStage) -> None:
    """Load the parameters alone, for evaluation."""
    for name, parameter in stage.global_parameters():
        local = reader.local_tensor(
            f"master/{name}", tuple(parameter.shape), partition_of(parameter), stage.tensor_rank, stage.tensor_size
        )
        with torch.no_grad():
            parameter.copy_(local)
