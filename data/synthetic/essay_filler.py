"""A text file as filler: its sentences, with facts between them."""

from __future__ import annotations

import re

import numpy as np

_BORDER = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")


class EssayFiller:
    """Sentences of a text from one that the seed draws on, again from the first one behind the last.

    White space is made one space, and every sentence begins with one. What whole sentences leave of the room is the
    beginning of the next one.

    Args:
        encode: tokens of a text.

    Raises:
        ValueError: there is no text.
    """

    def __init__(self, encode, text: str, where: str = "the text") -> None:
        text = re.sub(r"\s+", " ", text).strip()
        sentences = [sentence for sentence in _split(text) if sentence]
        if not sentences:
            raise ValueError(f"filler {where} holds no text")
        encoded = [encode(" " + sentence) for sentence in sentences]
        self._tokens = np.concatenate([np.array(tokens, dtype=np.int64) for tokens in encoded])
        self._starts = np.cumsum([0, *map(len, encoded)])

    def _first(self, seed: int) -> int:
        """The sentence that a document begins with."""
        return int(np.random.default_rng([seed, 2]).integers(len(self._starts) - 1))

    def place(self, depth: float, room: int, seed: int) -> int:
        """A border between sentences."""
        first, sentences = self._first(seed), len(self._starts) - 1
        laps, rest = divmod(int(self._starts[first]) + room, len(self._tokens))
        whole = laps * sentences + int(np.searchsorted(self._starts, rest, side="right")) - 1 - first
        laps, last = divmod(first + round(depth * whole), sentences)
        return laps * len(self._tokens) + int(self._starts[last]) - int(self._starts[first])

    def tokens(self, room: int, seed: int, last_fact: int) -> list[int]:
        start = int(self._starts[self._first(seed)])
        return self._tokens[(start + np.arange(room)) % len(self._tokens)].tolist()


def _split(text: str) -> list[str]:
    """Sentences; a closing quotation mark stays with its own."""
    pieces, start = [], 0
    for border in _BORDER.finditer(text):
        end = border.end()
        pieces.append(text[start:end].rstrip())
        start = end
    return [*pieces, text[start:]]
