"""What a GGUF file (llama.cpp's format) says before its tensors' bytes: settings, and where each tensor is.

Every count in it is somebody's word. It is held against what the file can hold, and against bounds far beyond any
model, before anything is made of that size; libraries believe it.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import FileError, open_regular, shown

MOST_SETTINGS = 1 << 16
MOST_TENSORS = 1 << 16
MOST_ITEMS = 1 << 22
"""Of all lists together: a vocabulary of 256K tokens has 1.3 million tokens, scores, types and merges."""
MOST_NAME_BYTES = 1 << 10
MOST_TEXT_BYTES = 16 << 20
MOST_ELEMENTS = 1 << 40
"""Of one tensor."""

_VERSIONS = (2, 3)
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    """As torch counts: the last dimension is contiguous."""
    kind: str
    """Of its numbers, such as F32 or Q8_0."""
    start: int
    """First byte, from the beginning of the file."""
    bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Settings and tensors."""

    settings: dict[str, Any]
    """Numbers, texts and lists of them, by key."""
    tensors: list[GgufTensor]


def read_header(path: Path) -> GgufHeader:
    """Read and check everything but the tensors' bytes.

    Raises:
        FileError: it is damaged, cut short or beyond a bound; names the file and the setting or the tensor.
        OSError: it cannot be read.
        ImportError: the package `gguf` is missing (extra `hf`), which knows the kinds of numbers.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        if size < 24:
            raise FileError(f"{path} is not a GGUF file: it has {size} bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
            return _Reader(path, contents).header()


class _Reader:
    def __init__(self, path: Path, contents: mmap.mmap) -> None:
        self.path, self.contents, self.size = path, contents, len(contents)
        self.at = 0
        self.what = "its head"
        self.items = 0
        """Of arrays, so far."""

    def header(self) -> GgufHeader:
        if self.take(4) != b"GGUF":
            raise FileError(f"{self.path} is not a GGUF file: it does not begin with GGUF")
        version = self.number("<I")
        if version not in _VERSIONS:
            raise FileError(
                f"{self.path} is a GGUF file of version {version} (or of the other byte order); readable are "
                f"{' and '.join(map(str, _VERSIONS))}"
            )
        tensors = self.count("its number of tensors", MOST_TENSORS)
        settings: dict[str, Any] = {}
        for _ in range(self.count("its number of settings", MOST_SETTINGS)):
            self.what = "a setting's name"
            key = self.text(MOST_NAME_BYTES)
            if key in settings:
                raise FileError(f"{self.path} is damaged: the setting {shown(key)} stands twice")
            self.what = f"the setting {shown(key)}"
            settings[key] = self.value(self.number("<I"))
        entries = [self.tensor() for _ in range(tensors)]
        alignment = settings.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise FileError(f"{self.path}: general.alignment = {shown(alignment)} is no power of two")
        start = -(-self.at // alignment) * alignment
        names: set[str] = set()
        placed = []
        for name, shape, kind, size, offset in entries:
            if name in names:
                raise FileError(f"{self.path} is damaged: the tensor {shown(name)} stands twice")
            names.add(name)
            if start + offset + size > self.size:
                raise FileError(f"{self.path} is damaged or cut short: {shown(name)} ends past its {self.size:,} bytes")
            placed.append(GgufTensor(name, shape, kind, start + offset, size))
        return GgufHeader(settings, placed)

    def tensor(self) -> tuple[str, tuple[int, ...], str, int, int]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        self.what = "a tensor's name"
        name = self.text(MOST_NAME_BYTES)
        self.what = f"the tensor {shown(name)}"
        dims = self.number("<I")
        if not 1 <= dims <= 4:
            raise FileError(f"{self.path}: {self.what} has {dims} dimensions; valid are 1 to 4")
        shape = tuple(self.number("<Q") for _ in range(dims))[::-1]
        elements = math.prod(shape)
        if not 0 < elements <= MOST_ELEMENTS:
            raise FileError(f"{self.path}: {self.what} has {shown(elements)} numbers; valid are 1 to {MOST_ELEMENTS:,}")
        number, offset = self.number("<I"), self.number("<Q")
        try:
            kind = GGMLQuantizationType(number)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise FileError(f"{self.path}: {self.what} has numbers of the unknown type {number}") from None
        if shape[-1] % block:
            raise FileError(f"{self.path}: {self.what} has rows of {shape[-1]} numbers; {kind.name} needs {block}s")
        return name, shape, kind.name, elements // block * block_bytes, offset

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            return self.text(MOST_TEXT_BYTES)
        if kind != _ARRAY:
            raise FileError(f"{self.path}: {self.what} is of the unknown type {kind}")
        item = self.number("<I")
        if item not in _SCALARS and item != _TEXT:
            raise FileError(f"{self.path}: {self.what} is a list of the type {item}, which is not read")
        count = self.number("<Q")
        self.items += count
        least = 8 if item == _TEXT else struct.calcsize(_SCALARS[item])
        if self.items > MOST_ITEMS or count * least > self.size - self.at:
            raise FileError(
                f"{self.path}: {self.what} says that it has {count:,} items; a file of {self.size:,} bytes has fewer, "
                f"and at most {MOST_ITEMS:,} in all lists are read"
            )
        if item == _TEXT:
            return [self.text(MOST_TEXT_BYTES, errors="replace") for _ in range(count)]
        return list(struct.unpack(f"<{count}{_SCALARS[item][1]}", self.take(count * least)))

    def count(self, what: str, most: int) -> int:
        self.what = what
        count = self.number("<Q")
        if count > most:
            raise FileError(f"{self.path}: {what} is {count:,}; at most {most:,} are read")
        return count

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, most: int, errors: str = "strict") -> str:
        length = self.number("<Q")
        if length > most:
            raise FileError(f"{self.path}: {self.what} has {length:,} bytes; at most {most:,} are read")
        try:
            return self.take(length).decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise FileError(f"{self.path}: {self.what} is not text in UTF-8: {error.reason}") from None

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise FileError(f"{self.path} is damaged or cut short: it ends in {self.what}")
        taken = self.contents[self.at : self.at + count]
        self.at += count
        return taken
