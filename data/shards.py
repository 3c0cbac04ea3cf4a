"""Prepared sets on disk: webdataset shards, index and manifest. `PreparedSet` reads, `ShardSetWriter` writes.

A prepared set is a folder with

    manifest.json         tokenizer, options, and for each split its shards (with sha256), counts and length histogram
    tokenizer/            what `data.tokenizer.load_tokenizer` reads
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
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.questions import COLUMN_TYPE, Question, from_rows, to_rows

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
SPLITS = ("train", "valid")
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

_TAR_BLOCK = 512
_INDEX_ROWS_IN_MEMORY = 65_536
_OPEN_SHARDS = 32


class BadDocumentError(ValueError):
    """A document of a prepared set cannot be read. The message names its shard and key."""


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def index_name(split: str) -> str:
    return f"{split}.index.parquet"


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every token id."""
    return np.dtype("<u2") if vocab_size <= 65_536 else np.dtype("<u4")


def load_manifest(path: Path | str) -> dict[str, Any]:
    """Read and check `manifest.json` of the prepared set at `path`.

    Raises:
        ValueError: the folder holds no complete set, or one of another format.
    """
    file = Path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{path} is not a prepared set: there is no {MANIFEST} (run `infini prepare SOURCE... --out {path}`)"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(manifest, dict) or "splits" not in manifest or "tokenizer" not in manifest:
        raise ValueError(f"{file} is not the manifest of a prepared set")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {manifest.get('format_version')!r}; this version reads {FORMAT_VERSION}"
        )
    return manifest


def read_index(path: Path | str, split: str) -> pa.Table:
    """The index of one split, one row per document.

    Raises:
        ValueError: the file is missing, damaged or has other columns.
    """
    file = Path(path) / index_name(split)
    try:
        table = pq.read_table(file)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not table.schema.equals(INDEX_SCHEMA):
        raise ValueError(f"{file} is not an index: its columns are {', '.join(table.schema.names)}")
    return table


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
        manifest = load_manifest(self.path)
        if split not in manifest["splits"]:
            raise ValueError(f"{self.path} has no split {split!r}; it has {', '.join(sorted(manifest['splits']))}")
        self.manifest = manifest
        self.tokenizer_hash: str = manifest["tokenizer"]["hash"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.eos_id: int = manifest["tokenizer"]["eos_id"]
        self._dtype = token_dtype(self.vocab_size)
        summary = manifest["splits"][split]
        self._shards: list[Path] = [self.path / shard["name"] for shard in summary["shards"]]
        sizes = self._check_shard_sizes(summary["shards"])

        table = read_index(self.path, split)
        self._shard = table["shard"].to_numpy()
        self._offset = table["offset"].to_numpy()
        self.lengths: np.ndarray = table["tokens"].to_numpy()
        self._keys = table["key"].combine_chunks()
        self._questions = table["questions"].combine_chunks()
        answers = table["answers"].combine_chunks()
        self._answer_values = answers.flatten().to_numpy()
        self._answer_starts = np.concatenate([[0], np.cumsum(answers.value_lengths().to_numpy(), dtype=np.int64)])
        self._check_index(summary, sizes)

        self._lock = threading.Lock()
        self._files: OrderedDict[int, int] = OrderedDict()

    def _check_shard_sizes(self, shards: list[dict[str, Any]]) -> np.ndarray:
        for file, shard in zip(self._shards, shards, strict=True):
            try:
                size = file.stat().st_size
            except FileNotFoundError:
                raise ValueError(f"shard {file} is missing") from None
            if size != shard["bytes"]:
                raise ValueError(
                    f"shard {file} has {size:,} bytes where the manifest says {shard['bytes']:,} "
                    f"(`infini inspect {self.path}` tells what is wrong)"
                )
        return np.array([shard["bytes"] for shard in shards], dtype=np.int64)

    def _check_index(self, summary: dict[str, Any], sizes: np.ndarray) -> None:
        file = self.path / index_name(self.split)
        if len(self) != summary["documents"] or int(self.lengths.sum()) != summary["tokens"]:
            raise ValueError(
                f"{file} does not match the manifest: {len(self):,} documents with {int(self.lengths.sum()):,} tokens, "
                f"where the manifest says {summary['documents']:,} with {summary['tokens']:,}"
            )
        if len(self) == 0:
            return
        inside = (self._shard >= 0) & (self._shard < len(sizes)) & (self._offset >= 0) & (self.lengths >= 0)
        if inside.all():
            inside = self._offset + self.lengths * self._dtype.itemsize <= sizes[self._shard]
        if not inside.all():
            key = self._keys[int(np.argmin(inside))]
            raise ValueError(f"{file} does not match the shards: document {key} lies outside of its shard")

    def __len__(self) -> int:
        return len(self.lengths)

    def document_name(self, i: int) -> str:
        """Shard and key of document `i`, for messages."""
        return f"{self._shards[self._shard[i]]}:{self._keys[i].as_py()}"

    def answers(self, i: int) -> list[tuple[int, int]]:
        """Token spans [start, stop) of document `i` that are answers."""
        flat = self._answer_values[self._answer_starts[i] : self._answer_starts[i + 1]].tolist()
        return list(zip(flat[::2], flat[1::2], strict=True))

    def questions(self, i: int) -> list[Question]:
        """What document `i` can be asked, see `data.questions`."""
        return from_rows(self._questions[i].as_py())

    @property
    def has_questions(self) -> bool:
        """Whether any document can be asked something."""
        return len(self._questions.flatten()) > 0

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
            data = self._pread(int(self._shard[i]), size, int(self._offset[i]) + start * self._dtype.itemsize)
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

    def metadata(self, i: int) -> dict[str, Any]:
        """The `.json` member of document `i`: id, source, tokens, hash, answers, questions."""
        shard, key = self._shards[self._shard[i]], self._keys[i].as_py()
        try:
            with tarfile.open(shard, "r:") as tar:
                return json.loads(tar.extractfile(f"{key}.json").read())
        except (tarfile.TarError, KeyError, OSError, ValueError) as error:
            raise BadDocumentError(f"metadata of {self.document_name(i)} cannot be read: {error}") from error

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        # One lock for the cache and the read: a file must not be closed under a reading thread, and a segment comes
        # from the page cache in microseconds.
        with self._lock:
            descriptor = self._files.pop(shard, None)
            if descriptor is None:
                if len(self._files) >= _OPEN_SHARDS:
                    os.close(self._files.popitem(last=False)[1])
                descriptor = os.open(self._shards[shard], os.O_RDONLY)
            self._files[shard] = descriptor
            return os.pread(descriptor, size, offset)

    def close(self) -> None:
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])


class _HashingFile:
    """A binary file for writing that hashes and counts what passes."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb", buffering=1 << 20)
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
        self._shards: list[dict[str, Any]] = []
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
            ValueError: a question is not well formed.
        """
        for question in questions:
            question.check()
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
        key = f"{self.documents:08d}"
        self._tar.write({"__key__": key, "json": text, "npy": npy})
        # Members are written in the order of their extensions: the npy is the last one, padded to whole blocks.
        padded = -(-len(npy) // _TAR_BLOCK) * _TAR_BLOCK
        offset = self._tar.tarstream.offset - padded + header.tell()
        self._rows.append(
            {
                "shard": len(self._shards) - 1,
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
        self._shards[-1]["documents"] += 1
        self._shards[-1]["tokens"] += len(array)
        self.documents += 1
        self.tokens += len(array)

    def _start_shard(self) -> None:
        from webdataset import TarWriter  # imports torch: only writers pay for it

        name = shard_name(self._split, len(self._shards))
        self._file = _HashingFile(self._folder / name)
        self._tar = TarWriter(self._file, encoder=False, user="", group="", mtime=0, compress=False)
        self._shards.append({"name": name, "bytes": 0, "sha256": "", "documents": 0, "tokens": 0})

    def _finish_shard(self) -> None:
        self._tar.close()
        self._shards[-1]["sha256"] = self._file.close()
        self._shards[-1]["bytes"] = self._file.bytes
        self._tar = self._file = None

    def _flush_index(self) -> None:
        self._index.write_table(pa.Table.from_pylist(self._rows, schema=INDEX_SCHEMA))
        self._rows.clear()

    def close(self) -> dict[str, Any]:
        """Finish the last shard and the index; returns the split's entry in the manifest."""
        if self._tar is not None:
            self._finish_shard()
        self._flush_index()
        self._index.close()
        index = self._folder / index_name(self._split)
        data = index.read_bytes()
        with open(index, "rb") as file:
            os.fsync(file.fileno())
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "shards": self._shards,
            "index": {"name": index.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
            "length_histogram": [[bucket, count] for bucket, count in sorted(self._histogram.items())],
        }

    def abandon(self) -> None:
        """Close files after an error; what was written is of no use."""
        with contextlib.suppress(OSError, ValueError):
            self._index.close()
        if self._file is not None:
            self._file.discard()
            self._tar.close()  # else it would try to, and complain, when it is collected
            self._tar = self._file = None
