"""Real text as filler: windows of a prepared set's documents."""

from __future__ import annotations

import numpy as np

from data.shards import PreparedSet


class TextFiller:
    """A window that begins anywhere in the texts of a set, which follow one another without what begins and ends them.

    Args:
        source: a split of a prepared set that was made with the same tokenizer.
    """

    def __init__(self, source: PreparedSet) -> None:
        self._source = source
        self._begin = len(source.begin_ids)
        self._ends = np.cumsum(source.lengths - 1 - self._begin)

    def place(self, depth: float, room: int) -> int:
        return round(depth * room)

    def tokens(self, room: int, seed: int, last_fact: int) -> list[int]:
        position = int(np.random.default_rng([seed, 2]).integers(self._ends[-1]))
        found: list[int] = []
        while len(found) < room:
            document = int(np.searchsorted(self._ends, position, side="right"))
            length = int(self._source.lengths[document]) - 1 - self._begin
            first = position - (int(self._ends[document]) - length)
            stop = min(length, first + room - len(found))
            found += self._source.read(document, self._begin + first, self._begin + stop).tolist()
            position = (position + stop - first) % int(self._ends[-1])
        return found
