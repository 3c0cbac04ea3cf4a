"""How the parts of a checkpoint make whole tensors: pure arithmetic, checked before anything is read.

The parts of a tensor must tile it: every element stands in exactly one of them. A parameter is split over
tensor-parallel ranks (`model.sharding`), each rank's part, flattened, into ranges; a memory by lanes and heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from model.sharding import Partition, full_shape, piece_bounds
from pipeline.checkpoint.schema import MemoryEntry, ParameterEntry


class Fragment(NamedTuple):
    """A range of a flattened tensor, and the file that holds it."""

    start: int
    stop: int
    file: str


@dataclass(frozen=True)
class StoredParameter:
    """A parameter, or one of its moments."""

    key: str
    local_shape: tuple[int, ...]
    partition: Partition
    fragments: list[list[Fragment]]
    """Of every tensor-parallel rank, in order."""

    @property
    def size(self) -> int:
        """Tensor-parallel ranks that it is split over."""
        return len(self.fragments)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return full_shape(self.local_shape, self.partition, self.size)


class MemoryPart(NamedTuple):
    """Some lanes and heads, and the file that holds them."""

    first_lane: int
    first_head: int
    lanes: int
    heads: int
    file: str


@dataclass(frozen=True)
class StoredMemory:
    """What all lanes carry in one tensor of one layer."""

    key: str
    shape: tuple[int, ...]
    """`[lanes, heads, ...]`."""
    parts: list[MemoryPart]


def stored_parameter(key: str, entries: Sequence[tuple[str, ParameterEntry]]) -> StoredParameter:
    """Put together what (file, entry) say of a parameter.

    Raises:
        ValueError: they contradict each other, or do not tile it.
    """
    first_file, first = entries[0]
    for file, entry in entries:
        for name in ("local_shape", "partition_dim", "partition_stride", "tensor_size"):
            ours, theirs = getattr(entry, name), getattr(first, name)
            if ours != theirs:
                raise ValueError(f"{key}: {name} is {ours} in {file} and {theirs} in {first_file}")
        if entry.tensor_rank >= entry.tensor_size:
            raise ValueError(f"{file}: {key}: tensor_rank {entry.tensor_rank} of {entry.tensor_size}")
    dim, stride = first.partition_dim, first.partition_stride
    if dim is None and first.tensor_size > 1:
        raise ValueError(
            f"{first_file}: {key}: tensor_size is {first.tensor_size}, but it is not split (partition_dim)"
        )
    if dim is not None and (dim >= len(first.local_shape) or first.local_shape[dim] % stride):
        raise ValueError(
            f"{first_file}: {key}: partition_dim {dim} and partition_stride {stride} do not fit the local_shape "
            f"{first.local_shape}"
        )
    count = math.prod(first.local_shape)
    if len(entries) < first.tensor_size:
        raise ValueError(f"{key} is incomplete: {len(entries)} parts of {first.tensor_size} tensor-parallel ranks")
    fragments: list[list[Fragment]] = [[] for _ in range(first.tensor_size)]
    for file, entry in entries:
        fragments[entry.tensor_rank].append(Fragment(entry.start, entry.start + entry.count, file))
    for rank, ranges in enumerate(fragments):
        where = f"{key} of tensor-parallel rank {rank}" if first.tensor_size > 1 else key
        _check_tiles(sorted(ranges), count, where, "elements")
        fragments[rank] = sorted(fragment for fragment in ranges if fragment.stop > fragment.start)
    return StoredParameter(key, tuple(first.local_shape), Partition(dim, stride), fragments)


def stored_memory(key: str, entries: Sequence[tuple[str, MemoryEntry]]) -> StoredMemory:
    """Put together what (file, entry) say of a memory.

    Raises:
        ValueError: they contradict each other, or do not tile lanes x heads.
    """
    first_file, first = entries[0]
    rows: dict[tuple[int, int], list[Fragment]] = {}
    for file, entry in entries:
        if entry.shape[2:] != first.shape[2:]:
            raise ValueError(f"{key}: shape is {entry.shape} in {file} and {first.shape} in {first_file}")
        lanes = (entry.first_lane, entry.first_lane + entry.shape[0])
        rows.setdefault(lanes, []).append(Fragment(entry.first_head, entry.first_head + entry.shape[1], file))
    lanes = max(stop for _, stop in rows)
    heads = max(fragment.stop for row in rows.values() for fragment in row)
    _check_tiles(sorted(Fragment(*row, rows[row][0].file) for row in rows), lanes, key, "lanes")
    for (start, stop), row in rows.items():
        _check_tiles(sorted(row), heads, f"{key}, lanes {start} to {stop - 1}", "heads")
    parts = [MemoryPart(e.first_lane, e.first_head, e.shape[0], e.shape[1], file) for file, e in entries]
    return StoredMemory(key, (lanes, heads, *first.shape[2:]), parts)


def _check_tiles(ranges: Sequence[Fragment], count: int, where: str, things: str) -> None:
    """Raise unless the sorted ranges follow each other without gap or overlap from 0 to `count`."""
    at, before = 0, ""
    for start, stop, file in ranges:
        if start > at:
            raise ValueError(f"{where} is incomplete: {things} {at} to {start - 1} of {count} are in no file")
        if start < at:
            raise ValueError(f"{where}: {things} {start} to {min(at, stop) - 1} are in {before} and in {file}")
        if stop > start:
            at, before = stop, file
    if at < count:
        raise ValueError(f"{where} is incomplete: {things} {at} to {count - 1} of {count} are in no file")
    if at > count:
        raise ValueError(f"{where}: {things} up to {at - 1} in {before}, but it has {count}")


class Overlap(NamedTuple):
    """What a wanted part shares with a stored one: equal ranges along the dim that both are split along."""

    target: int
    source: int
    count: int


def overlaps(
    stored: StoredParameter, source: int, wanted: Sequence[int], rank: int, size: int, limit: int | None = None
) -> list[Overlap]:
    """Where the part that `rank` of `size` wants of a tensor of shape `wanted` lies in what rank `source` stored.

    Args:
        limit: indices along the dim from here on do not count.
    """
    found, target = [], 0
    for a, b in piece_bounds(wanted, stored.partition, rank, size):
        at = 0
        for c, d in piece_bounds(stored.shape, stored.partition, source, stored.size):
            start, stop = max(a, c), min(b, d) if limit is None else min(b, d, limit)
            if start < stop:
                found.append(Overlap(target + start - a, at + start - c, stop - start))
            at += d - c
        target += b - a
    return found
