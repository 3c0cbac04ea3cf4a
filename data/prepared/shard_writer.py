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


class ShardSetWriter:
    """Writes the shards and the index of one split into `folder`, in the order documents are added.

    webdataset's `TarWriter` writes the tars. What it would take from the clock is fixed, so that the same documents
    give the same bytes. Memory is bounded by one document.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_bytes: int) -> None:
        self._folder = folder
        self._split = split
        self._dtype = token_dtype(vocab_size)
        self._shard_bytes = shard_bytes
        self._shards: list[ShardEntry] = []
        self._begun = [0, 0]  # documents and tokens of the open shard
        self._file: _HashingFile | None = None
        self._tar: Any = None
        self._index = pq.ParquetWriter(folder / index_name(split), INDEX_SCHEMA, compression="zstd")
        self._rows: list[dict[str, Any]] = []
        self._histogram: dict[int, int] = {}
        self.documents = 0
        self.tokens = 0

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
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": self._dtype.str, "fortran_order": False, "shape": array.shape}
        )
        npy = header.getvalue() + payload

        if self._tar is not None and self._tar.tarstream.offset + len(npy) + len(text) > self._shard_bytes:
            self._finish_shard()
        if self._tar is None:
            self._start_shard()
        key = document_key(self.documents)
        self._tar.write({"__key__": key, "json": text, "npy": npy})
        # Members are written in the order of their extensions: the npy is the last one, padded to whole blocks.
        padded = -(-len(npy) // TAR_BLOCK) * TAR_BLOCK
        offset = self._tar.tarstream.offset - padded + header.tell()
        self._rows.append(
            {
                "shard": len(self._shards),
                "key": key,
                "offset": offset,
                "tokens": len(array),
                "answers": [edge for span in answers or () for edge in span],
                "questions": to_rows(questions),
            }
        )
        if len(self._rows) >= _INDEX_ROWS_IN_MEMORY:
            self._flush_index()
        bucket = 1 << (len(array).bit_length() - 1)
        self._histogram[bucket] = self._histogram.get(bucket, 0) + 1
        self._begun[0] += 1
        self._begun[1] += len(array)
        self.documents += 1
        self.tokens += len(array)

    def _start_shard(self) -> None:
        from webdataset import TarWriter  # imports torch: only writers pay for it

        name = shard_name(self._split, len(self._shards))
        self._file = _HashingFile(self._folder / name)
        self._tar = TarWriter(self._file, encoder=False, user="", group="", mtime=0, compress=False)
        self._begun = [0, 0]

    def _finish_shard(self) -> None:
        self._tar.close()
        documents, tokens = self._begun
        name, digest = shard_name(self._split, len(self._shards)), self._file.close()
        self._shards.append(
            ShardEntry(name=name, bytes=self._file.bytes, sha256=digest, documents=documents, tokens=tokens)
        )
        self._tar = self._file = None

    def _flush_index(self) -> None:
        self._index.write_table(pa.Table.from_pylist(self._rows, schema=INDEX_SCHEMA))
        self._rows.clear()

    def close(self) -> SplitEntry:
        """Finish the last shard and the index; returns the split's entry in the manifest."""
        if self._tar is not None:
            self._finish_shard()
        self._flush_index()
        self._index.close()
        index = self._folder / index_name(self._split)
        data = index.read_bytes()
        with open(index, "rb") as file:
            os.fsync(file.fileno())
        return SplitEntry(
            documents=self.documents,
            tokens=self.tokens,
            shards=self._shards,
            index=IndexEntry(name=index.name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()),
            length_histogram=sorted(self._histogram.items()),
        )

    def abandon(self) -> None:
        """Close files after an error; what was written is of no use."""
        with contextlib.suppress(OSError, ValueError):
            self._index.close()
        if self._file is not None:
            self._file.discard()
            self._tar.close()  # else it would try to, and complain, when it is collected
            self._tar = self._file = None
