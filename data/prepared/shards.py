"""Prepared sets on disk: webdataset shards, index and manifest. `PreparedSet` reads, `ShardSetWriter` writes.

A prepared set is a folder with

    manifest.json         tokenizer, options, and for each split its shards (with sha256), counts and length histogram
    tokenizer/            what `data.tokenizer.tokenizer.load_tokenizer` reads
    train-000000.tar ...  plain tars, two members per document: <key>.json (metadata) and <key>.npy (tokens)
    train.index.parquet   one row per document, in shard order: where its tokens lie, so that a segment is one `pread`

and the same for `valid`. Tokens are uint16 where the vocabulary allows it, else uint32, little-endian.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import stat
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.files import FileError, decode_json, inside, open_regular, read_json, shown
from data.prepared.document_index import INDEX_SCHEMA, TAR_BLOCK, CheckedIndex, document_key, read_index
from data.prepared.manifest import (
    MANIFEST,
    SPLITS,
    Count,
    IndexEntry,
    Manifest,
    ShardEntry,
    SplitEntry,
    index_name,
    load_manifest,
    shard_name,
)
from data.prepared.questions import Question, from_rows, to_rows
from data.tokenizer.info import INFO, Sha256, TokenId, TokenizerInfo

__all__ = ["MANIFEST", "SPLITS", "BadDocumentError", "PreparedSet", "ShardSetWriter", "index_name", "load_manifest"]

_INDEX_ROWS_IN_MEMORY = 65_536
_OPEN_SHARDS = 32


class BadDocumentError(ValueError):
    """A document of a prepared set cannot be read. The message names its shard and key."""


class QuestionRecord(msgspec.Struct, frozen=True):
    tokens: tuple[TokenId, ...]
    answer: tuple[Count, Count]
    after: Count


class DocumentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A document's `.json` member."""

    id: str
    source: str
    tokens: Count
    hash: Sha256
    """Of the tokens' bytes."""
    answers: list[tuple[Count, Count]] = []
    questions: list[QuestionRecord] = []


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every token id."""
    return np.dtype("<u2") if vocab_size <= 65_536 else np.dtype("<u4")


class PreparedSet:
    """One split of a prepared set, read document by document at token offsets.

    Opening reads the manifest and the index and looks at the shards' sizes, not into the shards. Hashes are checked
    by `infini inspect`. Safe to use from several threads.

    Raises:
        ValueError: no such set or split, a shard is missing or has another size, or index and manifest disagree.
    """

    def __init__(self, path: Path | str, split: str = "train") -> None:
        self.path = Path(path)
        self.split = split
        self.manifest: Manifest = load_manifest(self.path)
        entry = self.manifest.splits.get(split)
        if entry is None:
            raise ValueError(f"{self.path} has no split {split!r}; it has {', '.join(sorted(self.manifest.splits))}")
        tokenizer = self.manifest.tokenizer
        self.tokenizer_hash: str = tokenizer.hash
        self.vocab_size: int = tokenizer.vocab_size
        self.eos_id: int = tokenizer.eos_id
        self.begin_ids: tuple[int, ...] = tokenizer.begin_ids
        self._check_tokenizer()
        self._dtype = token_dtype(self.vocab_size)
        self._shards = [self._find_shard(shard) for shard in entry.shards]
        table = read_index(self.path, split, entry)
        file = self.path / index_name(split)
        self._index = CheckedIndex(file, table, entry, self._dtype.itemsize, self.vocab_size)
        self.lengths: np.ndarray = self._index.lengths

        self._lock = threading.Lock()
        self._files: OrderedDict[int, int] = OrderedDict()

    def _check_tokenizer(self) -> None:
        """The tokenizer beside the shards is the manifest's; its own contents are `infini inspect`'s matter."""
        name = f"tokenizer/{INFO}"
        if not os.path.lexists(self.path / name):
            return  # nothing here needs it
        info = read_json(inside(self.path, name, str(self.path)), TokenizerInfo)
        for field, there in msgspec.structs.asdict(info).items():
            if there != (here := getattr(self.manifest.tokenizer, field)):
                raise FileError(
                    f"{self.path / name} says {field} {there}, where {MANIFEST} says {here}: one is another set's"
                )

    def _find_shard(self, shard: ShardEntry) -> Path:
        file = inside(self.path, shard.name, str(self.path / MANIFEST))
        try:
            found = file.stat()
        except FileNotFoundError:
            raise ValueError(f"shard {file} is missing") from None
        if not stat.S_ISREG(found.st_mode):
            raise FileError(f"shard {file} is not a file")
        if found.st_size != shard.bytes:
            raise ValueError(
                f"shard {file} has {found.st_size:,} bytes where the manifest says {shard.bytes:,} "
                f"(`infini inspect {self.path}` tells what is wrong)"
            )
        return file

    def __len__(self) -> int:
        return len(self.lengths)

    def document_name(self, i: int) -> str:
        """Shard and key of document `i`, for messages."""
        return f"{self._shards[self._index.shard[i]]}:{document_key(i)}"

    def answers(self, i: int) -> list[tuple[int, int]]:
        """Token spans [start, stop) of document `i` that are answers."""
        starts = self._index.answer_starts
        flat = self._index.answer_values[starts[i] : starts[i + 1]].tolist()
        return list(zip(flat[::2], flat[1::2], strict=True))

    def questions(self, i: int) -> list[Question]:
        """What document `i` can be asked, see `data.prepared.questions`."""
        return from_rows(self._index.questions[i].as_py())

    @property
    def has_questions(self) -> bool:
        """Whether any document can be asked something."""
        return len(self._index.questions.flatten()) > 0

    def read(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of document `i`, int64; `stop` None reads to the end.

        Raises:
            IndexError: the span is not inside the document.
            BadDocumentError: the shard cannot be read there, or what is there are not tokens of this vocabulary.
        """
        length = int(self.lengths[i])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"tokens [{start}, {stop}) of {self.document_name(i)}, which has {length}")
        size = (stop - start) * self._dtype.itemsize
        try:
            data = self._pread(
                int(self._index.shard[i]), size, int(self._index.offset[i]) + start * self._dtype.itemsize
            )
        except OSError as error:
            raise BadDocumentError(f"document {self.document_name(i)} cannot be read: {error}") from error
        if len(data) != size:
            raise BadDocumentError(f"document {self.document_name(i)} ends early: its shard is truncated")
        tokens = np.frombuffer(data, dtype=self._dtype).astype(np.int64)
        if size and tokens.max() >= self.vocab_size:
            raise BadDocumentError(
                f"document {self.document_name(i)} holds token {tokens.max()}, outside of the vocabulary of "
                f"{self.vocab_size}: the shard is damaged or belongs to another tokenizer"
            )
        return tokens

    def metadata(self, i: int) -> DocumentRecord:
        """The `.json` member of document `i`, which stands before its tokens.

        Raises:
            BadDocumentError: it cannot be read, or says something else than the index.
        """
        shard, offset = int(self._index.shard[i]), int(self._index.offset[i])
        where = f"metadata of {self.document_name(i)}"
        begin = 0
        if i and self._index.shard[i - 1] == shard:
            end = int(self._index.offset[i - 1]) + int(self.lengths[i - 1]) * self._dtype.itemsize
            begin = -(-end // TAR_BLOCK) * TAR_BLOCK
        try:
            header = tarfile.TarInfo.frombuf(self._pread(shard, TAR_BLOCK, begin), "utf-8", "surrogateescape")
            if header.name != f"{document_key(i)}.json" or not 0 <= header.size <= offset - begin - 2 * TAR_BLOCK:
                raise BadDocumentError(f"{where} are not where the index says")
            record = decode_json(self._pread(shard, header.size, begin + TAR_BLOCK), DocumentRecord, where)
        except (tarfile.TarError, OSError) as error:
            raise BadDocumentError(f"{where} cannot be read: {error}") from error
        except FileError as error:
            raise BadDocumentError(str(error)) from error
        questions = [Question(question.tokens, question.answer, question.after) for question in record.questions]
        told = (record.tokens, record.answers, questions)
        for name, there, here in zip(
            ("tokens", "answers", "questions"),
            told,
            (int(self.lengths[i]), self.answers(i), self.questions(i)),
            strict=True,
        ):
            if there != here:
                raise BadDocumentError(f"{where} say {name} {shown(there)}, where the index says {shown(here)}")
        return record

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        # One lock for the cache and the read: a file must not be closed under a reading thread, and a segment comes
        # from the page cache in microseconds.
        with self._lock:
            descriptor = self._files.pop(shard, None)
            if descriptor is None:
                if len(self._files) >= _OPEN_SHARDS:
                    os.close(self._files.popitem(last=False)[1])
                with open_regular(self._shards[shard]) as file:
                    descriptor = os.dup(file.fileno())
            self._files[shard] = descriptor
            return os.pread(descriptor, size, offset)

    def close(self) -> None:
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])


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
