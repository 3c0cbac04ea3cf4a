"""Sharded checkpoints that any layout can read.

A checkpoint is a folder `step_00000100` with, for every process, `rank_00000.safetensors` (the tensors it owns) and
`rank_00000.json` (what they are), and `checkpoint.json`, which is written last and lists every file with its size and
SHA-256. Nothing in it is pickled. The folder is written under a temporary name and renamed when it is whole; `latest`
is moved after that.

Each process writes its own ZeRO fragment of the float32 parameters and Adam's moments, and the memory of its own
lanes and heads. A tensor is described by where it belongs in the whole model (name, range, partition over
tensor-parallel ranks; layer, lanes, heads), so a reader on another layout puts the parts together one tensor at a time,
and reads of each file only what it needs. The folder may lie in a store.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import msgspec
import torch
from torch import Tensor

from data.files import Place, StorePath, convert, decode_json
from model.sharding import Partition, full_shape
from pipeline.accounting.flops import parameter_count
from pipeline.checkpoint.folder import (
    SUMMARY,
    CheckpointError,
    checkpoint_errors,
    file_damage,
    raise_damage,
    read_index,
    read_summary,
)
from pipeline.checkpoint.parts import StoredMemory, StoredParameter, overlaps, stored_memory, stored_parameter
from pipeline.checkpoint.schema import MemoryEntry, ParameterEntry, Part, Summary
from pipeline.checkpoint.tensor_reader import TensorReader
from pipeline.config.load import ConfigError, stored_config
from pipeline.config.schema import Config
from pipeline.config.validate import validate

OPEN_FILES = 32
"""That a reader keeps open: a parameter's parts stand in few files, and the next one's in the same."""


class CheckpointReader:
    """Reads a checkpoint from any layout.

    Args:
        summary: what its `checkpoint.json` says, where that has been read.
        indices: contents of its `rank_*.json` by name, where other processes have read some of them. The sizes of the
            other files are left to `verify` then.

    Raises:
        CheckpointError: a file is missing, has another size than recorded, or cannot be read; the parts of a tensor do
            not make a whole.
    """

    def __init__(
        self, folder: Place, *, summary: Summary | None = None, indices: Mapping[str, bytes] | None = None
    ) -> None:
        self.folder = folder
        self.summary = summary or read_summary(folder)
        self.lanes: dict[str, Any] = {}
        """As `LaneLoader.load_state_dict` takes them."""
        self.bytes_read = 0
        """Of tensors."""
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        self._files: OrderedDict[str, TensorReader] = OrderedDict()
        self._dtypes: dict[str, tuple[str, str]] = {}
        parameters: dict[str, list[tuple[str, ParameterEntry]]] = {}
        memories: dict[str, list[tuple[str, MemoryEntry]]] = {}
        lane_files: dict[str, str] = {}
        for name, facts in self.summary.files.items():
            if name.endswith(".json"):
                contents = read_index(folder, name, facts) if indices is None else indices[name]
                self._sort_part(name, contents, parameters, memories, lane_files)
            elif indices is None:
                raise_damage(file_damage(folder, name, facts, contents=False))
        try:
            self._parameters = {key: stored_parameter(key, entries) for key, entries in parameters.items()}
            self._memories = {key: stored_memory(key, entries) for key, entries in memories.items()}
            self._check_lanes()
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from error

    def _sort_part(self, name: str, contents: bytes, parameters, memories, lane_files: dict[str, str]) -> None:
        """Sort what one index says into what is known of each tensor and lane."""
        path = self.folder / name
        with checkpoint_errors():
            part = decode_json(contents, Part, str(path))
        for lane, cursor in part.lanes.items():
            if lane in lane_files:
                raise CheckpointError(f"{path}: lanes has {lane}, which is in {lane_files[lane]} too")
            lane_files[lane], self.lanes[lane] = name, msgspec.to_builtins(cursor)
        file = name.removesuffix(".json") + ".safetensors"
        shapes = self._shapes.setdefault(file, {})
        for number, fields in enumerate(part.tensors):
            of_memory = str(fields.get("key", "")).startswith("memory/")
            with checkpoint_errors():
                entry = convert(fields, MemoryEntry if of_memory else ParameterEntry, f"{path}: tensors[{number}]")
            if entry.key in shapes:
                raise CheckpointError(f"{path}: {entry.key} stands in it twice")
            shapes[entry.key] = tuple(entry.shape) if of_memory else (entry.count,)
            (memories if of_memory else parameters).setdefault(entry.key, []).append((file, entry))

    def _check_lanes(self) -> None:
        lanes = sorted(map(int, self.lanes))
        if lanes != list(range(len(lanes))):
            missing = next(number for number in range(len(lanes)) if str(number) not in self.lanes)
            raise ValueError(f"the cursor of lane {missing} is in no file")
        for memory in self._memories.values():
            if lanes and memory.shape[0] != len(lanes):
                raise ValueError(f"{memory.key} has {memory.shape[0]} lanes, but there are {len(lanes)} cursors")

    @cached_property
    def config(self) -> Config:
        """The configuration of the run that wrote it; its numbers are in range and fit together.

        Raises:
            CheckpointError: it is none.
        """
        where = f"{self.folder / SUMMARY}: config"
        try:
            config = stored_config(self.summary.config, [], where)
            validate(config, data_exists=False, file=where)
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
        return config

    def check_model(self) -> None:
        """Hold the configuration against the parameters in the files, before a model of that size is built.

        Raises:
            CheckpointError: they are of different models.
        """
        told = parameter_count(self.config.model, self.summary.vocab_size)["total"]
        held = sum(math.prod(p.shape) for key, p in self._parameters.items() if key.startswith("master/"))
        if told != held:
            raise CheckpointError(
                f"{self.folder}: its configuration describes a model of {told:,} parameters, its files hold {held:,}"
            )

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compare every file (every `parts`-th, from `part` on) with its recorded SHA-256 and with its index.

        Of a store, which holds its objects against sums of its own, sizes and headers: to hash a file is to fetch it
        whole, and a process wants few slices of it. `infini inspect` does it.

        Raises:
            CheckpointError: names the first file that differs.
        """
        on_disk = not isinstance(self.folder, StorePath)
        for name in sorted(self.summary.files)[part::parts]:
            raise_damage(file_damage(self.folder, name, self.summary.files[name], contents=on_disk))
            if name in self._shapes:
                self._file(name)

    def check_headers(self) -> None:
        """Compare what the files of tensors say that they hold with their indices, without reading it.

        Raises:
            CheckpointError: names the first file that differs.
        """
        for name in self._shapes:
            self._file(name)

    def keys(self) -> list[str]:
        """Names of all tensors but the random states: `master/...`, `exp_avg/...`, `memory/<layer>/<field>`."""
        return [*self._parameters, *self._memories]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return self._memories[key].shape if key in self._memories else self._parameter(key).shape

    def whole_tensor(self, key: str) -> Tensor:
        """A parameter-like tensor, put together from all processes' parts.

        Raises:
            CheckpointError: it is not there.
        """
        stored = self._parameter(key)
        return self.local_tensor(key, stored.shape, stored.partition, 0, 1)

    def whole_memory(self, key: str) -> Tensor:
        """The carried memory of all lanes and heads.

        Raises:
            CheckpointError: it is not there.
        """
        stored = self._memory(key)
        self._check_files({part.file for part in stored.parts})
        return self.memory_tensor(stored.key, torch.empty(stored.shape), 0, 0)

    def local_tensor(self, key: str, shape: tuple[int, ...], partition: Partition, rank: int, size: int) -> Tensor:
        """The part of a parameter-like tensor that tensor-parallel rank `rank` of `size` holds.

        Raises:
            CheckpointError: the tensor is missing or of another shape.
        """
        return self.local_range(key, shape, partition, rank, size, 0, math.prod(shape)).view(shape)

    def local_range(
        self,
        key: str,
        shape: tuple[int, ...],
        partition: Partition,
        rank: int,
        size: int,
        start: int,
        stop: int,
        *,
        rows: int | None = None,
    ) -> Tensor:
        """Elements [start, stop) of the flattened part that `rank` of `size` holds, from the files that have them.

        Not to be written to: it may be the file itself.

        Args:
            shape: of the part.
            rows: of the whole tensor only so many matter, the others (padding) are 0 here and may be missing there.

        Raises:
            CheckpointError: the tensor is missing or of another shape.
        """
        stored, wanted = self._parameter(key), full_shape(shape, partition, size)
        there = stored.shape
        fits = there == wanted if rows is None else there[1:] == wanted[1:] and rows <= min(there[0], wanted[0])
        if not fits or (max(size, stored.size) > 1 and stored.partition != partition):
            raise CheckpointError(f"{self.folder}: {key} has shape {there}; the model's has {wanted}")
        dim = partition.dim
        if there == wanted and (dim is None or stored.size == size):
            return self._flat(stored, 0 if dim is None else rank, start, stop)
        dim = 0 if dim is None else dim
        inner, outer, width = math.prod(shape[dim + 1 :]), math.prod(shape[:dim]), math.prod(shape[dim:])
        result: Tensor | None = None
        first, last = (0, 1) if outer == 1 else (start // width, -(-stop // width))
        low, high = (start, stop) if outer == 1 else (0, width)
        for source in range(stored.size):
            pieces = overlaps(stored, source, wanted, rank, size, rows)
            from_width = math.prod(stored.local_shape[dim:])
            block: Tensor | None = None
            for target, begin, count in pieces:
                # In elements of one of the `outer` rows, and of those only what was asked for.
                a, b = max(target * inner, low), min((target + count) * inner, high)
                if a >= b:
                    continue
                begin = begin * inner + a - target * inner
                if outer == 1:
                    piece = self._flat(stored, source, begin, begin + b - a).view(1, -1)
                else:
                    if block is None:
                        block = self._flat(stored, source, first * from_width, last * from_width).view(-1, from_width)
                    piece = block[:, begin : begin + b - a]
                if result is None:
                    result = piece.new_zeros(last - first, high - low)
                result[:, a - low : b - low] = piece
        if result is None:
            return torch.zeros(stop - start)
        return result.flatten()[start - first * width - low : stop - first * width - low]

    def _flat(self, stored: StoredParameter, rank: int, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of what a tensor-parallel rank had, flattened, from its ZeRO fragments."""
        parts = [
            self._read(file, stored.key, slice(max(start, first) - first, min(stop, last) - first))
            for first, last, file in stored.fragments[rank]
            if first < stop and last > start
        ]
        if not parts:
            return torch.zeros(0)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def memory_tensor(self, key: str, like: Tensor, first_lane: int, first_head: int) -> Tensor:
        """The carried memory of some lanes and heads; `like` gives their number (dims 0 and 1) and the precision.

        Raises:
            CheckpointError: lanes or heads are not all there.
        """
        stored = self._memory(key)
        if stored.shape[2:] != tuple(like.shape[2:]):
            raise CheckpointError(f"{self.folder}: {stored.key} has shape {stored.shape}, expected {tuple(like.shape)}")
        last_lane, last_head = first_lane + like.shape[0], first_head + like.shape[1]
        if last_lane > stored.shape[0] or last_head > stored.shape[1]:
            raise CheckpointError(
                f"{self.folder}: {stored.key} does not hold lanes {first_lane} to {last_lane - 1}, heads {first_head} "
                f"to {last_head - 1}; was the run's train.lanes changed?"
            )
        result = torch.empty(like.shape, dtype=like.dtype)
        for part in stored.parts:
            target_lanes, source_lanes = _overlap(first_lane, like.shape[0], part.first_lane, part.lanes)
            target_heads, source_heads = _overlap(first_head, like.shape[1], part.first_head, part.heads)
            if target_lanes.stop > target_lanes.start and target_heads.stop > target_heads.start:
                result[target_lanes, target_heads] = self._read(part.file, stored.key, source_lanes, source_heads)
        return result

    def rng_state(self, rank: int) -> Tensor:
        """The random state of a process.

        Raises:
            CheckpointError: it is not there.
        """
        file = f"rank_{rank:05d}.safetensors"
        if file not in self._shapes or self._file(file).dtypes.get("rng") != "U8":
            raise CheckpointError(f"{self.folder}: there is no random state of rank {rank}")
        return self._read(file, "rng").clone()

    def _parameter(self, key: str) -> StoredParameter:
        if key not in self._parameters:
            raise CheckpointError(f"{self.folder} holds no tensor {key}")
        return self._parameters[key]

    def _memory(self, key: str) -> StoredMemory:
        if key not in self._memories:
            raise CheckpointError(f"{self.folder} holds no tensor {key}")
        return self._memories[key]

    def _check_files(self, names: set[str]) -> None:
        """Open files, so that their shapes are known to be true before anything of that size is made."""
        for name in names:
            self._file(name)

    def _file(self, name: str) -> TensorReader:
        """An open file whose header is what its index says."""
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        with checkpoint_errors():
            file = TensorReader(self.folder / name)
            file.check(self._shapes[name], beside=("rng",))
        for key in self._shapes[name]:
            known, first = self._dtypes.setdefault(key, (file.dtypes[key], name))
            if known != file.dtypes[key]:
                raise CheckpointError(f"{file.path}: {key} is of {file.dtypes[key]}, but of {known} in {first}")
        self._files[name] = file
        if len(self._files) > OPEN_FILES:
            self._files.popitem(last=False)
        return file

    def _read(self, name: str, key: str, *ranges: slice) -> Tensor:
        file = self._file(name)
        with checkpoint_errors():
            part = file.read(key, *ranges)
        self.bytes_read += part.numel() * part.element_size()
        return part


def _overlap(first: int, count: int, other_first: int, other_count: int) -> tuple[slice, slice]:
    """Where two ranges overlap, as slices of the one and of the other."""
    start, stop = max(first, other_first), min(first + count, other_first + other_count)
    return slice(start - first, stop - first), slice(start - other_first, stop - other_first)
