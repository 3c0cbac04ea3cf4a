"""From sources to a prepared set: train or load the tokenizer, encode, split, write, and only then show the result.

Everything is written to `DIR/.building` and moved into `DIR` when it is complete, the manifest last. So a folder with
a manifest is complete, whatever happened, and a run that was interrupted is simply started again. The result depends
on the sources and the options alone: same bytes for any number of processes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.manifest import MANIFEST, SPLITS, Manifest, SourceEntry, index_name, load_manifest, write_manifest
from data.pool import EncodedDocument, encode_jobs
from data.sampling import sample_texts
from data.shards import PreparedSet, ShardSetWriter
from data.sources import TEXT_PATTERNS, Job, Source, open_source, parse_size
from data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

BUILDING = ".building"
TOKENIZER_FOLDER = "tokenizer"

_OWN_NAMES = re.compile(r"(train|valid)(-\d{6}\.tar|\.index\.parquet)|manifest\.json|tokenizer|\.building")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

Report = Callable[[str, int, int, int], None]
"""Called with (phase, input bytes done, input bytes in all, tokens so far)."""


@dataclass(frozen=True)
class PrepareOptions:
    """What decides the contents of a prepared set, besides its sources."""

    tokenizer: str = "byte"
    """`byte`, `train:VOCAB`, or a folder: a prepared set or one with a Hugging Face `tokenizer.json`."""
    tokenizer_sample_bytes: int = 8 << 20
    """Text that `train:VOCAB` looks at; 8 MB train 4,096 tokens in some seconds."""
    min_tokens: int = 2
    """Shorter documents are left out; the end token counts."""
    max_tokens: int | None = None
    """Longer documents are cut into equal parts, each a document with an end token that counts; None: not at all."""
    valid_fraction: float = 0.05
    """Share of the documents that is held out."""
    shard_bytes: int = 64 << 20
    """A shard is closed before it grows past this; one document is never divided."""
    seed: int = 0
    """For synthetic sources that name none and for the tokenizer's sample."""
    text_column: str = "text"
    text_patterns: tuple[str, ...] = TEXT_PATTERNS
    """File names that are texts, in folders."""

    def check(self) -> None:
        """Raises: ValueError for values that make no set."""
        if self.min_tokens < 2:
            raise ValueError(f"--min-tokens {self.min_tokens}: valid are 2 and more (a token and the end token)")
        if self.max_tokens is not None and self.max_tokens < 2 * self.min_tokens:
            raise ValueError(
                f"--max-tokens {self.max_tokens}: valid are {2 * self.min_tokens} and more, twice --min-tokens "
                f"(the parts of a document just above it have half as many)"
            )
        if not 0.0 <= self.valid_fraction < 1.0:
            raise ValueError(f"--valid-fraction {self.valid_fraction}: valid are values from 0 up to, not including, 1")
        if self.shard_bytes < 4096:
            raise ValueError(f"--shard-size {self.shard_bytes}: valid are 4K and more")
        if self.tokenizer_sample_bytes < 1024:
            raise ValueError(f"--tokenizer-sample {self.tokenizer_sample_bytes}: valid are 1K and more")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: it must not be negative")


@dataclass
class Prepared:
    manifest: Manifest
    built: bool
    """False: a complete set of the same sources and options was there already."""


def prepare(
    specs: Sequence[str],
    out: Path | str,
    options: PrepareOptions,
    *,
    processes: int = 1,
    overwrite: bool = False,
    report: Report = lambda *_: None,
) -> Prepared:
    """Turn sources into a prepared set in the folder `out`.

    Raises:
        ValueError: a source or option is not valid, a document is damaged, nothing is left to write, or `out` holds
            something else.
        OSError: the disk is full, or an encoding process was killed. `out` holds no new set then.
    """
    options.check()
    if processes < 1:
        raise ValueError(f"--processes {processes}: valid are 1 and more")
    if not specs:
        raise ValueError("no source given; valid are files, folders, python:PACKAGE,... and passkey:N,length=LO..HI")
    out = Path(out)
    sources = [
        open_source(spec, text_column=options.text_column, text_patterns=options.text_patterns, seed=options.seed)
        for spec in specs
    ]
    tokenizer = _given_tokenizer(options.tokenizer)
    _refuse_foreign_folder(out)
    description = _describe(sources, options)
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        if (out / MANIFEST).exists() and not overwrite:
            return Prepared(_existing_set(out, description, tokenizer), built=False)
        building = out / BUILDING
        shutil.rmtree(building, ignore_errors=True)
        try:
            building.mkdir()
            manifest = _build(building, sources, options, tokenizer, description, processes, report)
            _move_into_place(building, out)
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise OSError(
                    error.errno, f"the disk is full: the set in {out} could not be finished and was removed"
                ) from error
            raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return Prepared(manifest, built=True)


def _given_tokenizer(spec: str) -> Tokenizer | None:
    """The tokenizer that `spec` names; None when it is to be trained."""
    if spec == "byte":
        return byte_tokenizer()
    if spec.startswith("train:"):
        _vocab_size(spec)
        return None
    return load_tokenizer(spec)


def _vocab_size(spec: str) -> int:
    try:
        size = parse_size(spec.removeprefix("train:"))
    except ValueError as error:
        raise ValueError(f"--tokenizer {spec}: {error}") from None
    if size < 257:
        raise ValueError(f"--tokenizer {spec}: a byte-level vocabulary has at least 257 tokens")
    return size


def _describe(sources: list[Source], options: PrepareOptions) -> dict[str, Any]:
    """What the manifest says of the way it was made; equal descriptions make equal sets."""
    chosen = asdict(options)
    chosen["text_patterns"] = list(options.text_patterns)
    return {
        "options": chosen,
        "sources": [
            {"spec": source.spec, "inputs": len(source.inputs), "fingerprint": source.fingerprint} for source in sources
        ],
    }


def _refuse_foreign_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; it must be a folder, or not exist")
    if out.is_dir():
        foreign = sorted(entry.name for entry in out.iterdir() if not _OWN_NAMES.fullmatch(entry.name))
        if foreign:
            raise ValueError(f"--out {out} holds other files ({foreign[0]}, ...); choose an empty or a new folder")


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder against a second `infini prepare`; the system lets go when the process dies."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another `infini prepare` is writing to {out}") from None
        yield
    finally:
        os.close(descriptor)


def _existing_set(out: Path, description: dict[str, Any], tokenizer: Tokenizer | None) -> Manifest:
    """The manifest of the complete set in `out`, when it is the one asked for."""
    advice = "choose another --out, or give --overwrite to replace it"
    try:
        manifest = load_manifest(out)
        for split in manifest.splits:
            PreparedSet(out, split)
    except ValueError as error:
        raise ValueError(f"{out} holds a damaged set ({error}); {advice}") from error
    differences = [
        f"{name} is {manifest.options.get(name)!r} there and {value!r} here"
        for name, value in description["options"].items()
        if manifest.options.get(name) != value
    ]
    keys = ("spec", "inputs", "fingerprint")
    there = [{key: getattr(source, key) for key in keys} for source in manifest.sources]
    if [source["spec"] for source in there] != [source["spec"] for source in description["sources"]]:
        differences.append("the sources are others")
    elif there != description["sources"]:
        differences.append("the sources' files have changed")
    if tokenizer is not None and tokenizer.hash != manifest.tokenizer.hash:
        differences.append("the tokenizer is another one")
    if differences:
        raise ValueError(f"{out} already holds a different set ({'; '.join(differences)}); {advice}")
    return manifest


def _build(
    building: Path,
    sources: list[Source],
    options: PrepareOptions,
    tokenizer: Tokenizer | None,
    description: dict[str, Any],
    processes: int,
    report: Report,
) -> Manifest:
    if tokenizer is None:
        tokenizer = _train_tokenizer(sources, options, report)
    for source in sources:
        source.check(tokenizer)
    tokenizer.save(building / TOKENIZER_FOLDER)
    for file in (building / TOKENIZER_FOLDER).iterdir():
        _sync(file)

    counts = [{"documents": 0, "tokens": 0, "too_short": 0, "skipped_files": 0} for _ in sources]
    total, done, longest = sum(source.total_bytes for source in sources), 0, 0
    writers = {split: ShardSetWriter(building, split, tokenizer.vocab_size, options.shard_bytes) for split in SPLITS}

    def write(split: str, document: EncodedDocument) -> None:
        source, count = sources[document.source].spec, counts[document.source]
        for part in _parts(document, options.max_tokens, source, tokenizer.eos_id):
            count["documents"] += 1
            count["tokens"] += len(part.tokens)
            writers[split].add(part.tokens, id=part.id, source=source, answers=part.answers, questions=part.questions)

    assigner = SplitAssigner(options.valid_fraction)
    documents = encode_jobs(_numbered_jobs(sources), tokenizer, processes)
    try:
        for document in documents:
            count = counts[document.source]
            count["skipped_files"] += document.skipped_files
            length = len(document.tokens)
            longest = max(longest, length)
            if length < options.min_tokens:
                count["too_short"] += 1
            else:
                for split, ready in assigner.add(document):
                    write(split, ready)
            done += document.input_bytes
            report("encoding", done, total, sum(writer.tokens for writer in writers.values()))
        for split, ready in assigner.finish():
            write(split, ready)
        _refuse_empty(sources, counts, longest, options.min_tokens)
        splits = {split: writer.close() for split, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    finally:
        documents.close()
    if not splits["valid"].documents:
        del splits["valid"]
        (building / index_name("valid")).unlink()

    return write_manifest(
        building,
        tokenizer=tokenizer.entry,
        options=description["options"],
        sources=[SourceEntry(**source, **count) for source, count in zip(description["sources"], counts, strict=True)],
        splits=splits,
    )


def _parts(document: EncodedDocument, max_tokens: int | None, source: str, eos_id: int) -> list[EncodedDocument]:
    """The document, or what it is cut into: after the choice of its split, so that no split has parts of another's.

    Raises:
        ValueError: it is too long, and its questions would be cut with it.
    """
    if max_tokens is None or len(document.tokens) <= max_tokens:
        return [document]
    if document.answers or document.questions:
        raise ValueError(
            f"source {source}: document {document.id} has {len(document.tokens):,} tokens and questions about them; "
            f"--max-tokens {max_tokens:,} cuts plain text only"
        )
    text = document.tokens[:-1]
    pieces = np.array_split(text, -(-len(text) // (max_tokens - 1)))
    return [
        replace(document, id=f"{document.id}#{i}", tokens=np.append(piece, piece.dtype.type(eos_id)))
        for i, piece in enumerate(pieces)
    ]


def _train_tokenizer(sources: list[Source], options: PrepareOptions, report: Report) -> Tokenizer:
    total, done = sum(source.total_bytes for source in sources if not source.synthetic), 0

    def advance(input_bytes: int) -> None:
        nonlocal done
        done += input_bytes
        report("training the tokenizer", done, total, 0)

    texts = sample_texts(sources, options.tokenizer_sample_bytes, options.seed, advance)
    return train_bpe(texts, _vocab_size(options.tokenizer))


def _numbered_jobs(sources: list[Source]) -> Iterator[tuple[int, Job]]:
    for number, source in enumerate(sources):
        for job in source.jobs():
            yield number, job


def _refuse_empty(sources: list[Source], counts: list[dict[str, int]], longest: int, min_tokens: int) -> None:
    for source, count in zip(sources, counts, strict=True):
        if count["documents"] == 0:
            if count["too_short"] == 0:
                raise ValueError(f"source {source.spec} is empty: it has no documents")
            raise ValueError(
                f"source {source.spec}: none of its {count['too_short']:,} documents has --min-tokens {min_tokens:,} "
                f"(the longest of all sources has {longest:,})"
            )


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
    def _place(document: EncodedDocument) -> float:
        """Uniform in [0, 1): below the fraction is `valid`."""
        return int.from_bytes(hashlib.sha256(document.id.encode()).digest()[:8], "big") / 2**64

    def _split(self, document: EncodedDocument) -> str:
        return "valid" if self._place(document) < self._fraction else "train"

    def add(self, document: EncodedDocument) -> list[tuple[str, EncodedDocument]]:
        """Documents that can be written now, with their splits."""
        split = self._split(document)
        self._seen[split] += 1
        if self._fraction == 0.0:
            return [(split, document)]
        held, self._held = self._held, None
        if all(self._seen.values()):
            return ([(self._split(held), held)] if held else []) + [(split, document)]
        if held is None:
            self._held = document
            return []
        nearest = min if split == "train" else max
        self._held = nearest(held, document, key=self._place)
        return [(split, document if self._held is held else held)]

    def finish(self) -> list[tuple[str, EncodedDocument]]:
        if self._held is None:
            return []
        alone = sum(self._seen.values()) == 1
        other = "valid" if self._seen["train"] else "train"
        return [("train" if alone else other, self._held)]


def _move_into_place(building: Path, out: Path) -> None:
    # The old manifest goes first and the new one comes last: between the two the folder holds no complete set.
    (out / MANIFEST).unlink(missing_ok=True)
    for entry in list(out.iterdir()):
        if entry.name == TOKENIZER_FOLDER:
            shutil.rmtree(entry)
        elif entry.name != BUILDING:
            entry.unlink()
    for entry in sorted(building.iterdir(), key=lambda entry: entry.name == MANIFEST):
        entry.rename(out / entry.name)
    _sync(out)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
