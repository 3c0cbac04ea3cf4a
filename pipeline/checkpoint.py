"""Sharded checkpoints that any layout can read.

A checkpoint is a folder `step_00000100` with, for every process, `rank_00000.safetensors` (the tensors it owns) and
`rank_00000.json` (what they are), and `checkpoint.json`, which is written last and lists every file with its size and
SHA-256. Nothing in it is pickled. The folder is written under a temporary name and renamed when it is whole; `latest`
is moved after that.

Each process writes its own ZeRO fragment of the float32 parameters and Adam's moments, and the memory of its own
lanes and heads. A tensor is described by where it belongs in the whole model (name, range, partition over
tensor-parallel ranks; layer, lanes, heads), so a reader on another layout puts the parts together one tensor at a time.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.files import sealed
from model.decoder import DecoderStage
from model.sharding import Partition, full_shape, partition_of, shard, unshard
from pipeline.executor import Memory
from pipeline.optimizer import ZeroOptimizer
from pipeline.topology import Topology

FORMAT_VERSION = 1
SUMMARY = "checkpoint.json"
LATEST = "latest"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or does not fit; the message names the file."""


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


@dataclass
class RunState:
    """What a step moves besides the weights, the optimizer and the memory."""

    step: int
    tokens: int
    lanes: dict[str, Any]
    """Lane cursors by global lane id (`LaneLoader.state_dict()['lanes']`)."""
    windows: int
    """Windows by which the lanes have moved: the steps, and what roll-backs left out."""
    recent_losses: list[float]
    """What loss spikes are measured against."""


def named_by_latest(folder: Path) -> Path | None:
    """What `latest` in a run's `checkpoints` folder names, be it there or not; None without a `latest`."""
    pointer = folder / LATEST
    return folder / pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else None


def candidates(folder: Path) -> list[Path]:
    """The checkpoints in a run's `checkpoints` folder, best first: what `latest` names, the ones before it, newest
    first, and then those after it: a run that went back to an earlier checkpoint has left them aside."""
    found = sorted((path for path in folder.glob("step_*") if (path / SUMMARY).is_file()), reverse=True)
    named = named_by_latest(folder)
    return sorted(found, key=lambda path: named is not None and path > named)


def open_newest(run_dir: Path, warn) -> CheckpointReader | None:
    """The newest whole checkpoint of a run, verified; None when it has none. Collective: the ranks share the hashing.

    A damaged one is passed over, and `warn(message)` is called on rank 0.
    """
    box = [candidates(run_dir / "checkpoints") if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    for path in box[0]:
        try:
            return open_verified(path)
        except CheckpointError as error:
            if dist.get_rank() == 0:
                warn(f"DAMAGED CHECKPOINT, trying an older one: {error}")
    return None


def open_verified(path: Path) -> CheckpointReader:
    """Open a checkpoint and check all its files; collective.

    Raises:
        CheckpointError: the same on all ranks.
    """
    reader, error = None, None
    try:
        reader = CheckpointReader(path)
        reader.verify(dist.get_rank(), dist.get_world_size())
    except CheckpointError as problem:
        error = str(problem)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((error for error in errors if error), None)
    if first:
        raise CheckpointError(first)
    return reader


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint that `latest` names in a run's `checkpoints` folder, or `folder` itself when it is a checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    if (folder / SUMMARY).is_file():
        return folder
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    pointer = folder / LATEST
    if not pointer.is_file():
        raise CheckpointError(f"{folder}: no checkpoint here (no {SUMMARY}, no {LATEST})")
    found = named_by_latest(folder)
    if not (found / SUMMARY).is_file():
        raise CheckpointError(f"{pointer} names {found.name}, which is not a checkpoint (no {SUMMARY})")
    return found


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CheckpointReader:
    """Reads a checkpoint from any layout.

    Raises:
        CheckpointError: a file is missing, has another size than recorded, or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.summary = read_summary(folder)
        self.lanes: dict[str, Any] = {}
        self._entries: dict[str, list[dict[str, Any]]] = {}
        for name, facts in self.summary["files"].items():
            index_file = name.endswith(".json")
            _raise(file_damage(folder / name, facts, contents=index_file))
            if index_file:
                index = json.loads((folder / name).read_text(encoding="utf-8"))
                self.lanes |= index["lanes"]
                for entry in index["tensors"]:
                    file = name.replace(".json", ".safetensors")
                    self._entries.setdefault(entry["key"], []).append({"file": file, **entry})

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compare the SHA-256 of every file (of every `parts`-th, from `part` on) with the recorded one.

        Raises:
            CheckpointError: names the first file that differs.
        """
        for name in sorted(self.summary["files"])[part::parts]:
            _raise(file_damage(self.folder / name, self.summary["files"][name], contents=True))

    def keys(self) -> list[str]:
        """Names of all tensors but the random states: `master/...`, `exp_avg/...`, `memory/<layer>/<field>`."""
        return list(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a whole parameter-like tensor."""
        entry = self._entries[key][0]
        partition = Partition(entry["partition_dim"], entry["partition_stride"])
        return full_shape(entry["local_shape"], partition, entry["tensor_size"])

    def whole_tensor(self, key: str) -> Tensor:
        """A parameter-like tensor, put together from all processes' parts.

        Raises:
            CheckpointError: parts are missing.
        """
        entries = self._entries[key]
        ranks = sorted({entry["tensor_rank"] for entry in entries})
        parts = [self._assemble(key, [e for e in entries if e["tensor_rank"] == rank]) for rank in ranks]
        return unshard(parts, Partition(entries[0]["partition_dim"], entries[0]["partition_stride"]))

    def whole_memory(self, layer: str, field: str) -> Tensor:
        """The carried memory of all lanes and heads.

        Raises:
            CheckpointError: parts are missing.
        """
        entries = self._entries[f"memory/{layer}/{field}"]
        lanes = max(entry["first_lane"] + entry["shape"][0] for entry in entries)
        heads = max(entry["first_head"] + entry["shape"][1] for entry in entries)
        return self.memory_tensor(layer, field, torch.empty(lanes, heads, *entries[0]["shape"][2:]), 0, 0)

    def local_tensor(self, key: str, shape: tuple[int, ...], partition: Partition, rank: int, size: int) -> Tensor:
        """The part of a parameter-like tensor that tensor-parallel rank `rank` of `size` holds.

        Raises:
            CheckpointError: the tensor is missing, incomplete or of another shape.
        """
        entries = self._entries.get(key)
        if not entries:
            raise CheckpointError(f"{self.folder} holds no tensor {key}")
        written = Partition(entries[0]["partition_dim"], entries[0]["partition_stride"])
        ranks = {entry["tensor_rank"] for entry in entries}
        needed = {rank} if len(ranks) == size else ranks
        parts = [self._assemble(key, [e for e in entries if e["tensor_rank"] == r]) for r in sorted(needed)]
        if len(needed) == entries[0]["tensor_size"]:
            local = shard(unshard(parts, written), written, rank, size)
        else:
            local = parts[0]
        if tuple(local.shape) != tuple(shape) or (size > 1 and written != partition):
            raise CheckpointError(
                f"{self.folder}: {key} has shape {full_shape(local.shape, written, size)}; the model's has "
                f"{full_shape(shape, partition, size)}"
            )
        return local

    def _assemble(self, key: str, entries: list[dict[str, Any]]) -> Tensor:
        """One tensor-parallel rank's part from its ZeRO fragments."""
        shape = entries[0]["local_shape"]
        flat: Tensor | None = None
        filled = 0
        for entry in entries:
            piece = self._tensor(entry["file"], key)
            if flat is None:
                flat = torch.empty(torch.Size(shape).numel(), dtype=piece.dtype)
            flat[entry["start"] : entry["start"] + entry["count"]] = piece
            filled += entry["count"]
        if flat is None or filled != flat.numel():
            raise CheckpointError(f"{self.folder}: {key} is incomplete ({filled} of {shape} elements)")
        return flat.view(shape)

    def memory_tensor(self, layer: str, field: str, like: Tensor, first_lane: int, first_head: int) -> Tensor:
        """The carried memory of some lanes and heads; `like` gives their number (dims 0 and 1).

        Raises:
            CheckpointError: lanes or heads are not all there.
        """
        key = f"memory/{layer}/{field}"
        result = torch.empty(like.shape, dtype=like.dtype)
        filled = 0
        for entry in self._entries.get(key, []):
            lanes, heads = entry["shape"][:2]
            if entry["shape"][2:] != list(like.shape[2:]):
                raise CheckpointError(f"{self.folder}: {key} has shape {entry['shape']}, expected {list(like.shape)}")
            target_lanes, source_lanes = _overlap(first_lane, like.shape[0], entry["first_lane"], lanes)
            target_heads, source_heads = _overlap(first_head, like.shape[1], entry["first_head"], heads)
            if target_lanes.stop <= target_lanes.start or target_heads.stop <= target_heads.start:
                continue
            piece = self._tensor(entry["file"], key)[source_lanes, source_heads]
            result[target_lanes, target_heads] = piece
            filled += piece.numel()
        if filled != result.numel():
            raise CheckpointError(
                f"{self.folder}: {key} does not hold lanes {first_lane} to {first_lane + like.shape[0] - 1}, heads "
                f"{first_head} to {first_head + like.shape[1] - 1}; was the run's train.lanes changed?"
            )
        return result

    def _tensor(self, file: str, key: str) -> Tensor:
        try:
            with safe_open(self.folder / file, framework="pt") as tensors:
                return tensors.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / file}: cannot read {key}: {error}") from error

    def rng_state(self, rank: int) -> Tensor:
        return self._tensor(f"rank_{rank:05d}.safetensors", "rng")


def read_summary(folder: Path) -> dict[str, Any]:
    """What a checkpoint's `checkpoint.json` says.

    Raises:
        CheckpointError: it is missing, damaged or of another version.
    """
    path = folder / SUMMARY
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    version = summary.get("format_version") if isinstance(summary, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version}; this program reads version {FORMAT_VERSION}")
    if summary.get("sha256") != sealed(summary)["sha256"]:
        raise CheckpointError(f"{path} was changed after it was written (its SHA-256 differs)")
    return summary


def file_damage(path: Path, facts: dict[str, Any], *, contents: bool) -> str | None:
    """What is wrong with a file of a checkpoint; None when it is as recorded.

    Args:
        facts: the `bytes` and `sha256` that were recorded.
        contents: compare the hash as well.
    """
    try:
        size = path.stat().st_size if path.exists() else None
        if size != facts["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            return f"{path} {found}; the checkpoint recorded {facts['bytes']} bytes"
        if contents and file_hash(path) != facts["sha256"]:
            return f"{path} was changed after it was written (SHA-256 differs)"
    except OSError as error:
        return f"{path} cannot be read: {error}"
    return None


def _raise(damage: str | None) -> None:
    if damage is not None:
        raise CheckpointError(damage)


def _overlap(first: int, count: int, other_first: int, other_count: int) -> tuple[slice, slice]:
    """Where two ranges overlap, as slices of the one and of the other."""
    start, stop = max(first, other_first), min(first + count, other_first + other_count)
    return slice(start - first, stop - first), slice(start - other_first, stop - other_first)


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
    if reader.summary.get("weights_only"):
        raise CheckpointError(
            f"{reader.folder} holds weights alone, there is nothing to resume: start a run from it with "
            f"train.init_from={reader.folder}"
        )
    steps = reader.summary["optimizer_steps"]
    optimizer.set_steps_taken(steps, reader.summary.get("backbone_optimizer_steps", steps))
    for fragment in optimizer.fragments():
        shape, partition = optimizer.local_shape(fragment.parameter), partition_of(fragment.parameter)
        for kind, tensor in fragment.tensors.items():
            full = reader.local_tensor(
                f"{kind}/{fragment.name}", shape, partition, topology.tensor_rank, topology.tensor_size
            )
            tensor.copy_(full.flatten()[fragment.start : fragment.start + tensor.numel()])
    optimizer.refresh_parameters()
    if reader.summary["layout"]["world_size"] == dist.get_world_size():
        torch.set_rng_state(reader.rng_state(dist.get_rank()))
    loaded: Memory = []
    for layer, state in zip(optimizer.stage.layers, memory, strict=True):
        if state is None:
            loaded.append(None)
            continue
        fields = state._asdict()
        loaded.append(
            type(state)(
                *(
                    reader.memory_tensor(layer, field, like, lane_range[0], topology.tensor_rank * like.shape[1]).to(
                        like.device
                    )
                    for field, like in fields.items()
                )
            )
        )
    return loaded


def load_weights(reader: CheckpointReader, stage: DecoderStage) -> None:
    """Load the parameters alone, for evaluation."""
    for name, parameter in stage.global_parameters():
        local = reader.local_tensor(
            f"master/{name}", tuple(parameter.shape), partition_of(parameter), stage.tensor_rank, stage.tensor_size
        )
        with torch.no_grad():
            parameter.copy_(local)
