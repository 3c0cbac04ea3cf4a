"""Prepare items ahead of their use, in one background thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """Calls `produce` in a background thread and keeps up to `depth` results ready, in order.

    An exception of `produce` ends the thread. It reaches the consumer from `next()` after the items that were produced
    before it, as the object that was raised (its type, message and traceback into `produce`), and again at every
    further call.
    """

    def __init__(self, produce: Callable[[], Item], depth: int) -> None:
        self._produce = produce
        self._depth = depth
        self._ready: deque[Item] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        # A daemon: a trainer that dies without close() must not hang in the interpreter's exit.
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def next(self) -> Item:
        """The next item; waits for it.

        Raises:
            RuntimeError: after `close()`.
            Exception: whatever `produce` raised.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error is not None or self._closed)
            if self._closed:
                raise RuntimeError("the prefetcher is closed")
            if not self._ready:
                raise self._error
            item = self._ready.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Stop and join the thread; items not taken are dropped. An item being produced is waited for."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                if self._closed:
                    return
            try:
                item = self._produce()
            except BaseException as error:  # whatever it is, the consumer must hear of it and not wait for ever
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                if not self._closed:
                    self._ready.append(item)
                    self._changed.notify_all()
