"""Which documents of a prepared set are held out."""

from __future__ import annotations

import hashlib

from data.preparation.pool import EncodedDocument
from data.prepared.manifest import SPLITS


class SplitAssigner:
    """Sends each document to `train` or `valid` by a hash of its id, and sees to it that both get one.

    While all documents so far belong to one split, the one whose hash is nearest to the other split is held back; when
    the end comes first, it goes there.
    """

    def __init__(self, valid_fraction: float) -> None:
        self._fraction = valid_fraction
        self._seen: dict[str, int] = dict.fromkeys(SPLITS, 0)
        self._held: EncodedDocument | None = None

    @staticmethod
    def place(document: EncodedDocument) -> float:
        """Uniform in [0, 1): below the fraction is `valid`."""
        return int.from_bytes(hashlib.sha256(document.id.encode()).digest()[:8], "big") / 2**64

    def split(self, document: EncodedDocument) -> str:
        """What its hash says."""
        return "valid" if self.place(document) < self._fraction else "train"

    def add(self, document: EncodedDocument) -> list[tuple[str, EncodedDocument]]:
        """Documents that can be written now, with their splits."""
        split = self.split(document)
        self._seen[split] += 1
        if self._fraction == 0.0:
            return [(split, document)]
        held, self._held = self._held, None
        if all(self._seen.values()):
            return ([(self.split(held), held)] if held else []) + [(split, document)]
        if held is None:
            self._held = document
            return []
        nearest = min if split == "train" else max
        self._held = nearest(held, document, key=self.place)
        return [(split, document if self._held is held else held)]

    def finish(self) -> list[tuple[str, EncodedDocument]]:
        if self._held is None:
            return []
        alone = sum(self._seen.values()) == 1
        other = "valid" if self._seen["train"] else "train"
        return [("train" if alone else other, self._held)]
