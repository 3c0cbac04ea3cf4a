"""A safetensors file in an object store, of which ranges are fetched: what `safetensors.safe_open` is for the disk."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from data.files import FileError, StorePath, convert, decode_json
from pipeline.checkpoint.tensor_file import TYPES

_HEADER_LIMIT = 100_000_000
"""Bytes of the longest header, as in the library."""
_FIRST_BYTES = 64 << 10
"""Asked for at first: most headers are shorter, and then one request brings them."""
_DTYPES = {name: dtype for dtype, name in TYPES.items()}


class _Place(msgspec.Struct):
    """Of a tensor, as the header gives it."""

    dtype: str
    shape: Annotated[list[Annotated[int, Meta(ge=0, le=1 << 60)]], Meta(max_length=64)]
    data_offsets: tuple[Annotated[int, Meta(ge=0, le=1 << 60)], Annotated[int, Meta(ge=0, le=1 << 60)]]


class StoreTensors:
    """A file of tensors; its header is read and checked, the tensors are fetched as they are asked for.

    Raises:
        FileNotFoundError, StoreError: as `StorePath.size` and `StorePath.read`.
        FileError: it is no safetensors file.
    """

    def __init__(self, path: StorePath) -> None:
        self._path = path
        size = path.size()
        start = path.read(0, min(size, _FIRST_BYTES))
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise FileError(f"{path} is damaged or holds no tensors (safetensors): its header does not fit in it")
        self._first = 8 + length
        header = (start + path.read(len(start), max(self._first, len(start))))[8 : self._first]
        content = decode_json(header, dict[str, Any], f"{path}: its header")
        self._metadata = convert(content.pop("__metadata__", {}), dict[str, str], f"{path}: __metadata__")
        self._places = convert(content, dict[str, _Place], f"{path}: its header")
        end = 0
        for name, place in sorted(self._places.items(), key=lambda item: item[1].data_offsets):
            begin, stop = place.data_offsets
            if place.dtype not in _DTYPES:
                raise FileError(f"{path}: {name} is of {place.dtype}, which is not read")
            if begin != end or stop - begin != math.prod(place.shape) * _DTYPES[place.dtype].itemsize:
                raise FileError(f"{path}: {name} does not lie where its shape and the tensors before it leave it")
            end = stop
        if self._first + end != size:
            raise FileError(f"{path} has {size:,} bytes, its header describes {self._first + end:,}")

    def keys(self) -> list[str]:
        return list(self._places)

    def metadata(self) -> dict[str, str]:
        return self._metadata

    def get_slice(self, name: str) -> StoreSlice:
        place = self._places[name]
        return StoreSlice(self._path, self._first + place.data_offsets[0], _DTYPES[place.dtype], place.shape)

    def get_tensor(self, name: str) -> Tensor:
        return self.get_slice(name)[()]


class StoreSlice:
    """A tensor that ranges are taken from."""

    def __init__(self, path: StorePath, start: int, dtype: torch.dtype, shape: Sequence[int]) -> None:
        self._path, self._start, self._dtype, self._shape = path, start, dtype, list(shape)

    def get_shape(self) -> list[int]:
        return self._shape

    def get_dtype(self) -> str:
        return TYPES[self._dtype]

    def __getitem__(self, ranges: tuple[slice, ...]) -> Tensor:
        """The part in a range along each of the first dims: no byte beside it is fetched."""
        bounds = [
            taken.indices(length)[:2]
            for taken, length in itertools.zip_longest(ranges, self._shape, fillvalue=slice(None))
        ]
        shape = [max(stop - start, 0) for start, stop in bounds]
        result = torch.empty(shape, dtype=self._dtype)
        if result.numel():
            target = memoryview(result.view(-1).view(torch.uint8).numpy())
            for offset, count, at in self._runs(bounds):
                width = self._dtype.itemsize
                self._path.read_into(target[at * width : (at + count) * width], self._start + offset * width)
        return result

    def _runs(self, bounds: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
        """Elements that lie one behind the other: where in the tensor, how many, where in the part."""
        # Behind the last dim of which not all is wanted everything is; before it every index is a run of its own.
        cut = [dim for dim, bound in enumerate(bounds) if bound != (0, self._shape[dim])]
        last = cut[-1] if cut else 0
        inner = math.prod(self._shape[last + 1 :])
        strides = [math.prod(self._shape[dim + 1 :]) for dim in range(len(self._shape))]
        first, stop = bounds[last] if bounds else (0, 1)
        count = (stop - first) * inner
        for number, outer in enumerate(itertools.product(*(range(*bound) for bound in bounds[:last]))):
            yield sum(map(math.prod, zip(outer, strides))) + first * inner, count, number * count  # noqa: B905 - outer is shorter
