"""Parts of large files at known offsets: a `pread` on the disk, and from a store requests of whole blocks.

A request to a store takes some ten milliseconds, however little it brings. So blocks of 64 KiB are fetched, as many in
one request as the reader will want soon, and kept in a cache that all files of the process share, with a bound on its
bytes; the block that was not used for longest goes first. It lies in memory: what a lane reads is read once an epoch,
so a disk would hold it for nothing, and would need clearing after a kill. What will be read can be announced; it is
then fetched beside other work, in a few threads. Nothing of this changes what is read.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from data.files.messages import FileError, shown
from data.files.store import StorePath

BLOCK_BYTES = 64 << 10
AHEAD_BYTES = 1 << 20
"""Fetched at once where the reader goes on: at 80 MB/s as long as a request's own latency."""
CACHE = "INFINI_STORE_CACHE_MIB"
"""The environment's word for the cache's bound, in each process."""
CACHE_MIB = 256
_THREADS = 16


class Ranges(Protocol):
    """A file that is read at offsets, from several threads."""

    def pread(self, size: int, offset: int, useful: int = 0) -> bytes:
        """Bytes [offset, offset + size), fewer where the file ends.

        Args:
            useful: bytes from `offset` that the reader wants sooner or later.

        Raises:
            OSError: it cannot be read.
        """

    def announce(self, size: int, offset: int, useful: int = 0) -> None:
        """The same will be asked soon."""

    def close(self) -> None: ...


class DiskRanges:
    """A descriptor of a regular file, which it closes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def pread(self, size: int, offset: int, useful: int = 0) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def announce(self, size: int, offset: int, useful: int = 0) -> None:
        """The system's page cache reads ahead by itself."""

    def close(self) -> None:
        os.close(self._descriptor)


class StoreRanges:
    """An object of a store.

    Args:
        size: its bytes, as whoever opens it knows them.
        version: another one for other contents of the same name, whose blocks the cache then does not give: their hash.
    """

    def __init__(self, path: StorePath, size: int, version: str) -> None:
        self._path, self._size, self._name = path, size, f"{path} {version}"

    def pread(self, size: int, offset: int, useful: int = 0) -> bytes:
        stop = min(offset + size, self._size)
        if stop <= offset:
            return b""
        first, last = offset // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES
        blocks = _fetcher().blocks(self._name, first, last, self._until(offset, size, useful), self._fetch)
        joined = b"".join(blocks)
        start = offset - first * BLOCK_BYTES
        return joined[start : start + stop - offset]

    def announce(self, size: int, offset: int, useful: int = 0) -> None:
        stop = min(offset + size, self._size)
        if stop > offset:
            first, last = offset // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES
            _fetcher().announce(self._name, first, last, self._until(offset, size, useful), self._fetch)

    def close(self) -> None:
        """Nothing is open; its blocks leave the cache when others need the room."""

    def _until(self, offset: int, size: int, useful: int) -> int:
        """The last block that a request may bring along."""
        wanted = min(max(useful, size), max(size, AHEAD_BYTES))
        return (min(offset + wanted, self._size) - 1) // BLOCK_BYTES

    def _fetch(self, first: int, last: int) -> list[bytes]:
        start, stop = first * BLOCK_BYTES, min((last + 1) * BLOCK_BYTES, self._size)
        data = self._path.read(start, stop)
        return [data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES)]


Fetch = Callable[[int, int], list[bytes]]


class Fetcher:
    """A cache of blocks by (file, number), and the threads that fetch what was announced.

    Args:
        limit: bytes that the cache holds at most, beside the blocks that are being handed out.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.requests = 0
        """Made of stores so far."""
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._coming: set[tuple[str, int]] = set()
        self._changed = threading.Condition()
        self._waiting: queue.SimpleQueue[tuple[str, int, int, Fetch]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def blocks(self, name: str, first: int, last: int, until: int, fetch: Fetch) -> list[bytes]:
        """Blocks `first` to `last`, fetched where they are not there; a request that must be made brings those up to
        `until` along.

        Raises:
            Exception: what `fetch` raises.
        """
        found: dict[int, bytes] = {}
        while True:
            with self._changed:
                # Those that a thread fetches are waited for. If it fails, this thread asks by itself, and tells why.
                self._changed.wait_for(lambda: not any((name, n) in self._coming for n in range(first, last + 1)))
                for number in range(first, last + 1):
                    if number not in found and (block := self._blocks.get((name, number))) is not None:
                        self._blocks.move_to_end((name, number))
                        found[number] = block
                missing = [number for number in range(first, last + 1) if number not in found]
                if not missing:
                    return [found[number] for number in range(first, last + 1)]
                start, stop = missing[0], self._claim(name, missing[0], until)
            found.update(self._bring(name, start, stop, fetch))

    def announce(self, name: str, first: int, last: int, until: int, fetch: Fetch) -> None:
        """Fetch blocks beside other work; a failure is the matter of whoever needs them."""
        with self._changed:
            start = first
            while start <= last and ((name, start) in self._blocks or (name, start) in self._coming):
                start += 1
            if start > last:
                return
            stop = self._claim(name, start, until)
            if len(self._threads) < _THREADS:
                # Daemons: a program that ends waits for no store.
                thread = threading.Thread(target=self._work, name="store", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._waiting.put((name, start, stop, fetch))

    def _claim(self, name: str, start: int, until: int) -> int:
        """The end of the gap that begins at block `start`, at `until` at the latest; nobody else fetches it now."""
        stop = start
        while stop < until and (name, stop + 1) not in self._blocks and (name, stop + 1) not in self._coming:
            stop += 1
        self._coming.update((name, number) for number in range(start, stop + 1))
        return stop

    def _bring(self, name: str, start: int, stop: int, fetch: Fetch) -> dict[int, bytes]:
        try:
            data = fetch(start, stop)
            with self._changed:
                self.requests += 1
                for number, block in enumerate(data, start):
                    self._blocks[name, number] = block
                    self.held += len(block)
                while self.held > self.limit and self._blocks:
                    self.held -= len(self._blocks.popitem(last=False)[1])
            return dict(enumerate(data, start))
        finally:
            with self._changed:
                self._coming.difference_update((name, number) for number in range(start, stop + 1))
                self._changed.notify_all()

    def _work(self) -> None:
        while True:
            name, start, stop, fetch = self._waiting.get()
            try:
                self._bring(name, start, stop, fetch)
            except Exception:  # noqa: S110 - whoever needs the blocks asks again, and hears why not
                pass


_shared: list[tuple[int, Fetcher]] = []
_making = threading.Lock()


def _fetcher() -> Fetcher:
    """The process's own."""
    with _making:
        if not _shared or _shared[0][0] != os.getpid():
            _shared[:] = [(os.getpid(), Fetcher(cache_bytes()))]
        return _shared[0][1]


def cache_bytes() -> int:
    """Raises: ValueError where the environment holds no number of MiB."""
    text = os.environ.get(CACHE, str(CACHE_MIB))
    if not text.isdecimal() or not 1 <= int(text) <= 1 << 20:
        raise FileError(f"{CACHE}={shown(text)}: valid are whole numbers of MiB, 1 to 1,048,576")
    return int(text) << 20
