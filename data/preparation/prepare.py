"""From sources to a prepared set: train or load the tokenizer, encode, split, write, and only then show the result.

Everything is written to a folder of its own in `DIR` and moved into `DIR` when it is complete, the manifest last (see
`data.preparation.building`). So a folder with a manifest is complete, whatever happened, and a run that was interrupted
is simply started again. The result depends on the sources and the options alone: same bytes for any number of
processes.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.files import FileError, file_name, is_utf8, sync_folder
from data.preparation.building import (
    TOKENIZER_FOLDER,
    building_in,
    clear_remains,
    locked,
    move_into_place,
    refuse_foreign,
)
from data.preparation.identity import changed_sources, contents_hash, write_inputs
from data.preparation.options import PrepareOptions
from data.preparation.pool import EncodedDocument, encode_jobs
from data.preparation.sampling import sample_texts
from data.preparation.sources import BadInputError, Job, Source, open_sources, parse_size
from data.preparation.splits import SplitAssigner
from data.prepared.manifest import MANIFEST, SPLITS, Manifest, SourceEntry, index_name, load_manifest, write_manifest
from data.prepared.shard_writer import ShardSetWriter
from data.prepared.shards import PreparedSet
from data.tokenizer.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_BAD_NAMED = 10
"""Messages of bad records and files that a manifest keeps, of each source."""
_MESSAGE_CHARACTERS = 300

Report = Callable[[str, int, int, int], None]
"""Called with (phase, input bytes done, input bytes in all, tokens so far); 0 in all: there is no telling."""
Say = Callable[[str], None]
"""Called with what a user should know, a line each."""


@dataclass
class _Counts:
    """The counts of a `SourceEntry`."""

    documents: int = 0
    tokens: int = 0
    too_short: int = 0
    empty: int = 0
    skipped_files: int = 0
    bad_records: int = 0
    bad_files: int = 0
    bad: list[str] = field(default_factory=list)
    passed_over: dict[str, int] = field(default_factory=dict)

    def add_bad(self, document: EncodedDocument) -> None:
        if document.is_record:
            self.bad_records += 1
        else:
            self.bad_files += 1
        if len(self.bad) < _BAD_NAMED:
            self.bad.append(str(document.error)[:_MESSAGE_CHARACTERS])


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
    say: Say = lambda _: None,
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
    if not is_utf8(out):
        raise ValueError(f"--out {file_name(out)}: the name is not UTF-8, so no configuration could say it")
    with _with_advice():
        sources = open_sources(specs, options)
    tokenizer = _given_tokenizer(options)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {file_name(out)} is a file; it must be a folder, or not exist")
    description = _describe(sources, options)
    for source in sources:
        for note in source.notes:
            say(note)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        clear_remains(out)
        if (out / MANIFEST).exists() and not overwrite:
            return Prepared(_existing_set(out, sources, description, tokenizer, report, say), built=False)
        refuse_foreign(out)
        try:
            with building_in(out) as building, _with_advice():
                manifest = _build(building, sources, options, tokenizer, description, processes, report, say)
                move_into_place(building, out)
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise OSError(
                    error.errno, f"the disk is full: the set in {out} could not be finished and was removed"
                ) from error
            raise
    return Prepared(manifest, built=True)


@contextlib.contextmanager
def _with_advice() -> Iterator[None]:
    try:
        yield
    except BadInputError as error:
        raise FileError(f"{error} (--skip-bad leaves such records and files out, counted)") from None


def _given_tokenizer(options: PrepareOptions) -> Tokenizer | None:
    """The tokenizer that the options name; None when it is to be trained."""
    spec = options.tokenizer
    if spec == "byte":
        return byte_tokenizer()
    if spec.startswith("train:"):
        _vocab_size(spec)
        return None
    if not os.path.lexists(spec):
        raise ValueError(
            f"--tokenizer {spec}: there is no such folder, and nothing is downloaded; valid are `byte`, `train:VOCAB` "
            "(such as train:4096) and a folder: a prepared set or one with tokenizer.json"
        )
    tokenizer = load_tokenizer(spec)
    if options.begin_token == "none":
        tokenizer = tokenizer.without_begin()
    begin = len(tokenizer.begin_ids)
    if options.max_tokens is not None and options.max_tokens - begin < 2 * options.min_tokens:
        raise ValueError(
            f"--max-tokens {options.max_tokens}: valid are {2 * options.min_tokens + begin} and more, since this "
            f"tokenizer begins a document with {begin} tokens"
        )
    return tokenizer


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
    del chosen["begin_token"]  # the tokenizer's own entry says it
    chosen["text_patterns"] = list(options.text_patterns)
    return {
        "options": chosen,
        "sources": [
            {"spec": source.spec, "inputs": len(source.inputs), "fingerprint": source.fingerprint} for source in sources
        ],
    }


def _existing_set(
    out: Path,
    sources: list[Source],
    description: dict[str, Any],
    tokenizer: Tokenizer | None,
    report: Report,
    say: Say,
) -> Manifest:
    """The manifest of the complete set in `out`, when it is the one asked for."""
    advice = "choose another --out, or give --overwrite to replace it"
    try:
        manifest = load_manifest(out)
        for split in manifest.splits:
            PreparedSet(out, split).close()
    except ValueError as error:
        raise ValueError(f"{out} holds a damaged set ({error}); {advice}") from error
    # A set of an older version has no entry for an option that came later: it was made with today's default.
    defaults = asdict(PrepareOptions())
    there = {name: manifest.options.get(name, defaults[name]) for name in description["options"]}
    differences = [
        f"{name} is {there[name]!r} there and {value!r} here"
        for name, value in description["options"].items()
        if there[name] != value
    ]
    if [source.spec for source in manifest.sources] != [source.spec for source in sources]:
        differences.append("the sources are others")
    elif not differences:
        differences += changed_sources(out, manifest, sources, report, say)
    if tokenizer is not None and tokenizer.begin_ids != manifest.tokenizer.begin_ids:
        there, here = (list(found) or "none" for found in (manifest.tokenizer.begin_ids, tokenizer.begin_ids))
        differences.append(f"the tokens that begin a document are {there} there and {here} here (see --begin-token)")
    elif tokenizer is not None and tokenizer.hash != manifest.tokenizer.hash:
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
    say: Say,
) -> Manifest:
    if tokenizer is None:
        tokenizer = _train_tokenizer(sources, options, report, say)
    for source in sources:
        source.check(tokenizer)
    tokenizer.save(building / TOKENIZER_FOLDER)
    sync_folder(building / TOKENIZER_FOLDER)

    counts = [_Counts(passed_over=source.passed_over) for source in sources]
    total, done, longest = sum(source.total_bytes for source in sources), 0, 0
    writers = {split: ShardSetWriter(building, split, tokenizer.vocab_size, options.shard_bytes) for split in SPLITS}

    def write(split: str, document: EncodedDocument) -> None:
        source, count = sources[document.source].spec, counts[document.source]
        for part in _parts(document, options.max_tokens, source, tokenizer):
            count.documents += 1
            count.tokens += len(part.tokens)
            writers[split].add(part.tokens, id=part.id, source=source, answers=part.answers, questions=part.questions)

    assigner = SplitAssigner(options.valid_fraction)
    documents = encode_jobs(_numbered_jobs(sources), tokenizer, processes)
    try:
        for document in documents:
            count = counts[document.source]
            count.skipped_files += document.skipped_files
            sources[document.source].digests.update(document.digests)
            length = len(document.tokens) - len(tokenizer.begin_ids)
            longest = max(longest, length)
            if document.error is not None:
                if not options.skip_bad:
                    raise BadInputError(document.error)
                count.add_bad(document)
            elif document.is_empty:
                count.empty += 1
            elif length < options.min_tokens:
                count.too_short += 1
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

    for source in sources:
        for file in source.files:
            source.digests.setdefault(file.name, "")  # one that could not be read
    write_inputs(building, sources)
    return write_manifest(
        building,
        tokenizer=tokenizer.entry,
        options=description["options"],
        sources=[
            SourceEntry(**entry, **asdict(count), contents=contents_hash(source.digests))
            for entry, count, source in zip(description["sources"], counts, sources, strict=True)
        ],
        splits=splits,
    )


def _parts(
    document: EncodedDocument, max_tokens: int | None, source: str, tokenizer: Tokenizer
) -> list[EncodedDocument]:
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
    begin, text, end = np.split(document.tokens, [len(tokenizer.begin_ids), len(document.tokens) - 1])
    pieces = np.array_split(text, -(-len(text) // (max_tokens - len(begin) - len(end))))
    return [
        replace(document, id=f"{document.id}#{i}", tokens=np.concatenate([begin, piece, end]))
        for i, piece in enumerate(pieces)
    ]


def _train_tokenizer(sources: list[Source], options: PrepareOptions, report: Report, say: Say) -> Tokenizer:
    total, done = sum(source.total_bytes for source in sources if not source.synthetic), 0
    phase = "reading a sample for the tokenizer"
    report(phase, 0, total, 0)

    def advance(input_bytes: int) -> None:
        nonlocal done
        done += input_bytes
        report(phase, done, total, 0)

    def beat() -> None:  # the library does not say how far it is
        report("training the tokenizer on the sample", 0, 0, 0)

    texts = sample_texts(sources, options.tokenizer_sample_bytes, options.seed, advance, skip_bad=options.skip_bad)
    return train_bpe(texts, _vocab_size(options.tokenizer), beat=beat, say=say)


def _numbered_jobs(sources: list[Source]) -> Iterator[tuple[int, Job]]:
    for number, source in enumerate(sources):
        for job in source.jobs():
            yield number, job


def _refuse_empty(sources: list[Source], counts: list[_Counts], longest: int, min_tokens: int) -> None:
    for source, count in zip(sources, counts, strict=True):
        if count.documents:
            continue
        if not count.too_short + count.empty + count.bad_records + count.bad_files:
            raise ValueError(f"source {source.spec} is empty: it has no documents")
        why = [
            f"{count.empty:,} are empty" if count.empty else "",
            f"{count.bad_records:,} bad records and {count.bad_files:,} bad files are left out" if count.bad else "",
        ]
        reasons = "".join(f"; {reason}" for reason in why if reason)
        raise ValueError(
            f"source {source.spec}: none of its {count.too_short:,} documents has --min-tokens {min_tokens:,} "
            f"(the longest of all sources has {longest:,}){reasons}"
        )
