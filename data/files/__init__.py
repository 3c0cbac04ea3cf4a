"""Files, read and written so that neither can do harm: the floor that every other module stands on.

Reading. A file that came from somewhere else may be damaged, endless, or made to deceive. `read_bytes` opens regular
files only (a fifo would never answer) and stops at a bound; `read_json` reads against a declared type, so that whoever
gets the value may rely on it; `inside` keeps a name that a file gives inside that file's folder. Whatever is wrong is
a `FileError` that names the file, and the key where there is one.

Writing. `writing` and `making_folder` write under a name beside the target that nobody can predict, opened exclusively,
and rename it when all is on the disk: the old contents or the new ones, never half. Modes follow the umask. Nothing is
removed that was not made here.

Stores. What is read may also lie in an object store (`s3://bucket/set`, see `data.files.store`): `place` makes a path
of such a name, and everything here that reads takes it, as does `write_whole`. All else here writes to the disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

import msgspec

from data.files.messages import FileError, file_name, is_utf8, printable, shown, some
from data.files.ranges import DiskRanges, Ranges, StoreRanges
from data.files.store import StoreError, StorePath, is_store

__all__ = [
    "FileError",
    "Place",
    "Ranges",
    "StoreError",
    "StorePath",
    "convert",
    "decode_json",
    "file_name",
    "inside",
    "is_store",
    "is_there",
    "is_utf8",
    "making_folder",
    "open_ranges",
    "open_regular",
    "place",
    "printable",
    "read_bytes",
    "read_json",
    "read_text",
    "sealed",
    "shown",
    "size_of",
    "sizes_of",
    "some",
    "sync_folder",
    "temporary_name",
    "write_whole",
    "writing",
]

T = TypeVar("T")
Place = Path | StorePath
"""A file or folder of the disk, or of an object store."""

JSON_LIMIT = 256 << 20
"""Bytes of the largest JSON file that is read: a manifest of a million shards has 200 MB."""

_PARTIAL = ".partial"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


# Reading


def place(path: Place | str) -> Place:
    """What a name stands for: `s3://...` and the like an object store, everything else the disk.

    Raises:
        ValueError: it looks like a store's name, and is none.
    """
    if isinstance(path, StorePath):
        return path
    return StorePath(path) if isinstance(path, str) and is_store(path) else Path(path)


def is_there(path: Place) -> bool:
    """Whether there is anything of that name, a link that leads nowhere included."""
    return path.exists() if isinstance(path, StorePath) else os.path.lexists(path)


def size_of(path: Place) -> int:
    """Bytes of a file.

    Raises:
        FileNotFoundError: it does not exist.
        FileError: it is no file.
    """
    if isinstance(path, StorePath):
        return path.size()
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise FileError(f"{path} is {_kind(found.st_mode)}, not a file")
    return found.st_size


def sizes_of(folder: Place, names: Iterable[str], where: str) -> dict[str, int | None]:
    """Bytes of the files called `names` in `folder`, None for those that are missing.

    A store is asked once for all of them: a set has thousands of shards.

    Raises:
        FileError: as `inside`, or one is no file.
    """
    if isinstance(folder, StorePath):
        there = folder.sizes()
        return {inside(folder, name, where).name: there.get(name) for name in names}
    found: dict[str, int | None] = {}
    for name in names:
        try:
            found[name] = size_of(inside(folder, name, where))
        except FileNotFoundError:
            found[name] = None
    return found


def open_ranges(path: Place, size: int, version: str) -> Ranges:
    """A file of `size` bytes to be read at offsets.

    Args:
        version: see `StoreRanges`.

    Raises:
        FileNotFoundError, FileError, OSError: as `open_regular`; of a store's object nobody asks before it is read.
    """
    if isinstance(path, StorePath):
        return StoreRanges(path, size, version)
    with open_regular(path) as file:
        return DiskRanges(os.dup(file.fileno()))


def open_regular(path: Place | str) -> BinaryIO:
    """Open a file for reading; it must be a regular file, or a link to one, or a store's object.

    Raises:
        FileNotFoundError: it does not exist.
        FileError: it is a folder, a fifo, a device or a socket.
        OSError: it cannot be opened.
    """
    if isinstance(path, StorePath):
        return path.open()
    try:
        # Opening a fifo would wait for somebody who writes into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL in the name
        raise FileError(f"{shown(str(path))} cannot be a file's name: {error}") from None
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise FileError(f"{path} is a socket, not a file") from None
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise FileError(f"{path} is {_kind(mode)}, not a file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Place | str, limit: int = JSON_LIMIT) -> bytes:
    """The contents of a regular file of at most `limit` bytes.

    Raises:
        FileNotFoundError, OSError: as `open_regular`.
        FileError: as `open_regular`, or it is larger.
    """
    with open_regular(path) as file:
        contents = file.read(limit + 1)
    if len(contents) > limit:
        raise FileError(f"{path} has more than {limit:,} bytes, the most that is read of such a file")
    return contents


def read_text(path: Place | str, limit: int = JSON_LIMIT) -> str:
    """The contents of a regular UTF-8 file.

    Raises:
        FileNotFoundError, OSError, FileError: as `read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start:,}") from None


def read_json(path: Place | str, kind: type[T], *, limit: int = JSON_LIMIT) -> T:
    """A JSON file as a value of the declared type; see `decode_json`.

    Raises:
        FileNotFoundError, OSError: it cannot be opened.
        FileError: it is no regular file, too large, no JSON, or not of this type.
    """
    return decode_json(read_bytes(path, limit), kind, str(path))


def decode_json(contents: bytes | str, kind: type[T], where: str) -> T:
    """JSON text as a value of the declared type, whose constraints then hold.

    Stricter than `json.loads`: UTF-8 only, no key twice in one object, no NaN or infinity, no half of a surrogate pair.

    Args:
        kind: what `msgspec.convert` takes: a Struct, a dataclass, `dict[str, Any]`, ...
        where: the file, for messages.

    Raises:
        FileError: it is not.
    """
    try:
        if isinstance(contents, bytes):
            contents = contents.decode("utf-8")
        value = _DECODER.decode(contents)
        if _SURROGATE.search(contents):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{where} is not text in UTF-8: {error.reason} at byte {error.start:,}") from None
    except UnicodeEncodeError:
        raise FileError(f"{where} is damaged: a text in it holds half of a surrogate pair") from None
    except RecursionError:
        raise FileError(f"{where} is damaged: its brackets are nested too deeply") from None
    except ValueError as error:
        raise FileError(f"{where} is damaged: {error}") from None
    return convert(value, kind, where)


def convert(value: Any, kind: type[T], where: str) -> T:
    """A value as `json.loads` gives it, as one of the declared type.

    Raises:
        FileError: it is not; the message names `where` and the key.
    """
    try:
        return msgspec.convert(value, kind, strict=True, str_keys=True)
    except msgspec.ValidationError as error:
        reason, _, key = str(error).partition(" - at `$")
        key = key.rstrip("`").lstrip(".")
        at = f"{key}: " if key else ""
        raise FileError(f"{where}: {at}{reason.replace('`', '')}") from None
    except RecursionError:
        raise FileError(f"{where} is damaged: it is nested too deeply") from None


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a JSON file with its own SHA-256 in it, as `sha256`: a damaged or edited one has another."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return rest | {"sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def inside(folder: Place, name: str, where: str, *, also: Path | None = None) -> Place:
    """The file called `name` in `folder`, for a name that a file of somebody else's gives.

    Args:
        where: the file that gives the name, for messages.
        also: another folder that a link in `folder` may lead into.

    Raises:
        FileError: the name is empty, absolute, climbs out of the folder, or leads out of it over a link.
    """
    parts = name.split("/")
    if not name or name.startswith("/") or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise FileError(f"{where} names {shown(name)}, which is not the name of a file in {folder}")
    path = folder / name
    if isinstance(path, StorePath):  # which has no links
        return path
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise FileError(f"{where} names {shown(name)}, which cannot be followed: {error}") from None
    if not any(target.is_relative_to(allowed.resolve()) for allowed in (folder, also) if allowed is not None):
        raise FileError(f"{where} names {shown(name)}, a link that leads out of {folder}")
    return path


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a fifo",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {shown(double)} stands twice in one object")
    return result


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON's")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {shown(text)} is too large")
    return number


# Made once: `json.loads` makes one at every call, which for a line of 3 KB is half of the time.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)


# Writing


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` when the block ends, and leaves no trace when it raises.

    Raises:
        OSError: the disk would not have it.
    """
    path = Path(path)
    temporary = temporary_name(path)
    # 0o666 less the umask, as for every file that a program makes; O_EXCL follows no link that somebody planted.
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_whole(path: Place | str, contents: bytes | str) -> None:
    """Write a file, or a store's object, so that it is either the old one or all of the new one.

    Raises:
        OSError: the disk, or the store, would not have it.
    """
    contents = contents.encode("utf-8") if isinstance(contents, str) else contents
    if isinstance(path, StorePath):
        path.write(contents)
        return
    with writing(path) as file:
        file.write(contents)


@contextlib.contextmanager
def making_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path`, which is absent or empty, when the block ends; gone when it raises.

    A process that is killed leaves it behind, under its hidden name: nobody can tell whose it is, so nobody removes it.

    Raises:
        OSError: the disk would not have it, or `path` holds something by now.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        if path.is_dir():
            path.rmdir()
        os.rename(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that cannot be predicted: `.NAME.<16 hex digits>.partial`."""
    # A file's name has at most 255 bytes.
    name = os.fsdecode(os.fsencode(path.name)[:200])
    return path.with_name(f".{name}.{secrets.token_hex(8)}{_PARTIAL}")


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
