"""A memory state on disk: what a model knows after a document, to be loaded for any number of questions.

One safetensors file. Tensors: `memory/<layer>/<field>` `[lanes, all key/value heads, ...]`, and `segment` `[lanes, S]`
with the tokens of the current, partial segment (`segment_tokens` of them; they are read again when the file is loaded,
which costs less than a segment). The header says which model and tokenizer it belongs to, and has a hash of that and of
all tensors, names, shapes and types included. Whole heads: a file written under one layout is loaded under any other.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.files import FileError, decode_json, shown
from model.config import layer_config, layer_shape
from model.rules import empty_state
from model.rules.state import Memory, map_named, named_tensors
from pipeline.checkpoint.schema import Hash
from pipeline.checkpoint.tensor_file import tensor_bytes, write_tensors
from pipeline.checkpoint.tensor_reader import TensorReader
from pipeline.inference.incremental import IncrementalModel, LaneState
from pipeline.parallel.topology import on_main

logger = logging.getLogger(__name__)

FORMAT = "infini-memory-2"
FIRST_FORMAT = "infini-memory-1"
"""Without a hash of the contents."""
MOST_LANES = 4096
"""Documents in a file: with each come caches that are far larger than its part of the file."""
LONGEST = 1 << 53
"""Tokens of a document."""
_DIFFERENCES = 20


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
    carried = named_tensors(stage.layers, state.memory)
    mine = {name: (topology.tensor_rank, tensor.cpu()) for name, tensor in carried}
    gathered: list[dict[str, tuple[int, Tensor]]] = [{}] * dist.get_world_size()
    dist.gather_object(mine, gathered if dist.get_rank() == 0 else None, dst=0)  # nobody else needs it all
    on_main(lambda: _write(path, state, gathered, model.length, identity))


def _write(
    path: Path,
    state: LaneState,
    gathered: list[dict[str, tuple[int, Tensor]]],
    length: int,
    identity: Identity,
) -> None:
    parts: dict[str, dict[int, Tensor]] = {}
    for rank in gathered:
        for key, (tensor_rank, tensor) in rank.items():
            parts.setdefault(key, {})[tensor_rank] = tensor
    tensors = {key: torch.cat([heads[r] for r in sorted(heads)], dim=1) for key, heads in parts.items()}
    padded = [tokens + [0] * (length - len(tokens)) for tokens in state.segment]
    tensors["segment"] = torch.tensor(padded, dtype=torch.int64)
    tensors["segment_tokens"] = torch.tensor([len(tokens) for tokens in state.segment])
    tensors["position"] = torch.tensor(state.position)
    header = {key: json.dumps(value) for key, value in asdict(identity).items()}
    header |= {"format": FORMAT, "sha256": json.dumps(contents_hash(tensors, asdict(identity)))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, header)
    except OSError as error:
        raise OSError(f"the memory was not saved: {path}: {error}") from error


def contents_hash(tensors: Mapping[str, Tensor], identity: Mapping[str, Any]) -> str:
    """SHA-256 of everything in a memory file that means something."""
    kinds = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    digest = hashlib.sha256(json.dumps([identity, kinds], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


def load_memory(path: Path, model: IncrementalModel, identity: Identity) -> LaneState:
    """The state in the file at `path`, on this layout; collective. A file without a hash of its contents, as older
    versions wrote them, is loaded with a warning.

    Raises:
        MemoryFileError: it is damaged, or another model's.
        OSError: it cannot be read.
    """
    hashed = on_main(lambda: _checked(path, model, identity))
    if not hashed and dist.get_rank() == 0:
        logger.warning("%s was written by an older version, without a hash of its contents: it is not verified", path)
    try:
        file = TensorReader(path)
        segment, counts = file.read("segment"), file.read("segment_tokens")
        state = model.start(len(counts))
        state.position = file.read("position").tolist()
        state.memory = _memory(file, state.memory, model)
    except FileError as error:
        raise MemoryFileError(str(error)) from error
    model.read(state, [[row[:count].numpy()] for row, count in zip(segment, counts.tolist(), strict=True)])
    return state


def _checked(path: Path, model: IncrementalModel, identity: Identity) -> bool:
    """`_check`, its errors under the names that `load_memory` promises."""
    try:
        return _check(path, model, identity)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no memory file {path}") from None
    except (OSError, ValueError) as error:
        raise MemoryFileError(str(error)) from error
    except RecursionError:
        raise MemoryFileError(f"{path} is damaged: its header is nested too deeply") from None


def _memory(file: TensorReader, empty: Memory, model: IncrementalModel) -> Memory:
    """The part of the file's memory that belongs to this process's layers and heads."""
    rank = model.topology.tensor_rank

    def read(name: str, like: Tensor) -> Tensor:
        heads = slice(rank * like.shape[1], (rank + 1) * like.shape[1])
        return file.read(name, slice(None), heads).to(like)

    return map_named(model.stage.layers, empty, read)


def _check(path: Path, model: IncrementalModel, identity: Identity) -> bool:
    """Whether the file has a hash, when all that is in it is what it should be.

    Raises:
        ValueError: it is not.
        OSError: it cannot be read.
    """
    file = TensorReader(path)
    header = file.metadata
    if header.get("format") not in (FORMAT, FIRST_FORMAT):
        raise MemoryFileError(f"{path} is not a memory file of this version ({FORMAT})")
    written = {
        key: decode_json(header.get(key, "null"), kind, f"{path}: {key}")
        for key, kind in (("model", dict[str, Any]), ("checkpoint", str), ("tokenizer", str))
    }
    _check_identity(path, written, identity)
    lanes = file.shapes.get("segment_tokens", (0,))[0] if len(file.shapes.get("segment_tokens", (0,))) == 1 else 0
    if not 1 <= lanes <= MOST_LANES:
        raise MemoryFileError(f"{path}: holds {lanes:,} documents; 1 to {MOST_LANES:,} are possible")
    integers = {"segment": (lanes, model.length), "segment_tokens": (lanes,), "position": (lanes,)}
    memory = dict(_expected(model, lanes))
    file.check(memory | integers, kinds=dict.fromkeys(integers, ("I64",)))
    tensors = {name: file.read(name) for name in file.shapes}
    hashed = header["format"] == FORMAT
    if hashed and decode_json(header.get("sha256", "null"), Hash, f"{path}: sha256") != contents_hash(tensors, written):
        raise MemoryFileError(f"{path} was changed after it was written (the SHA-256 of its contents differs)")
    for name in memory:
        if not tensors[name].isfinite().all():
            raise MemoryFileError(f"{path}: {name} holds numbers that are not finite")
    _check_range(path, "segment_tokens", tensors, model.length)
    _check_range(path, "segment", tensors, model.vocab_size - 1)
    _check_range(path, "position", tensors, LONGEST)
    if (tensors["position"] % model.length).any():
        raise MemoryFileError(f"{path}: position is not at the border of a segment of {model.length} tokens")
    return hashed


def _expected(model: IncrementalModel, lanes: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of what all layers and heads of the model carry."""
    config, wide = model.stage.config, torch.float32
    options = {"dtype": wide, "context_dtype": wide, "device": torch.device("meta")}
    kinds = [layer_config(config, layer) for layer in range(config.num_layers)]
    memory = [empty_state(kind, layer_shape(kind), lanes, **options) for kind in kinds]
    for name, like in named_tensors(map(str, range(config.num_layers)), memory):
        yield name, tuple(like.shape)


def _check_range(path: Path, name: str, tensors: Mapping[str, Tensor], most: int) -> None:
    least, largest = int(tensors[name].min()), int(tensors[name].max())
    if least < 0 or largest > most:
        raise MemoryFileError(f"{path}: {name} holds {least if least < 0 else largest}; 0 to {most} are possible")


def _check_identity(path: Path, written: dict[str, Any], identity: Identity) -> None:
    if written["checkpoint"] != identity.checkpoint:
        differing = _differences("model", written["model"], identity.model)
        more = len(differing) - _DIFFERENCES
        listed = "; ".join(differing[:_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
        raise MemoryFileError(
            f"{path} is the memory of another model: "
            + (listed or "of the same shape, but with other weights")
            + f" (checkpoint {shown(written['checkpoint'][:12])} there, {identity.checkpoint[:12]} here)"
        )
    if written["tokenizer"] != identity.tokenizer:
        raise MemoryFileError(
            f"{path} was written with another tokenizer ({shown(written['tokenizer'][:12])} there, "
            f"{identity.tokenizer[:12]} here)"
        )


def _differences(key: str, written: Any, wanted: Any) -> list[str]:
    if isinstance(written, dict) and isinstance(wanted, dict):
        names = sorted(written.keys() | wanted.keys())
        return [line for name in names for line in _differences(f"{key}.{name}", written.get(name), wanted.get(name))]
    return [] if written == wanted else [f"{shown(key)[1:-1]} is {shown(written)} there and {shown(wanted)} here"]
