"""Writes one split of a prepared set: its shards and its index, as `data.prepared.shards` describes them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.prepared.document_index import INDEX_SCHEMA, TAR_BLOCK, document_key
from data.prepared.manifest import IndexEntry, ShardEntry, SplitEntry, index_name, shard_name
from data.prepared.questions import Question, to_rows
from data.prepared.shards import token_dtype

_INDEX_ROWS_IN_MEMORY = 65_536


class _HashingFile:
    """A binary file for writing that hashes and counts what passes."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("xb", buffering=1 << 20)
        self._sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self._sha256.update(data)
        self.bytes += len(data)
        return len(data)

    def close(self) -> str:
        """Flush to the disk; returns the sha256 of the contents."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
        return self._sha256.hexdigest()

    def discard(self) -> None:
        """Close the file as it is; later writes go nowhere."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._file = io.BytesIO()


class ShardWriter:
    """Writes one shard, `folder/name`.

    webdataset's `TarWriter` writes the tar. What it would take from the clock is fixed, so that the same documents give
    the same bytes.
    """

    def __init__(self, folder: Path, name: str) -> None:
        from webdataset import TarWriter  # imports torch: only writers pay for it

        self._name = name
        self._file = _HashingFile(folder / name)
        self._tar = TarWriter(self._file, encoder=False, user="", group="", mtime=0, compress=False)
        self._documents = self._tokens = 0

    @property
    def offset(self) -> int:
        """Bytes so far."""
        return self._tar.tarstream.offset

    def add(self, key: str, text: bytes, npy: bytes, header_bytes: int, tokens: int) -> int:
        """Append a document's two members; returns where its tokens begin.

        Args:
            text: the json member.
            npy: the npy member, of which `header_bytes` come before the tokens.
            tokens: how many there are.
        """
        self._tar.write({"__key__": key, "json": text, "npy": npy})
        self._documents += 1
        self._tokens += tokens
        # Members are written in the order of their extensions: the npy is the last one, padded to whole blocks.
        return self.offset - padded(len(npy)) + header_bytes

    def close(self) -> ShardEntry:
        """Finish the shard on the disk."""
        self._tar.close()
        digest = self._file.close()
        return ShardEntry(
            name=self._name, bytes=self._file.bytes, sha256=digest, documents=self._documents, tokens=self._tokens
        )

    def abandon(self) -> None:
        """Close the file after an error."""
        self._file.discard()
        self._tar.close()  # else it would try to, and complain, when it is collected


class IndexWriter:
    """Writes a split's index, row by row, and counts what it says."""

    def __init__(self, folder: Path, split: str) -> None:
        self._path = folder / index_name(split)
        self._writer = pq.ParquetWriter(self._path, INDEX_SCHEMA, compression="zstd")
        self._rows: list[dict[str, Any]] = []
        self._histogram: dict[int, int] = {}
        self.documents = 0
        self.tokens = 0

    def add(self, shard: int, offset: int, tokens: int, answers: list[int], questions: list[dict[str, Any]]) -> None:
        """Append the next document.

        Args:
            answers: starts and stops, flat.
            questions: as `data.prepared.questions.to_rows` gives them.
        """
        self._rows.append(
            {
                "shard": shard,
                "key": document_key(self.documents),
                "offset": offset,
                "tokens": tokens,
                "answers": answers,
                "questions": questions,
            }
        )
        if len(self._rows) >= _INDEX_ROWS_IN_MEMORY:
            self._flush()
        bucket = 1 << (tokens.bit_length() - 1)
        self._histogram[bucket] = self._histogram.get(bucket, 0) + 1
        self.documents += 1
        self.tokens += tokens

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=INDEX_SCHEMA))
        self._rows.clear()

    def close(self, shards: list[ShardEntry]) -> SplitEntry:
        """Finish the index; returns the split's entry in the manifest."""
        self._flush()
        self._writer.close()
        digest = hashlib.sha256()
        with open(self._path, "rb") as file:
            while data := file.read(1 << 20):
                digest.update(data)
            size = file.tell()
            os.fsync(file.fileno())
        return SplitEntry(
            documents=self.documents,
            tokens=self.tokens,
            shards=shards,
            index=IndexEntry(name=self._path.name, bytes=size, sha256=digest.hexdigest()),
            length_histogram=sorted(self._histogram.items()),
        )

    def abandon(self) -> None:
        """Close the file after an error."""
        with contextlib.suppress(OSError, ValueError):
            self._writer.close()


class ShardSetWriter:
    """Writes the shards and the index of one split into `folder`, in the order documents are added.

    Memory is bounded by one document.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_bytes: int) -> None:
        self._folder = folder
        self._split = split
        self._dtype = token_dtype(vocab_size)
        self._shard_bytes = shard_bytes
        self._shards: list[ShardEntry] = []
        self._shard: ShardWriter | None = None
        self._index = IndexWriter(folder, split)

    @property
    def documents(self) -> int:
        return self._index.documents

    @property
    def tokens(self) -> int:
        return self._index.tokens

    def add(
        self,
        tokens: np.ndarray,
        *,
        id: str,
        source: str,
        answers: list[tuple[int, int]] | None = None,
        questions: Sequence[Question] = (),
    ) -> None:
        """Append one document; `tokens` end with eos.

        Raises:
            ValueError: an answer or question is not well formed.
        """
        for question in questions:
            question.check(len(tokens))
        end = 0
        for start, stop in answers or ():
            if not end <= start < stop <= len(tokens):
                raise ValueError(
                    f"{id}: the answer [{start}, {stop}) is outside of {len(tokens):,} tokens or out of order"
                )
            end = stop
        array = np.ascontiguousarray(tokens, dtype=self._dtype)
        payload = array.tobytes()
        metadata: dict[str, Any] = {
            "id": id,
            "source": source,
            "tokens": len(array),
            "hash": hashlib.sha256(payload).hexdigest(),
        }
        if answers:
            metadata["answers"] = [list(span) for span in answers]
        if questions:
            metadata["questions"] = to_rows(questions)
        text = json.dumps(metadata, ensure_ascii=False).encode()
        header = npy_header(len(array), self._dtype)

        if self._shard is not None and overflows(
            self._shard.offset, len(text), len(header) + len(payload), self._shard_bytes
        ):
            self._finish_shard()
        if self._shard is None:
            self._shard = ShardWriter(self._folder, shard_name(self._split, len(self._shards)))
        key = document_key(self.documents)
        offset = self._shard.add(key, text, header + payload, len(header), len(array))
        edges = [edge for span in answers or () for edge in span]
        self._index.add(len(self._shards), offset, len(array), edges, to_rows(questions))

    def _finish_shard(self) -> None:
        assert self._shard is not None
        self._shards.append(self._shard.close())
        self._shard = None

    def close(self) -> SplitEntry:
        """Finish the last shard and the index; returns the split's entry in the manifest."""
        if self._shard is not None:
            self._finish_shard()
        return self._index.close(self._shards)

    def abandon(self) -> None:
        """Close files after an error; what was written is of no use."""
        self._index.abandon()
        if self._shard is not None:
            self._shard.abandon()
            self._shard = None


def npy_header(tokens: int, dtype: np.dtype) -> bytes:
    """What an npy file says before its tokens."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": (tokens,)})
    return header.getvalue()


def padded(size: int) -> int:
    """Bytes that a member's contents take in a tar."""
    return -(-size // TAR_BLOCK) * TAR_BLOCK


def document_bytes(text: int, npy: int) -> int:
    """Bytes that a document with members of so many bytes takes in its shard."""
    return 2 * TAR_BLOCK + padded(text) + padded(npy)


def overflows(offset: int, text: int, npy: int, shard_bytes: int) -> bool:
    """Whether a shard of `offset` bytes, which are not none, is closed before such a document."""
    return offset + npy + text > shard_bytes
