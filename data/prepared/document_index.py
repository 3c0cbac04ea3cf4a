"""The index of a split: one row per document that says where its tokens lie, checked before anybody relies on it.

The manifest holds the index's size and SHA-256. That finds damage; the checks of the rows find an index that was made
to deceive: what is said of a document must lie inside of it, and documents inside of their shards, one after another.
"""

from __future__ import annotations

import hashlib
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.files import FileError, Place, inside, open_regular, shown
from data.prepared.manifest import SplitEntry, index_name
from data.prepared.questions import COLUMN_TYPE

INDEX_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("tokens", pa.int64()),
        ("answers", pa.list_(pa.int64())),
        ("questions", COLUMN_TYPE),
    ]
)

TAR_BLOCK = 512
LEAST_DOCUMENT_BYTES = 4 * TAR_BLOCK
"""In a shard: two headers, and a block of each member at least."""
_UNPACKED_PER_SHARD_BYTE = 8
HEADER_ALIGNMENT = 64
"""numpy pads an npy header, which begins on a tar block, to a multiple of this; then the tokens begin."""


def document_key(number: int) -> str:
    """Name of a split's document in its tar, without extension."""
    return f"{number:08d}"


def read_index(path: Place, split: str, entry: SplitEntry) -> pa.Table:
    """The index of one split, one row per document.

    Args:
        entry: what the manifest says of the split.

    Raises:
        ValueError: the file is missing, damaged, not the one that the manifest was written with, or has other columns.
    """
    file = path / index_name(split)
    try:
        with open_regular(inside(path, file.name, str(path))) as stream:
            contents = stream.read(entry.index.bytes + 1)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing") from None
    if hashlib.sha256(contents).hexdigest() != entry.index.sha256:
        short = len(contents) < entry.index.bytes
        found = f"{len(contents):,} of {entry.index.bytes:,} bytes are there" if short else "its SHA-256 differs"
        raise FileError(f"{file} is not the index that the manifest was written with: {found}")
    try:
        with pq.ParquetFile(pa.BufferReader(contents)) as parquet:
            if not parquet.schema_arrow.equals(INDEX_SCHEMA):
                raise FileError(
                    f"{file} is not an index: its columns are {shown(', '.join(parquet.schema_arrow.names))}"
                )
            _check_sizes(file, parquet.metadata, entry)
            return parquet.read()
    except (pa.ArrowException, OSError) as error:
        raise FileError(f"{file} is damaged: {shown(str(error), 200)}") from error


def _check_sizes(file: Place, metadata: pq.FileMetaData, entry: SplitEntry) -> None:
    """Refuse what would unpack to more than an index of this split can have, before it is unpacked."""
    if metadata.num_rows != entry.documents:
        raise FileError(
            f"{file} does not match the manifest: {metadata.num_rows:,} documents, where it says {entry.documents:,}"
        )
    room = sum(shard.bytes for shard in entry.shards) // LEAST_DOCUMENT_BYTES
    if entry.documents > room:
        raise FileError(f"{file} lists {entry.documents:,} documents; the shards have room for {room:,} at most")
    # All of it stands in the shards, too: a row's 100 bytes as 2,048, the 4 of a question's token as 3 or more.
    most = (1 << 20) + _UNPACKED_PER_SHARD_BYTE * sum(shard.bytes for shard in entry.shards)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    # The same value again and again takes no room in the file, and as much as any in memory.
    values = sum(group.column(i).num_values for group in groups for i in range(group.num_columns))
    unpacked = max(sum(group.total_byte_size for group in groups), 8 * values)
    if not 0 <= unpacked <= most:
        raise FileError(f"{file} unpacks to {unpacked:,} bytes; an index of this set has {most:,} at most")


class CheckedIndex:
    """The columns of an index as arrays, after all checks.

    Args:
        itemsize: bytes of a token.
        vocab_size: of the set.

    Raises:
        ValueError: index and manifest disagree, or a document, answer or question lies where it cannot.
    """

    def __init__(self, file: Place, table: pa.Table, entry: SplitEntry, itemsize: int, vocab_size: int) -> None:
        self._file, self._entry, self._itemsize = file, entry, itemsize
        for name in table.column_names:
            if table[name].null_count:
                raise FileError(f"{file} is damaged: {name} is null in {table[name].null_count:,} rows")
        self.shard: np.ndarray = table["shard"].to_numpy()
        self.offset: np.ndarray = table["offset"].to_numpy()
        self.lengths: np.ndarray = table["tokens"].to_numpy()
        self.keys = table["key"].combine_chunks()
        self.questions = table["questions"].combine_chunks()
        answers = table["answers"].combine_chunks()
        self.answer_values: np.ndarray = answers.flatten().to_numpy(zero_copy_only=False)
        counts = answers.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        self.answer_starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._check_documents()
        self._check_answers(counts)
        self._check_questions(vocab_size)

    def _refuse(self, document: int, what: str) -> NoReturn:
        raise FileError(f"{self._file} does not match the shards: document {document_key(document)} {what}")

    def _check_documents(self) -> None:
        count, shards = len(self.lengths), self._entry.shards
        expected = pc.utf8_lpad(pc.cast(pa.array(np.arange(count)), pa.string()), 8, "0")
        if not self.keys.equals(expected):
            raise FileError(f"{self._file} is damaged: the documents' keys are not 00000000 and those that follow")
        sizes = np.array([shard.bytes for shard in shards], dtype=np.int64)
        fits = (self.shard >= 0) & (self.shard < len(shards))
        size = sizes[np.where(fits, self.shard, 0)] if shards else np.zeros(count, dtype=np.int64)
        # Never offset + tokens * itemsize: with numbers near 2^63 that is small again.
        fits &= (self.offset >= 0) & (self.offset <= size) & (self.lengths >= 1)
        fits &= self.lengths <= (size - np.where(fits, self.offset, 0)) // self._itemsize
        if not fits.all():
            self._refuse(int(np.argmin(fits)), "lies outside of its shard")
        follows = self.offset % HEADER_ALIGNMENT == 0
        end = self.offset + self.lengths * self._itemsize
        same = self.shard[1:] == self.shard[:-1]
        follows[1:] &= np.where(same, self.offset[1:] > end[:-1], self.shard[1:] == self.shard[:-1] + 1)
        if not follows.all():
            self._refuse(int(np.argmin(follows)), "does not follow the one before it")
        for name, weights in (("documents", None), ("tokens", self.lengths)):
            # In float64: exact, since the sizes of the shards bound the sums far below 2^53.
            found = np.bincount(self.shard, weights, minlength=len(shards))
            for shard, number in zip(shards, found, strict=True):
                if getattr(shard, name) != int(number):
                    raise FileError(
                        f"{self._file} does not match the manifest: {shard.name} has {int(number):,} {name}, where it "
                        f"says {getattr(shard, name):,}"
                    )

    def _check_answers(self, counts: np.ndarray) -> None:
        if (counts % 2).any():
            self._refuse(int(np.argmax(counts % 2)), "has half an answer")
        starts, stops = self.answer_values[::2], self.answer_values[1::2]
        document = np.repeat(np.arange(len(counts)), counts // 2)
        fits = (starts >= 0) & (starts < stops) & (stops <= self.lengths[document])
        fits[1:] &= (document[1:] != document[:-1]) | (starts[1:] >= stops[:-1])
        if not fits.all():
            self._refuse(int(document[np.argmin(fits)]), "has answers outside of it, or that are not in order")

    def _check_questions(self, vocab_size: int) -> None:
        counts = self.questions.value_lengths().to_numpy(zero_copy_only=False)
        document = np.repeat(np.arange(len(counts)), counts)
        rows = self.questions.flatten()
        if not len(rows):
            return
        tokens, answer, after = rows.field("tokens"), rows.field("answer"), rows.field("after")
        values = [tokens.flatten(), answer.flatten()]
        if any(column.null_count for column in (rows, tokens, answer, after, *values)):
            raise FileError(f"{self._file} is damaged: there are nulls in its questions")
        lengths, after = tokens.value_lengths().to_numpy(), after.to_numpy()
        fits = answer.value_lengths().to_numpy() == 2
        if fits.all():
            edges = values[1].to_numpy().reshape(-1, 2)
            fits = (0 < edges[:, 0]) & (edges[:, 0] < edges[:, 1]) & (edges[:, 1] <= lengths)
            fits &= (0 <= after) & (after <= self.lengths[document])
        if not fits.all():
            self._refuse(
                int(document[np.argmin(fits)]), "has a question whose answer is not in it, or that is never due"
            )
        known = values[0].to_numpy()
        known = (known >= 0) & (known < vocab_size)
        if not known.all():
            owner = np.repeat(document, lengths)
            self._refuse(int(owner[np.argmin(known)]), f"has a question with tokens outside of the {vocab_size:,}")
