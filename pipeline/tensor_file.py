"""A safetensors file written one tensor at a time: `safetensors.save_file` wants all of them in memory at once."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class TensorFile:
    """Writes the tensors whose shapes are given, in that order.

    Args:
        path: the file; it is whole only after `close`.
        shapes: of all tensors, by name.
        dtype: of all tensors; what is written must have it.
        metadata: strings for the header.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype = torch.float32,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.dtype = path, dtype
        self._left = dict(shapes)
        self._hash = hashlib.sha256()
        self._bytes = 0
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)
        self._file = open(path, "wb")  # noqa: SIM115 (closed by `close`)
        self._write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor.

        Raises:
            OSError: the disk would not have it.
        """
        expected = next(iter(self._left), None)
        assert name == expected and tuple(tensor.shape) == self._left.pop(name) and tensor.dtype == self.dtype, name
        # Viewed as bytes: numpy has no bfloat16.
        self._write(memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))

    def close(self) -> dict[str, Any]:
        """Finish the file; its `bytes` and `sha256`."""
        assert not self._left, f"not written: {list(self._left)}"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._bytes += len(data)
