"""A memory state on disk: what a model knows after a document, to be loaded for any number of questions.

One safetensors file. Tensors: `memory/<layer>/<field>` `[lanes, all key/value heads, ...]`, and `segment` `[lanes, S]`
with the tokens of the current, partial segment (`segment_tokens` of them; they are read again when the file is loaded,
which costs less than a segment). The header says which model and tokenizer it belongs to. Whole heads: a file written
under one layout is loaded under any other.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.executor import Memory
from pipeline.incremental import IncrementalModel, LaneState

FORMAT = "infini-memory-1"


class MemoryFileError(ValueError):
    """A memory file that is damaged or belongs to another model; the message names the file."""


@dataclass(frozen=True)
class Identity:
    """What a memory belongs to."""

    model: dict[str, Any]
    """The `model` section of the configuration."""
    checkpoint: str
    """SHA-256 of the checkpoint's summary, which covers its weights."""
    tokenizer: str
    """Hash of the tokenizer."""


def save_memory(path: Path, state: LaneState, model: IncrementalModel, identity: Identity) -> None:
    """Write `state` to `path`, whole; collective. The last token is in the file, though not in the caches.

    Raises:
        OSError: the file cannot be written.
    """
    stage, topology = model.stage, model.topology
    mine = {
        f"memory/{layer}/{field}": (topology.tensor_rank, tensor.cpu())
        for layer, carried in zip(stage.layers, state.memory, strict=True)
        for field, tensor in ({} if carried is None else carried._asdict()).items()
    }
    gathered: list[dict[str, tuple[int, Tensor]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    problem = [_write(path, state, gathered, model.length, identity) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise OSError(f"the memory was not saved: {problem[0]}")


def _write(
    path: Path,
    state: LaneState,
    gathered: list[dict[str, tuple[int, Tensor]]],
    length: int,
    identity: Identity,
) -> str | None:
    """Write the file; returns what went wrong, for all ranks to raise."""
    parts: dict[str, dict[int, Tensor]] = {}
    for rank in gathered:
        for key, (tensor_rank, tensor) in rank.items():
            parts.setdefault(key, {})[tensor_rank] = tensor
    tensors = {key: torch.cat([heads[r] for r in sorted(heads)], dim=1) for key, heads in parts.items()}
    padded = [tokens + [0] * (length - len(tokens)) for tokens in state.segment]
    tensors["segment"] = torch.tensor(padded, dtype=torch.int64)
    tensors["segment_tokens"] = torch.tensor([len(tokens) for tokens in state.segment])
    tensors["position"] = torch.tensor(state.position)
    header = {"format": FORMAT, **{key: json.dumps(value) for key, value in asdict(identity).items()}}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=header)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        return f"{path}: {error}"
    finally:
        temporary.unlink(missing_ok=True)
    return None


def load_memory(path: Path, model: IncrementalModel, identity: Identity) -> LaneState:
    """The state in the file at `path`, on this layout; collective.

    Raises:
        MemoryFileError: it is damaged, or another model's.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no memory file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            _check(path, file.metadata() or {}, identity)
            segment, counts = file.get_tensor("segment"), file.get_tensor("segment_tokens")
            state = model.start(len(counts))
            state.position = file.get_tensor("position").tolist()
            state.memory = _memory(file, state.memory, model)
    except SafetensorError as error:
        raise MemoryFileError(f"{path} is damaged or not a memory file: {error}") from error
    model.read(state, [[row[:count].numpy()] for row, count in zip(segment, counts.tolist(), strict=True)])
    return state


def _memory(file: Any, empty: Memory, model: IncrementalModel) -> Memory:
    """The part of the file's memory that belongs to this process's layers and heads."""
    rank, loaded = model.topology.tensor_rank, []
    for layer, state in zip(model.stage.layers, empty, strict=True):
        if state is None:
            loaded.append(None)
            continue
        fields = []
        for field, like in state._asdict().items():
            heads = like.shape[1]
            piece = file.get_slice(f"memory/{layer}/{field}")[:, rank * heads : (rank + 1) * heads]
            fields.append(piece.to(like))
        loaded.append(type(state)(*fields))
    return loaded


def _check(path: Path, header: dict[str, str], identity: Identity) -> None:
    if header.get("format") != FORMAT:
        raise MemoryFileError(f"{path} is not a memory file of this version ({FORMAT})")
    written = {key: json.loads(header[key]) for key in asdict(identity)}
    if written["checkpoint"] != identity.checkpoint:
        differing = _differences("model", written["model"], identity.model)
        raise MemoryFileError(
            f"{path} is the memory of another model: "
            + ("; ".join(differing) or "of the same shape, but with other weights")
            + f" (checkpoint {written['checkpoint'][:12]} there, {identity.checkpoint[:12]} here)"
        )
    if written["tokenizer"] != identity.tokenizer:
        raise MemoryFileError(
            f"{path} was written with another tokenizer ({written['tokenizer'][:12]} there, "
            f"{identity.tokenizer[:12]} here)"
        )


def _differences(key: str, written: Any, wanted: Any) -> list[str]:
    if isinstance(written, dict) and isinstance(wanted, dict):
        names = sorted(written.keys() | wanted.keys())
        return [line for name in names for line in _differences(f"{key}.{name}", written.get(name), wanted.get(name))]
    return [] if written == wanted else [f"{key} is {written!r} there and {wanted!r} here"]
