"""What training pays for a set: padding at a segment length, and documents that are there more than once.

Padding follows from the lengths in the index alone. Whether two documents are the same is said by the SHA-256 of their
tokens, which stands in each document's metadata: nothing is hashed here, and no token is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from data.prepared.manifest import Manifest
from data.prepared.shards import DocumentRecord


@dataclass(frozen=True)
class Padding:
    """A split's documents in segments of one length, each document once."""

    segment_length: int
    segments: int
    """Where each document begins on a segment's border, as the lanes lay them out without packing."""
    labels: int
    """Tokens that are predicted: all of a document's but the first."""

    @property
    def share(self) -> float:
        """Of all positions, those that hold nothing: what a run computes in vain."""
        return 1.0 - self.labels / (self.segments * self.segment_length) if self.segments else 0.0

    @property
    def packed_segments(self) -> float:
        """With `data.packing`: lanes go on with the next document inside a segment and never end, so nothing is padded
        and an epoch need not be whole segments."""
        return self.labels / self.segment_length


def padding(lengths: np.ndarray, segment_length: int) -> Padding:
    """Padding of documents of `lengths` tokens `[documents]`, as `data.lanes` counts: n tokens have n - 1 labels.

    Raises:
        ValueError: the segment length is below 1.
    """
    if segment_length < 1:
        raise ValueError(f"a segment has at least 1 token, not {segment_length}")
    labels = np.maximum(np.asarray(lengths, dtype=np.int64) - 1, 0)
    return Padding(
        segment_length=segment_length,
        segments=int((-(-labels // segment_length)).sum()),
        labels=int(labels.sum()),
    )


@dataclass(frozen=True)
class Repeats:
    """Documents that are there again: of each set of equal ones all but the first."""

    documents: int
    tokens: int
    most: int
    """Times that the most frequent document is there."""
    example: int | None
    """Number of the most frequent document, its first place."""


class DocumentHashes:
    """The documents' hashes and sources, told one by one (`add`), 20 bytes each.

    Args:
        manifest: of the set.
    """

    def __init__(self, manifest: Manifest) -> None:
        # Half of a SHA-256: among 10^9 documents two different ones agree with a chance of 10^-21.
        self._hashes = {split: np.zeros((entry.documents, 2), "<u8") for split, entry in manifest.splits.items()}
        self._sources = {split: np.zeros(entry.documents, "<i4") for split, entry in manifest.splits.items()}
        self._numbers: dict[str, int] = {}

    def add(self, split: str, document: int, record: DocumentRecord) -> None:
        self._hashes[split][document] = np.frombuffer(bytes.fromhex(record.hash[:32]), "<u8")
        self._sources[split][document] = self._numbers.setdefault(record.source, len(self._numbers))

    def sources(self, split: str) -> Mapping[str, np.ndarray]:
        """By source, in the order of their first documents, the numbers of its documents."""
        found = self._sources[split]
        parts = {source: np.flatnonzero(found == number) for source, number in self._numbers.items()}
        return {source: documents for source, documents in parts.items() if len(documents)}

    def repeated(self, split: str) -> np.ndarray:
        """bool [documents]: an equal document stands before this one in the split."""
        return _again(*_groups(self._hashes[split]))

    def repeats(self, split: str, lengths: np.ndarray) -> Repeats:
        """What stands more than once in a split whose documents have `lengths` tokens."""
        first, counts = _groups(self._hashes[split])
        again = _again(first, counts)
        at = int(np.argmax(counts)) if len(counts) else 0
        most = int(counts[at]) if len(counts) else 0
        example = int(first[at]) if most > 1 else None
        return Repeats(int(again.sum()), int(np.asarray(lengths)[again].sum()), most, example)

    def shared(self, split: str, other: str) -> np.ndarray:
        """bool [documents of `split`]: the document is also in `other`."""
        return np.isin(_keys(self._hashes[split]), _keys(self._hashes[other]))


def _keys(hashes: np.ndarray) -> np.ndarray:
    """Both halves of each hash as one value that numpy can sort."""
    return np.ascontiguousarray(hashes).view([("a", "<u8"), ("b", "<u8")]).reshape(-1)


def _groups(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each set of equal hashes the first place, and the size."""
    _, first, counts = np.unique(_keys(hashes), return_index=True, return_counts=True)
    return first, counts


def _again(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """bool [documents], of `_groups`: not the first one of its set."""
    again = np.ones(int(counts.sum()), dtype=bool)
    again[first] = False
    return again
