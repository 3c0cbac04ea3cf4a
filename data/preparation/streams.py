"""Bytes of a source's file on their way in: regular files only, hashed, decompressed, bounded, and decoded.

A source may be hostile: endless, a bomb in a small .gz, a device under a harmless name. Nothing here holds more than
the bound of a document, and a window of zstd, which has at most 2 GiB.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import zstandard

from data.files import FileError, file_name, open_regular, shown, some

COMPRESSED_SUFFIXES = (".gz", ".zst")

BOM = b"\xef\xbb\xbf"
_WINDOW_BYTES = 1 << 31
"""zstd's largest (`--long=31`). Its own default limit, 128 MiB, is less than published corpora are written with."""
_FEED_BYTES = 512
"""Compressed bytes given to zstd at once: its most extreme ratio, 32,768, makes 16 MiB of them."""
_BUFFER_BYTES = 1 << 16
_NAMES_SHOWN = 10
_LOOKED_AT_BYTES = 8000
"""Where a text shows that it is none; as git decides what is binary."""

# First bytes of what stands under a text's name by mistake; UTF-32's mark begins with UTF-16's.
_SIGNATURES = {
    b"\xff\xfe\0\0": "UTF-32 (by its first bytes)",
    b"\0\0\xfe\xff": "UTF-32 (by its first bytes)",
    b"\xff\xfe": "UTF-16 (by its first bytes)",
    b"\xfe\xff": "UTF-16 (by its first bytes)",
    b"\x1f\x8b": "gzip (its name should end in .gz)",
    b"\x28\xb5\x2f\xfd": "zstd (its name should end in .zst)",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "parquet (its name should end in .parquet)",
    b"%PDF-": "a PDF",
}


@dataclass(frozen=True)
class FileInput:
    """A file of a source as it was found, before anything is read."""

    name: str
    """In documents' names: UTF-8, relative to the source, with / between folders."""
    path: Path
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, name: str, path: Path, status: os.stat_result | None = None) -> FileInput:
        """Raises: OSError where there is no such file."""
        found = status or path.stat()
        return cls(name, path, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    @property
    def shown(self) -> str:
        return file_name(self.path)


@dataclass(frozen=True)
class Record:
    number: int
    """Line, element or row, counted from 1."""
    input_bytes: int
    """Bytes of the file used up for it."""
    text: str
    error: str | None = None
    """Why there is no text."""


def too_long(where: str, limit: int) -> str:
    """The message for a document above the bound."""
    return f"{where} has more than {limit:,} bytes, the most that one document may have (see --max-document-bytes)"


def listed(names: Iterable[str]) -> str:
    """Columns for a message."""
    return some((shown(name, 40) for name in names), _NAMES_SHOWN)


class NotUTF8Error(FileError):
    """A file is no text in UTF-8. `sha256` is the file's, where it is known."""

    sha256 = ""


class HashingReader(io.RawIOBase):
    """A file of a source, from its beginning to its end; hashes what passes.

    Raises:
        FileError: it is no regular file, or has been written to since it was found.
        OSError: it cannot be opened.
    """

    def __init__(self, file: FileInput) -> None:
        self._input = file
        self._file = open_regular(file.path)
        self._sha256 = hashlib.sha256()
        self.position = 0
        self._check_unchanged()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self._file.readinto(buffer)
        self._sha256.update(memoryview(buffer)[:count])
        self.position += count
        return count

    @cached_property
    def contents(self) -> io.BufferedReader:
        """What is in the file, decompressed when its name says that it is compressed.

        Reading raises OSError where the compressed data are damaged or end early.
        """
        # Kept here: a stream that is collected closes what it reads from.
        name = self._input.path.name.lower()
        raw = _Gzip(self) if name.endswith(".gz") else _Zstd(self) if name.endswith(".zst") else self
        return io.BufferedReader(raw, _BUFFER_BYTES)

    def finish(self) -> str:
        """The sha256 of the whole file, whatever of it has been asked for.

        Raises:
            FileError: it was written to meanwhile.
        """
        buffer = memoryview(bytearray(1 << 20))
        while self.readinto(buffer):
            pass
        self._check_unchanged()
        return self._sha256.hexdigest()

    def close(self) -> None:
        self._file.close()
        super().close()

    def _check_unchanged(self) -> None:
        now = os.fstat(self._file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self._input.size, self._input.mtime_ns):
            raise FileError(f"{self._input.shown} was written to while the set was prepared")


def hash_file(file: FileInput) -> str:
    """The sha256 of a file.

    Raises:
        FileError, OSError: as `HashingReader`.
    """
    with HashingReader(file) as reader:
        return reader.finish()


class _Gzip(io.RawIOBase):
    """Arrow's decompressor: one member after another; an input that ends early is an error."""

    def __init__(self, reader: HashingReader) -> None:
        self._stream = pa.CompressedInputStream(pa.PythonFile(reader, mode="r"), "gzip")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            data = self._stream.read(len(buffer))
        except pa.ArrowException as error:
            raise OSError(str(error)) from error
        buffer[: len(data)] = data
        return len(data)


class _Zstd(io.RawIOBase):
    """Frames one after another, with windows of any size that zstd writes; one that ends early is an error.

    (Arrow's stream has no setting for the window, and zstandard's reader takes an early end for the end.)
    """

    def __init__(self, reader: HashingReader) -> None:
        self._reader = reader
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._compressed = memoryview(b"")
        self._out = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._out:
            if not self._compressed:
                self._compressed = memoryview(self._reader.read(_BUFFER_BYTES))
            fed = self._compressed[:_FEED_BYTES]
            if not fed:
                if self._frame is not None:
                    raise OSError("it ends inside a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._out = memoryview(self._frame.decompress(fed))
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            used = len(fed)
            if self._frame.eof:
                used -= len(self._frame.unused_data)
                self._frame = None
            self._compressed = self._compressed[used:]
        count = min(len(buffer), len(self._out))
        buffer[:count] = self._out[:count]
        self._out = self._out[count:]
        return count


def lines(stream: io.BufferedReader, limit: int) -> Iterator[bytes | None]:
    """The lines of a stream with their ends; None in place of one of more than `limit` bytes.

    Raises:
        OSError: the stream is damaged.
    """
    while line := stream.readline(limit + 1):
        if len(line) <= limit:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(_BUFFER_BYTES)
        yield None


def read_text(file: FileInput, limit: int) -> tuple[str, str]:
    """A text file, compressed or not, without its byte order mark; and the file's sha256.

    Raises:
        NotUTF8Error: it is no text in UTF-8.
        FileError: it is no regular file, longer than `limit` bytes of text, or damaged.
        OSError: it cannot be opened.
    """
    with HashingReader(file) as reader:
        try:
            contents = reader.contents.read(limit + 1)
        except OSError as error:
            raise FileError(f"{file.shown} is damaged: {error}") from error
        if len(contents) > limit:
            raise FileError(too_long(file.shown, limit))
        sha256 = reader.finish()
    try:
        return decode(contents, file.shown), sha256
    except NotUTF8Error as error:
        error.sha256 = sha256
        raise


def decode(contents: bytes, where: str) -> str:
    """UTF-8 without its byte order mark. Line ends stay as they are.

    Raises:
        NotUTF8Error: it is something else, which the message names where it can be told.
    """
    refuse_other_contents(contents, where)
    try:
        return contents.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start + len(BOM) * contents.startswith(BOM)
        raise NotUTF8Error(f"{where} is not UTF-8 text: byte {at} is {contents[at]:#04x}") from None


def refuse_other_contents(start: bytes, where: str) -> None:
    """Raises: NotUTF8Error where a file's first bytes are those of no text in UTF-8."""
    for signature, kind in _SIGNATURES.items():
        if start.startswith(signature):
            raise NotUTF8Error(f"{where} is {kind}, not UTF-8 text")
    nul = start.find(b"\0", 0, _LOOKED_AT_BYTES)
    if nul >= 0:
        raise NotUTF8Error(f"{where} is not UTF-8 text: byte {nul} is 0x00, as in binary data and in UTF-16")
