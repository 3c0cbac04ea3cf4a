"""Real text as filler: windows of a prepared set's documents."""

from __future__ import annotations

import numpy as np

from data.prepared.shards import PreparedSet


class TextFiller:
    """A window that begins anywhere in the texts of a set, which follow one another without what begins and ends them.

    Args:
        source: a split of a prepared set that was made with the same tokenizer.

    Raises:
        ValueError: there is no text in it.
    """

    def __init__(self, source: PreparedSet) -> None:
        self._source = source
        self._begin = len(source.begin_ids)
        self._ends = np.cumsum(np.maximum(source.lengths - 1 - self._begin, 0))
        if len(self._ends) == 0 or self._ends[-1] == 0:
            raise ValueError(f"filler {source.path} has no text in its split {source.split}")

    def place(self, depth: float, room: int, seed: int) -> int:
        return round(depth * room)

    def tokens(self, room: int, seed: int, last_fact: int) -> list[int]:
        position = int(np.random.default_rng([seed, 2]).integers(self._ends[-1]))
        found: list[int] = []
        while len(found) < room:
            document = int(np.searchsorted(self._ends, position, side="right"))
            length = max(int(self._source.lengths[document]) - 1 - self._begin, 0)
            first = position - (int(self._ends[document]) - length)
            stop = min(length, first + room - len(found))
            found += self._source.read(document, self._begin + first, self._begin + stop).tolist()
            position = (position + stop - first) % int(self._ends[-1])
        return found
