"""Opening checkpoints, all processes together, and loading a model's weights from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from data.files import Place, StoreError
from model.decoder import DecoderStage
from model.sharding import partition_of
from pipeline.checkpoint.folder import CheckpointError, candidates, linked, read_index, read_latest, read_summary
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.parallel.topology import on_main

Found = TypeVar("Found")


def open_newest(folders: Sequence[Place], warn: Callable[[str], None]) -> CheckpointReader | None:
    """The newest whole checkpoint of a run, verified; None when it has none. Collective: the ranks share the hashing.

    Args:
        folders: the `checkpoints` of the run, the one to prefer first.
        warn: called on rank 0 for a damaged one that is passed over, for a `latest` that names none, and for a store
            that does not answer while there is something on the disk to go on from.

    Raises:
        StoreError: a store does not answer, and there is nothing else.
    """
    found, notes, problems = on_main(lambda: _survey(folders))
    told = warn if dist.get_rank() == 0 else lambda message: None
    for message in [*notes, *problems]:
        told(message)
    for path in found:
        try:
            reader = open_verified(path)
        except CheckpointError as error:
            told(f"DAMAGED CHECKPOINT, trying an older one: {error}")
            continue
        if problems:
            told(f"going on from {path}, the newest that is whole")
        return reader
    if problems:
        told("there is no other whole checkpoint")
    return None


def _survey(folders: Sequence[Place]) -> tuple[list[Place], list[str], list[str]]:
    """The checkpoints that there are, best first; what was passed over; what is wrong with `latest`, or a store."""
    latest: dict[Place, tuple[str | None, str | None]] = {}
    silent: list[StoreError] = []
    for folder in folders:
        try:
            latest[folder] = read_latest(folder)
        except StoreError as error:
            silent.append(error)
    found = candidates(*latest)
    if silent and not found:
        raise silent[0]
    # A run that went back to a checkpoint of one folder names it in all.
    problems = [text for name, text in latest.values() if text and name not in {path.name for path in found}]
    problems += [f"STORE LEFT OUT, it may hold a newer checkpoint: {error}" for error in silent]
    return found, [note for folder in latest for note in linked(folder)], problems


def open_verified(path: Place) -> CheckpointReader:
    """Open a checkpoint and check all its files, of which every process reads some; collective.

    Raises:
        CheckpointError, StoreError: the same on all ranks.
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
        CheckpointError, StoreError: the first process's where it has failed, the same on all.
    """
    found, error = None, None
    try:
        found = action()
    except StoreError as problem:
        error = problem
    except (ValueError, OSError) as problem:
        error = CheckpointError(str(problem))
    everyone: list[tuple[Found | None, Exception | None]] = [(None, None)] * dist.get_world_size()
    dist.all_gather_object(everyone, (found, error))
    if first := next((error for _, error in everyone if error), None):
        raise first
    return [found for found, _ in everyone]


def load_weights(reader: CheckpointReader, stage: DecoderStage) -> None:
    """Load the parameters alone, for evaluation."""
    for name, parameter in stage.global_parameters():
        local = reader.local_tensor(
            f"master/{name}", tuple(parameter.shape), partition_of(parameter), stage.tensor_rank, stage.tensor_size
        )
        with torch.no_grad():
            parameter.copy_(local)
