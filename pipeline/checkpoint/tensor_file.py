"""Writing safetensors files: one tensor at a time, hashed on the way, with the modes of any other file.

`safetensors.save_file` wants all tensors in memory at once, makes files that their owner alone can read, and leaves the
hash to a second pass.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from data.files import writing

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
"""Names of types in a file's header."""


class TensorFile:
    """Writes the tensors whose shapes are given, in that order.

    Args:
        file: to write to, see `data.files.writing`.
        shapes: of all tensors, by name.
        dtype: of all tensors, or of each; what is written must have it.
        metadata: strings for the header.
    """

    def __init__(
        self,
        file: BinaryIO,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype | Mapping[str, torch.dtype] = torch.float32,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._dtypes = dict.fromkeys(shapes, dtype) if isinstance(dtype, torch.dtype) else dtype
        self._left = dict(shapes)
        self._hash = hashlib.sha256()
        self._bytes = 0
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + math.prod(shape) * self._dtypes[name].itemsize
            header[name] = {"dtype": TYPES[self._dtypes[name]], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)
        self._file = file
        self._write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor.

        Raises:
            OSError: the disk would not have it.
        """
        expected = next(iter(self._left), None)
        assert name == expected and tuple(tensor.shape) == self._left.pop(name), name
        assert tensor.dtype == self._dtypes[name], name
        self._write(tensor_bytes(tensor))

    def facts(self) -> dict[str, Any]:
        """`bytes` and `sha256` of the file, when all is written."""
        assert not self._left, f"not written: {list(self._left)}"
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._bytes += len(data)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """What a tensor is in a file."""
    # Viewed as bytes: numpy has no bfloat16.
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write a whole file of tensors of any kinds; its `bytes` and `sha256`.

    Raises:
        OSError: the disk would not have it.
    """
    # The widest numbers first, so that each stands at a multiple of its width; no gaps are allowed in between.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    with writing(path) as out:
        shapes, dtypes = ({name: getattr(tensors[name], of) for name in names} for of in ("shape", "dtype"))
        file = TensorFile(out, {name: tuple(shape) for name, shape in shapes.items()}, dtypes, metadata)
        for name in names:
            file.write(name, tensors[name])
        return file.facts()
