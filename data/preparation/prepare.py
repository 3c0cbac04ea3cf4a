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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.files import FileError, file_name, is_store, is_utf8
from data.preparation.building import (
    building_in,
    clear_remains,
    locked,
    move_into_place,
    refuse_foreign,
    save_tokenizer,
)
from data.preparation.encoding import Report, encode, refuse_empty
from data.preparation.identity import changed_sources, contents_hash, write_inputs
from data.preparation.joining import join
from data.preparation.options import PrepareOptions, other_options
from data.preparation.parts import PartRecord, found_parts, prepare_part
from data.preparation.pool import EncodedDocument
from data.preparation.sampling import sample_texts
from data.preparation.sources import BadInputError, Source, open_sources, parse_size
from data.preparation.splits import SplitAssigner
from data.prepared.manifest import MANIFEST, Manifest, SourceEntry, index_name, load_manifest, write_manifest
from data.prepared.shards import PreparedSet
from data.tokenizer.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
Say = Callable[[str], None]
"""Called with what a user should know, a line each."""


@dataclass
class Prepared:
    manifest: Manifest
    built: bool
    """False: a complete set of the same sources and options was there already."""


@dataclass
class PreparedParts:
    """What came of a part, or of several one after the other."""

    records: list[PartRecord]
    built: int
    """How many of them were not there already."""


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
    out, sources, tokenizer, description = _open(specs, out, options, processes, say)
    with locked(out):
        clear_remains(out)
        if (out / MANIFEST).exists() and not overwrite:
            return Prepared(_existing_set(out, sources, description, tokenizer, report, say), built=False)
        refuse_foreign(out)
        with _disk(out), building_in(out) as building, _with_advice():
            manifest = _build(building, sources, options, tokenizer, description, processes, report, say)
            move_into_place(building, out)
    return Prepared(manifest, built=True)


def prepare_parts(
    specs: Sequence[str],
    out: Path | str,
    options: PrepareOptions,
    numbers: range,
    parts: int,
    *,
    processes: int = 1,
    report: Report = lambda *_: None,
    say: Say = lambda _: None,
) -> PreparedParts:
    """Make the parts `numbers` (counted from 1) of `parts` of a set, one after the other; finished ones stay.

    Other processes and machines may make other parts in the same folder meanwhile.

    Raises:
        ValueError: as `prepare`; the tokenizer is to be trained; or a part of another set is there.
        OSError: as `prepare`.
    """
    out, sources, tokenizer, description = _open(specs, out, options, processes, say)
    if tokenizer is None:
        raise ValueError(
            f"--tokenizer {options.tokenizer} with --part: every part would read all sources to train the same one; "
            "train it once (`infini prepare SAMPLE... --tokenizer train:N --out DIR`) and give its folder"
        )
    made = []
    for number in numbers:
        for source in sources:
            source.forget()
        with _disk(out), _with_advice():
            made.append(prepare_part(out, number, parts, sources, options, tokenizer, description, processes, report))
        if not made[-1][1]:
            say(f"part {number} of {parts} is there already")
    return PreparedParts([record for record, _ in made], sum(built for _, built in made))


def join_parts(
    out: Path | str, *, processes: int = 1, overwrite: bool = False, report: Report = lambda *_: None
) -> Prepared:
    """Make one set of the parts in `out`, the same as `prepare` would have made; the parts stay.

    Raises:
        ValueError: parts are missing, damaged, or do not belong together; or `out` holds a set or something else.
        OSError: the disk is full.
    """
    out = Path(out)
    if not out.is_dir():
        raise ValueError(f"--out {file_name(out)} is no folder with parts")
    with locked(out):
        clear_remains(out)
        parts = found_parts(out)
        if (out / MANIFEST).exists() and not overwrite:
            raise ValueError(f"{file_name(out)} holds a set already; --overwrite replaces it by that of its parts")
        refuse_foreign(out)
        with _disk(out), building_in(out) as building:
            manifest = join(building, parts, processes, report)
            move_into_place(building, out)
    return Prepared(manifest, built=True)


def _open(
    specs: Sequence[str], out: Path | str, options: PrepareOptions, processes: int, say: Say
) -> tuple[Path, list[Source], Tokenizer | None, dict[str, Any]]:
    """The folder, made when needed; the sources; the tokenizer, None when it is to be trained; and the description."""
    options.check()
    if processes < 1:
        raise ValueError(f"--processes {processes}: valid are 1 and more")
    if not specs:
        raise ValueError("no source given; valid are files, folders, python:PACKAGE,... and passkey:N,length=LO..HI")
    if is_store(out):
        raise ValueError(f"--out {out}: a set is made on a disk; copy it to the store, {MANIFEST} last")
    out = Path(out)
    if not is_utf8(out):
        raise ValueError(f"--out {file_name(out)}: the name is not UTF-8, so no configuration could say it")
    with _with_advice():
        sources = open_sources(specs, options)
    tokenizer = _given_tokenizer(options)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {file_name(out)} is a file; it must be a folder, or not exist")
    for source in sources:
        for note in source.notes:
            say(note)
    out.mkdir(parents=True, exist_ok=True)
    return out, sources, tokenizer, _describe(sources, options)


@contextlib.contextmanager
def _disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise OSError(
                error.errno, f"the disk is full: the set in {out} could not be finished and was removed"
            ) from error
        raise


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
    differences = other_options(there, description["options"])
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
    save_tokenizer(building, tokenizer)

    units = [(0, source.units) for source in sources]
    assigner = SplitAssigner(options.valid_fraction)

    def assign(document: EncodedDocument | None) -> list[tuple[str, EncodedDocument]]:
        return assigner.finish() if document is None else assigner.add(document)

    total = sum(source.total_bytes for source in sources)
    writers, encoding = encode(building, sources, units, total, options, tokenizer, assign, processes, report)
    try:
        refuse_empty([source.spec for source in sources], encoding.counts, encoding.longest, options.min_tokens)
        splits = {split: writer.close() for split, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    if not splits["valid"].documents:
        del splits["valid"]
        (building / index_name("valid")).unlink()

    write_inputs(building, sources, units)
    return write_manifest(
        building,
        tokenizer=tokenizer.entry,
        options=description["options"],
        sources=[
            SourceEntry(**entry, **asdict(count), contents=contents_hash(source.digests))
            for entry, count, source in zip(description["sources"], encoding.counts, sources, strict=True)
        ],
        splits=splits,
    )


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
