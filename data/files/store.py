"""Files in an object store, under names such as `s3://bucket/sets/books`: through fsspec, which knows the stores.

A store fails in ways that a disk does not: it throttles, times out, breaks off in the middle of an answer, and is well
again a minute later. So every request is repeated with growing pauses until it succeeds, or until a patience is at its
end; then the error names the object, the range, and what was said last. What waiting cannot mend (no such object, no
permission, no driver) is said at once.

An object appears whole or not at all, whoever is killed meanwhile; there is no renaming. Several objects that belong
together therefore count once one of them, written last, says so.
"""

from __future__ import annotations

import fnmatch
import functools
import io
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from data.files.messages import FileError, shown

T = TypeVar("T")
logger = logging.getLogger(__name__)

PATIENCE = "INFINI_STORE_PATIENCE_S"
"""The environment's word for how long a request is repeated."""
PATIENCE_S = 120.0
"""Unless it says something else: well below `resilience.hang_timeout_s`, so that the store is named, not the rank."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
_CHUNK_BYTES = 8 << 20
_READERS = 8
"""Requests under way for one large range."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_DRIVERS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "az": "adlfs",
    "abfs": "adlfs",
}
_ONCE = {"config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 10, "read_timeout": 30}}
_OPTIONS = {"s3": _ONCE, "s3a": _ONCE}
"""s3fs repeats a request five times and botocore each of them again, a minute or more in which nobody hears a word. Who
repeats, and for how long, is decided here alone."""
_TRIES_OF_A_PART = 5
"""Except for the parts of an object that is uploaded: one that fails must not cost all the others."""
_FOR_GOOD = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "InvalidRegionError")
"""Errors of botocore that no waiting mends, by their class, which need not be installed."""


class StoreError(OSError):
    """A store did not answer a request, however often it was asked. The message names object, range and reason."""


def is_store(path: object) -> bool:
    """Whether a path's text names a store."""
    return isinstance(path, StorePath) or isinstance(path, str) and bool(_SCHEME.match(path))


@functools.cache
def _filesystem(scheme: str, process: int, tries: int = 1) -> Any:
    """fsspec's file system, one for each process (its threads do not outlive a fork).

    Args:
        tries: s3fs's own for each request.
    """
    import fsspec

    try:
        # A listing that was kept would hide what another machine has written since.
        # Kept here, not by fsspec, which would give one of other tries.
        options = {"use_listings_cache": False, "skip_instance_cache": True} | _OPTIONS.get(scheme, {})
        filesystem = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        driver = _DRIVERS.get(scheme)
        advice = f"`pip install {driver}` brings it" if driver else str(error)
        raise ValueError(f"{scheme}:// needs a driver of fsspec that is not installed: {advice}") from error
    except ValueError as error:
        raise ValueError(f"{scheme}:// is no store that fsspec knows: {error}") from None
    if scheme in _OPTIONS:
        filesystem.retries = tries
    return filesystem


def patience_s() -> float:
    """Raises: ValueError where the environment holds no number of seconds."""
    text = os.environ.get(PATIENCE, str(PATIENCE_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds < float("inf"):
        raise ValueError(f"{PATIENCE}={shown(text)}: valid are seconds, 0 and more")
    return seconds


def patiently(what: str, request: Callable[[], T], *, sleep: Callable[[float], None] = time.sleep) -> T:
    """The answer to a request, which is repeated while the store fails.

    Args:
        what: the object and what is asked of it, for messages.

    Raises:
        FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError: as the store says.
        StoreError: it failed until the patience was at its end.
    """
    limit = patience_s()
    start, pause, tries = time.monotonic(), _FIRST_PAUSE_S, 0
    while True:
        tries += 1
        try:
            answer = request()
        except (FileNotFoundError, PermissionError) as error:
            raise type(error)(f"{what}: {error}") from error
        except (IsADirectoryError, NotADirectoryError, ValueError, TypeError):
            raise
        except Exception as error:  # drivers raise what their own libraries raise
            if type(error).__name__ in _FOR_GOOD:
                raise StoreError(f"{what}: {type(error).__name__}: {shown(str(error), 200)}") from error
            said = f"{type(error).__name__}: {shown(str(error), 200)}"
            waited = time.monotonic() - start
            if waited + pause > limit:
                raise StoreError(
                    f"{what}: the store failed {tries} times in {waited:.0f} s, the last time with {said} ({PATIENCE} "
                    "says how long it is asked)"
                ) from error
            logger.warning("%s: try %d failed (%s); the next one in %.1f s", what, tries, said, pause)
            # Many processes ask again after the same failure: not all at once.
            sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        else:
            if tries > 1:
                logger.warning("%s: the store answers again, after %.1f s", what, time.monotonic() - start)
            return answer


class StorePath:
    """An object, or a folder of objects: what `pathlib.Path` offers to whoever reads.

    Args:
        url: such as `s3://bucket/sets/books`.

    Raises:
        ValueError: it is no such text, or climbs (`..`).
    """

    def __init__(self, url: str) -> None:
        found = _SCHEME.match(url)
        if not found or "\0" in url:
            raise ValueError(f"{shown(url)} is not the name of a store: SCHEME://...")
        self._scheme = found[0][:-3].lower()
        parts = [part for part in url[found.end() :].split("/") if part]
        if any(part in (".", "..") for part in parts):
            raise ValueError(f"{shown(url)} climbs; name the folder itself")
        self._parts = tuple(parts)

    def __truediv__(self, name: str) -> StorePath:
        return StorePath(f"{self}/{name}")

    def __str__(self) -> str:
        return f"{self._scheme}://{'/'.join(self._parts)}"

    def __repr__(self) -> str:
        return f"StorePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def name(self) -> str:
        return self._parts[-1] if self._parts else ""

    @property
    def parent(self) -> StorePath:
        return StorePath(f"{self._scheme}://{'/'.join(self._parts[:-1])}")

    @property
    def filesystem(self) -> Any:
        """fsspec's file system.

        Raises:
            ValueError: there is no driver for it.
        """
        return _filesystem(self._scheme, os.getpid())

    @property
    def key(self) -> str:
        """The name by which `filesystem` knows it."""
        return self.filesystem._strip_protocol(str(self))

    def _info(self) -> dict[str, Any] | None:
        filesystem = self.filesystem
        try:
            return patiently(f"{self} (looking)", lambda: filesystem.info(self.key))
        except FileNotFoundError:
            return None

    def exists(self) -> bool:
        return self._info() is not None

    def is_file(self) -> bool:
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        return (self._info() or {}).get("type") == "directory"

    def size(self) -> int:
        """Bytes of the object.

        Raises:
            FileNotFoundError: there is none.
            FileError: it is a folder.
            StoreError: as `patiently`.
        """
        found = self._info()
        if found is None:
            raise FileNotFoundError(f"{self} does not exist")
        if found.get("type") != "file" or found.get("size") is None:
            raise FileError(f"{self} is a folder, not a file")
        return int(found["size"])

    def sizes(self) -> dict[str, int | None]:
        """What lies in the folder: bytes by name, None for folders. One request for a thousand objects."""
        filesystem = self.filesystem

        def listing() -> list[dict[str, Any]]:
            try:
                return filesystem.ls(self.key, detail=True)
            except FileNotFoundError:
                return []

        entries = patiently(f"{self} (listing)", listing)
        named = {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in entries}
        return {
            name: int(entry["size"]) if entry["type"] == "file" else None
            for name, entry in sorted(named.items())
            if name
        }

    def iterdir(self) -> Iterator[StorePath]:
        return (self / name for name in self.sizes())

    def glob(self, pattern: str) -> Iterator[StorePath]:
        """Entries of the folder itself whose names match."""
        return (self / name for name in self.sizes() if fnmatch.fnmatchcase(name, pattern))

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the object, in one request; they must be there.

        Raises:
            FileNotFoundError: there is no such object.
            StoreError: as `patiently`; an answer that breaks off is a failure.
        """
        filesystem = self.filesystem

        def request() -> bytes:
            data = filesystem.cat_file(self.key, start=start, end=stop)
            if len(data) != stop - start:
                raise OSError(f"a short answer: {len(data):,} of {stop - start:,} bytes")
            return data

        return patiently(f"{self} (bytes {start:,} to {stop:,})", request) if stop > start else b""

    def head(self, limit: int) -> bytes:
        """The first `limit` bytes of the object, all of a shorter one: one request, so of one writing.

        Raises:
            FileNotFoundError, StoreError: as `patiently`.
        """
        filesystem = self.filesystem
        return patiently(f"{self} (reading)", lambda: filesystem.cat_file(self.key, start=0, end=limit))

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill `buffer` with the bytes from `start` on; a large range comes in several requests at a time.

        Raises:
            FileNotFoundError, StoreError: as `read`; that of the first part that cannot be had.
        """

        def fetch(at: int) -> None:
            stop = min(at + _CHUNK_BYTES, len(buffer))
            buffer[at:stop] = self.read(start + at, start + stop)

        pieces = range(0, len(buffer), _CHUNK_BYTES)
        if len(pieces) == 1:
            return fetch(0)
        with ThreadPoolExecutor(_READERS, thread_name_prefix="store") as threads:
            for _ in threads.map(fetch, pieces):
                pass

    def write(self, contents: bytes) -> None:
        """Make the object, or replace it.

        Raises:
            PermissionError, FileNotFoundError (no such bucket), StoreError: as `patiently`.
        """
        filesystem = self.filesystem
        patiently(f"{self} (writing)", lambda: filesystem.pipe_file(self.key, contents))

    def upload(self, file: Path) -> None:
        """Make the object of a file on the disk, or replace it; a large one goes in parts.

        Raises:
            OSError: the file cannot be read.
            PermissionError, FileNotFoundError (no such bucket), StoreError: as `patiently`; also where the store has
                not so many bytes afterwards.
        """
        size = file.stat().st_size
        filesystem = _filesystem(self._scheme, os.getpid(), _TRIES_OF_A_PART)

        def request() -> None:
            filesystem.put_file(str(file), self.key)
            if (there := filesystem.info(self.key)["size"]) != size:
                raise OSError(f"{there:,} of {size:,} bytes arrived")

        patiently(f"{self} (uploading)", request)

    def remove(self) -> None:
        """Remove the object; nothing where there is none.

        Raises:
            PermissionError, StoreError: as `patiently`.
        """
        filesystem = self.filesystem

        def request() -> None:
            try:
                filesystem.rm_file(self.key)
            except FileNotFoundError:
                pass

        patiently(f"{self} (removing)", request)

    def open(self) -> io.BufferedReader:
        """The object from beginning to end, in large pieces; it can be sought in.

        Raises:
            FileNotFoundError, FileError, StoreError: as `size`.
        """
        return io.BufferedReader(_Stream(self, self.size()), _CHUNK_BYTES)


class _Stream(io.RawIOBase):
    """An object as a file; every read is a request."""

    def __init__(self, path: StorePath, size: int) -> None:
        self._path, self._size, self._at = path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence], 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        stop = min(self._at + len(buffer), self._size)
        if stop <= self._at:
            return 0
        data = self._path.read(self._at, stop)
        buffer[: len(data)] = data
        self._at = stop
        return len(data)
