"""Is a prepared set what was written? Finds every difference and says what kind it is.

Hashes decide whether a file is intact. A file that is not is then looked into, because a copy that broke off, an edit
and a lost file call for different remedies.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data.files import Place, StoreError, decode_json, inside, open_regular, place, shown, size_of
from data.prepared.document_index import read_index
from data.prepared.manifest import (
    MANIFEST,
    SPLITS,
    Manifest,
    ShardEntry,
    SplitEntry,
    index_name,
    load_manifest,
)
from data.prepared.shards import DocumentRecord, PreparedSet, token_dtype
from data.tokenizer.info import TokenizerEntry
from data.tokenizer.tokenizer import load_tokenizer

_BLOCK = 512
_READ_BYTES = 1 << 20

KINDS = {
    "manifest": "the manifest is missing or damaged",
    "tokenizer-missing": "the tokenizer is missing or damaged",
    "tokenizer-foreign": "the tokenizer is not the one the shards were made with",
    "index-missing": "an index is missing",
    "index-changed": "an index is not the one that was written",
    "shard-missing": "a shard is missing",
    "shard-truncated": "a shard ends early",
    "shard-changed": "a shard was changed after indexing, or its data were damaged",
    "shard-unknown": "there is a shard that the manifest does not know",
}


@dataclass(frozen=True)
class Problem:
    kind: str
    """A key of `KINDS`."""
    message: str
    """Names the file, and what is wrong with it."""


def verify_set(
    path: Place | str,
    advance: Callable[[int], None] = lambda _: None,
    seen: Callable[[str, int, DocumentRecord], None] = lambda *_: None,
) -> list[Problem]:
    """All problems of the prepared set at `path`; an empty list means that every byte is as written.

    Args:
        advance: is told the shard bytes that are done.
        seen: is told (split, document, what its metadata say), once for every document of a set that is intact so far.
    """
    path = place(path)
    try:
        manifest = load_manifest(path)
    except ValueError as error:
        return [Problem("manifest", str(error))]
    problems = _check_tokenizer(path, manifest.tokenizer)
    dtype = token_dtype(manifest.tokenizer.vocab_size)
    for split, entry in manifest.splits.items():
        problems += _check_index(path, split, entry)
        for shard in entry.shards:
            problem = _check_shard(path, shard, dtype, advance)
            problems += [problem] if problem else []
    known = {shard.name for entry in manifest.splits.values() for shard in entry.shards}
    for split in SPLITS:
        for file in sorted(path.glob(f"{split}-*.tar")):
            if file.name not in known:
                problems.append(Problem("shard-unknown", f"{file} is not in the manifest"))
    return problems or _check_opening(path, manifest, seen)


def _check_tokenizer(path: Place, recorded: TokenizerEntry) -> list[Problem]:
    try:
        tokenizer = load_tokenizer(path)
    except StoreError:
        raise
    except (ValueError, OSError) as error:
        return [Problem("tokenizer-missing", str(error))]
    if tokenizer.entry != recorded:
        return [
            Problem(
                "tokenizer-foreign",
                f"{path / 'tokenizer'} has the hash {tokenizer.hash[:12]} ({tokenizer.vocab_size:,} tokens), but the "
                f"shards were made with {recorded.hash[:12]} ({recorded.vocab_size:,} tokens)",
            )
        ]
    return []


def _check_index(path: Place, split: str, entry: SplitEntry) -> list[Problem]:
    file = path / index_name(split)
    if not file.exists():
        return [Problem("index-missing", f"{file} is missing")]
    try:
        read_index(path, split, entry)
    except StoreError:
        raise
    except (ValueError, OSError) as error:
        return [Problem("index-changed", str(error))]
    return []


def _check_shard(path: Place, shard: ShardEntry, dtype: np.dtype, advance: Callable[[int], None]) -> Problem | None:
    file = path / shard.name
    if not file.exists():
        return Problem("shard-missing", f"{file} is missing")
    digest = hashlib.sha256()
    try:
        size = size_of(inside(path, shard.name, str(path / MANIFEST)))
        with open_regular(file) as stream:
            if size > 2 * shard.bytes + _READ_BYTES:  # not a little more: reading all of it could take for ever
                written = f"where {shard.bytes:,} were written"
                return Problem("shard-changed", f"{file} was changed after indexing: it has {size:,} bytes, {written}")
            while data := stream.read(_READ_BYTES):
                digest.update(data)
                advance(len(data))
            size = stream.tell()
    except StoreError:
        raise
    except (ValueError, OSError) as error:
        return Problem("shard-changed", str(error))
    if digest.hexdigest() == shard.sha256:
        return None
    if size < shard.bytes and not _ends_like_a_tar(file):
        return Problem("shard-truncated", f"{file} is truncated: {size:,} of {shard.bytes:,} bytes are there")
    return Problem("shard-changed", f"{file} was changed after indexing: {_what_changed(file, shard, dtype)}")


def _ends_like_a_tar(file: Place) -> bool:
    """A tar ends with two blocks of zeros, at a block border; a copy that broke off hardly ever does."""
    size = size_of(file)
    if size % _BLOCK or size < 2 * _BLOCK:
        return False
    try:
        with open_regular(file) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            end = max((member.offset_data + -(-member.size // _BLOCK) * _BLOCK for member in tar), default=0)
    except (tarfile.TarError, OSError, EOFError):
        return False
    with open_regular(file) as stream:
        stream.seek(end)
        return stream.read(2 * _BLOCK) == bytes(2 * _BLOCK)


def _what_changed(file: Place, shard: ShardEntry, dtype: np.dtype) -> str:
    """The documents whose tokens are not those their metadata tell, as far as the tar can be read."""
    wrong, documents, tokens = [], 0, 0
    try:
        with open_regular(file) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            recorded = ""
            for member in tar:
                key, _, extension = member.name.rpartition(".")
                stream = tar.extractfile(member)
                if stream is None:
                    continue
                if extension == "json":
                    recorded = decode_json(stream.read(), DocumentRecord, f"{file}:{shown(member.name)}").hash
                elif extension == "npy":
                    array = np.load(io.BytesIO(stream.read()), allow_pickle=False)
                    documents, tokens = documents + 1, tokens + array.size
                    same = array.dtype == dtype and hashlib.sha256(array.tobytes()).hexdigest() == recorded
                    wrong += [] if same else [key]
    except Exception as error:  # numpy and tarfile raise whatever a damaged header leads them to
        return f"it can no longer be read as a tar past document {documents} ({shown(str(error))})"
    if wrong:
        return f"the tokens of {len(wrong)} document(s) do not match their hash, the first is {shown(wrong[0])}"
    if (documents, tokens) != (shard.documents, shard.tokens):
        return (
            f"it is a whole tar of {documents:,} documents with {tokens:,} tokens, where "
            f"{shard.documents:,} with {shard.tokens:,} were written"
        )
    return "its documents' tokens match their hashes, so only names or metadata differ"


def _check_opening(path: Place, manifest: Manifest, seen: Callable[[str, int, DocumentRecord], None]) -> list[Problem]:
    """Files that are intact, but do not belong together: a manifest from another set, for instance."""
    for split in manifest.splits:
        try:
            prepared = PreparedSet(path, split)
            for i in range(len(prepared)):
                seen(split, i, prepared.metadata(i))
            prepared.close()
        except ValueError as error:
            return [Problem("manifest", f"{path}: manifest, index and shards do not belong together: {error}")]
    return []
