"""Prepared sets on disk: webdataset shards, index and manifest. `PreparedSet` reads; `shard_writer` writes.

A prepared set is a folder with

    manifest.json         tokenizer, options, and for each split its shards (with sha256), counts and length histogram
    tokenizer/            what `data.tokenizer.tokenizer.load_tokenizer` reads
    train-000000.tar ...  plain tars, two members per document: <key>.json (metadata) and <key>.npy (tokens)
    train.index.parquet   one row per document, in shard order: where its tokens lie, so that a segment is one `pread`

and the same for `valid`. Tokens are uint16 where the vocabulary allows it, else uint32, little-endian.
"""

from __future__ import annotations

import tarfile
import threading
from collections import OrderedDict

import msgspec
import numpy as np

from data.files import (
    FileError,
    Place,
    Ranges,
    StoreError,
    StorePath,
    decode_json,
    inside,
    is_there,
    open_ranges,
    place,
    read_json,
    shown,
    sizes_of,
)
from data.prepared.document_index import TAR_BLOCK, CheckedIndex, document_key, read_index
from data.prepared.manifest import MANIFEST, Count, Manifest, index_name, load_manifest
from data.prepared.questions import Question, from_rows
from data.tokenizer.info import INFO, Sha256, TokenId, TokenizerInfo

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

    Args:
        manifest: what a folder without one holds, for a part that is to be joined.

    Raises:
        ValueError: no such set or split, a shard is missing or has another size, or index and manifest disagree.
    """

    def __init__(self, path: Place | str, split: str = "train", *, manifest: Manifest | None = None) -> None:
        self.path = place(path)
        self.split = split
        self.manifest: Manifest = load_manifest(self.path) if manifest is None else manifest
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
        self._entries = entry.shards
        self._shards = self._find_shards()
        table = read_index(self.path, split, entry)
        file = self.path / index_name(split)
        self._index = CheckedIndex(file, table, entry, self._dtype.itemsize, self.vocab_size)
        self.lengths: np.ndarray = self._index.lengths

        self._lock = threading.Lock()
        self._files: OrderedDict[int, Ranges] = OrderedDict()

    def _check_tokenizer(self) -> None:
        """The tokenizer beside the shards is the manifest's; its own contents are `infini inspect`'s matter."""
        name = f"tokenizer/{INFO}"
        if not is_there(self.path / name):
            return  # nothing here needs it
        info = read_json(inside(self.path, name, str(self.path)), TokenizerInfo)
        for field, there in msgspec.structs.asdict(info).items():
            if there != (here := getattr(self.manifest.tokenizer, field)):
                raise FileError(
                    f"{self.path / name} says {field} {there}, where {MANIFEST} says {here}: one is another set's"
                )

    def _find_shards(self) -> list[Place]:
        """Where the shards lie, all of them there and of the right size."""
        where = str(self.path / MANIFEST)
        sizes = sizes_of(self.path, (shard.name for shard in self._entries), where)
        for shard in self._entries:
            file, size = self.path / shard.name, sizes[shard.name]
            if size is None:
                raise ValueError(f"shard {file} is missing")
            if size != shard.bytes:
                raise ValueError(
                    f"shard {file} has {size:,} bytes where the manifest says {shard.bytes:,} "
                    f"(`infini inspect {self.path}` tells what is wrong)"
                )
        return [self.path / shard.name for shard in self._entries]

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
            StoreError: the store does not answer: that is no document's fault.
        """
        length = int(self.lengths[i])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"tokens [{start}, {stop}) of {self.document_name(i)}, which has {length}")
        size, offset, useful = self._span(i, start, stop)
        data = self._raw(f"document {self.document_name(i)}", i, size, offset, useful)
        tokens = np.frombuffer(data, dtype=self._dtype).astype(np.int64)
        if size and tokens.max() >= self.vocab_size:
            raise BadDocumentError(
                f"document {self.document_name(i)} holds token {tokens.max()}, outside of the vocabulary of "
                f"{self.vocab_size}: the shard is damaged or belongs to another tokenizer"
            )
        return tokens

    def announce(self, i: int, start: int, stop: int) -> None:
        """Tokens [start, stop) of document `i` will be read soon: a store fetches them beside other work."""
        if isinstance(self.path, StorePath):
            self._ranges(int(self._index.shard[i])).announce(*self._span(i, start, stop))

    def _span(self, i: int, start: int, stop: int) -> tuple[int, int, int]:
        """Bytes of a document's tokens: how many, where in its shard, and how many from there to its end."""
        itemsize, length = self._dtype.itemsize, int(self.lengths[i])
        return (stop - start) * itemsize, int(self._index.offset[i]) + start * itemsize, (length - start) * itemsize

    def metadata(self, i: int) -> DocumentRecord:
        """The `.json` member of document `i`, which stands before its tokens.

        Raises:
            BadDocumentError: it cannot be read, or says something else than the index.
        """
        where = self._metadata_of(i)
        try:
            record = decode_json(self.metadata_text(i), DocumentRecord, where)
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

    def metadata_text(self, i: int) -> bytes:
        """The `.json` member of document `i` as it lies there.

        Raises:
            BadDocumentError: it is not where the index says.
        """
        begin, size = self._metadata_span(i)
        return self._raw(self._metadata_of(i), i, size, begin)

    def metadata_bytes(self, i: int) -> int:
        """How many bytes it has.

        Raises:
            BadDocumentError: as `metadata_text`.
        """
        return self._metadata_span(i)[1]

    def token_bytes(self, i: int) -> bytes:
        """The tokens of document `i` as they lie there.

        Raises:
            BadDocumentError: as `read`.
        """
        size, offset, _ = self._span(i, 0, int(self.lengths[i]))
        return self._raw(f"document {self.document_name(i)}", i, size, offset)

    def _metadata_of(self, i: int) -> str:
        return f"metadata of {self.document_name(i)}"

    def _metadata_span(self, i: int) -> tuple[int, int]:
        """Where the `.json` member's contents begin in the shard, and how many bytes they have."""
        shard, offset = int(self._index.shard[i]), int(self._index.offset[i])
        begin = 0
        if i and self._index.shard[i - 1] == shard:
            end = int(self._index.offset[i - 1]) + int(self.lengths[i - 1]) * self._dtype.itemsize
            begin = -(-end // TAR_BLOCK) * TAR_BLOCK
        where = self._metadata_of(i)
        try:
            header = tarfile.TarInfo.frombuf(self._raw(where, i, TAR_BLOCK, begin), "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            raise BadDocumentError(f"{where} cannot be read: {error}") from error
        if header.name != f"{document_key(i)}.json" or not 0 <= header.size <= offset - begin - 2 * TAR_BLOCK:
            raise BadDocumentError(f"{where} are not where the index says")
        return begin + TAR_BLOCK, header.size

    def _raw(self, where: str, i: int, size: int, offset: int, useful: int = 0) -> bytes:
        try:
            data = self._pread(int(self._index.shard[i]), size, offset, useful)
        except StoreError:
            raise
        except OSError as error:
            raise BadDocumentError(f"{where} cannot be read: {error}") from error
        if len(data) != size:
            raise BadDocumentError(f"{where} ends early: its shard is truncated")
        return data

    def _pread(self, shard: int, size: int, offset: int, useful: int = 0) -> bytes:
        if isinstance(self.path, StorePath):  # which several threads may ask at a time
            return self._ranges(shard).pread(size, offset, useful)
        # One lock for the cache and the read: a file must not be closed under a reading thread, and a segment comes
        # from the page cache in microseconds.
        with self._lock:
            return self._open(shard).pread(size, offset)

    def _ranges(self, shard: int) -> Ranges:
        with self._lock:
            return self._open(shard)

    def _open(self, shard: int) -> Ranges:
        """The shard's file, opened where it is not; needs the lock."""
        file = self._files.pop(shard, None)
        if file is None:
            if len(self._files) >= _OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
            entry = self._entries[shard]
            file = open_ranges(self._shards[shard], entry.bytes, entry.sha256)
        self._files[shard] = file
        return file

    def close(self) -> None:
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()
