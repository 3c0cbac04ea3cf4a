"""The jobs of sources, encoded, sent to their splits, cut, and written; whole sources or a part of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from data.preparation.options import PrepareOptions
from data.preparation.pool import EncodedDocument, encode_jobs
from data.preparation.sources import BadInputError, Job, Source
from data.prepared.manifest import SPLITS
from data.prepared.shard_writer import ShardSetWriter
from data.tokenizer.tokenizer import Tokenizer

_BAD_NAMED = 10
"""Messages of bad records and files that a manifest keeps, of each source."""
_MESSAGE_CHARACTERS = 300

Report = Callable[[str, int, int, int], None]
"""Called with (phase, input bytes done, input bytes in all, tokens so far); 0 in all: there is no telling."""
Units = list[tuple[int, int]]
"""Of each source the units [first, last)."""


@dataclass
class Counts:
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

    def join(self, other: Counts) -> None:
        """Add what came of the source's next part."""
        for name in ("documents", "tokens", "too_short", "empty", "skipped_files", "bad_records", "bad_files"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.bad = (self.bad + other.bad)[:_BAD_NAMED]


@dataclass
class Encoding:
    """What `encode` has counted."""

    counts: list[Counts]
    longest: int = 0
    """Tokens of the longest document, what begins one aside, left out or not."""


Assign = Callable[[EncodedDocument | None], list[tuple[str, EncodedDocument]]]
"""Told every document that is to be written, then None for the end; answers which can be written now, and where."""


def encode(
    building: Path,
    sources: list[Source],
    units: Units,
    total: int,
    options: PrepareOptions,
    tokenizer: Tokenizer,
    assign: Assign,
    processes: int,
    report: Report,
    wrote: Callable[[str, EncodedDocument, int, int], None] = lambda *_: None,
) -> tuple[dict[str, ShardSetWriter], Encoding]:
    """Write the documents of the units into shards in `building`; the writers are to be closed by the caller.

    Args:
        total: bytes of the units.
        assign: chooses the splits.
        wrote: is told split, document, and the numbers [first, stop) that it has in its split.

    Raises:
        ValueError: a document cannot be made, encoded or written.
        OSError: as `data.preparation.pool.encode_jobs`.
    """
    result = Encoding([Counts(passed_over=source.passed_over) for source in sources])
    counts, done = result.counts, 0
    writers = {split: ShardSetWriter(building, split, tokenizer.vocab_size, options.shard_bytes) for split in SPLITS}

    def write(split: str, document: EncodedDocument) -> None:
        source, count, writer = sources[document.source].spec, counts[document.source], writers[split]
        first = writer.documents
        for part in _parts(document, options.max_tokens, source, tokenizer):
            count.documents += 1
            count.tokens += len(part.tokens)
            writer.add(part.tokens, id=part.id, source=source, answers=part.answers, questions=part.questions)
        wrote(split, document, first, writer.documents)

    documents = encode_jobs(_numbered_jobs(sources, units), tokenizer, processes)
    try:
        for document in documents:
            count = counts[document.source]
            count.skipped_files += document.skipped_files
            sources[document.source].digests.update(document.digests)
            length = len(document.tokens) - len(tokenizer.begin_ids)
            result.longest = max(result.longest, length)
            if document.error is not None:
                if not options.skip_bad:
                    raise BadInputError(document.error)
                count.add_bad(document)
            elif document.is_empty:
                count.empty += 1
            elif length < options.min_tokens:
                count.too_short += 1
            else:
                for split, ready in assign(document):
                    write(split, ready)
            done += document.input_bytes
            report("encoding", done, total, sum(writer.tokens for writer in writers.values()))
        for split, ready in assign(None):
            write(split, ready)
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    finally:
        documents.close()
    for source, (first, last) in zip(sources, units, strict=True):
        for file in source.files_of(first, last):
            source.digests.setdefault(file.name, "")  # one that could not be read
    return writers, result


def _numbered_jobs(sources: list[Source], units: Units) -> Iterator[tuple[int, Job]]:
    for number, (source, (first, last)) in enumerate(zip(sources, units, strict=True)):
        for job in source.jobs(first, last):
            yield number, job


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


def refuse_empty(specs: list[str], counts: list[Counts], longest: int, min_tokens: int) -> None:
    """Raises: ValueError for a source that no document came of."""
    for spec, count in zip(specs, counts, strict=True):
        if count.documents:
            continue
        if not count.too_short + count.empty + count.bad_records + count.bad_files:
            raise ValueError(f"source {spec} is empty: it has no documents")
        why = [
            f"{count.empty:,} are empty" if count.empty else "",
            f"{count.bad_records:,} bad records and {count.bad_files:,} bad files are left out" if count.bad else "",
        ]
        reasons = "".join(f"; {reason}" for reason in why if reason)
        raise ValueError(
            f"source {spec}: none of its {count.too_short:,} documents has --min-tokens {min_tokens:,} "
            f"(the longest of all sources has {longest:,}){reasons}"
        )
