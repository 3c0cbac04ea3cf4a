"""A part of a set: what one of many machines makes of the same sources, and the file that says what it is.

The sources' units (files, sub-packages, numbered documents) are shared out in their order, so many bytes to each part,
and a part is a folder of its own, `DIR/parts/00003-of-00016`. `data.preparation.joining` makes one set of all of them,
the same bytes as one machine would have written. Nothing in a part depends on another one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import msgspec

from data.files import (
    FileError,
    convert,
    decode_json,
    file_name,
    inside,
    read_bytes,
    sealed,
    some,
    sync_folder,
    write_whole,
)
from data.preparation.building import PARTS_FOLDER, clear_building, locked, save_tokenizer
from data.preparation.encoding import Report, Units, encode
from data.preparation.identity import contents_hash, inputs_changed, write_inputs
from data.preparation.options import PrepareOptions, other_options
from data.preparation.pool import EncodedDocument
from data.preparation.sources import Source
from data.preparation.splits import SplitAssigner
from data.prepared.manifest import PART, Count, Manifest, Option, SourceEntry, SplitEntry, Text
from data.tokenizer.info import Sha256, TokenizerEntry
from data.tokenizer.tokenizer import Tokenizer

PART_FORMAT = 1
MOST_PARTS = 99_999
"""A part's name has five digits for each."""

_NAME = re.compile(r"(\d{5})-of-(\d{5})")


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A document that is nearer to the other split than all before it in its part."""

    first: Count
    stop: Count
    """Its numbers in its split, [first, stop): several where it was cut."""
    place: Annotated[float, msgspec.Meta(ge=0, le=1)]
    """Its hash (`SplitAssigner.place`)."""


class Leading(msgspec.Struct, kw_only=True):
    """The documents of a part before the first one of its other split.

    A set of several documents has both splits: while the hashes send all of them to one, `SplitAssigner` holds the one
    back that is nearest to the other, and writes the one that it held before. Which ones these are is known when all
    parts are; they are among the parts' own candidates, of which a part of n documents has about log(n).
    """

    split: Text | None = None
    """Theirs; None where there are none."""
    whole: Count = 0
    """How many, before any is cut."""
    documents: Count = 0
    """How many as written: they are the split's first ones."""
    candidates: list[Candidate] = []
    ended: bool = False
    """The part has documents of the other split."""

    def add(self, split: str, document: EncodedDocument, first: int, stop: int) -> None:
        """The part's next document, with its numbers in its split."""
        if self.ended or self.split not in (None, split):
            self.ended = True
            return
        self.split, self.whole, self.documents = split, self.whole + 1, stop
        candidate = Candidate(first=first, stop=stop, place=SplitAssigner.place(document))
        if not self.candidates or nearer(split, candidate, self.candidates[-1]):
            self.candidates.append(candidate)


def nearer(split: str, candidate: Candidate, before: Candidate) -> bool:
    """Whether a later document of `split` is nearer to the other split than one before it."""
    return candidate.place < before.place if split == "train" else candidate.place > before.place


class PartRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`part.json`."""

    format_version: int
    part: Annotated[int, msgspec.Meta(ge=1, le=MOST_PARTS)]
    parts: Annotated[int, msgspec.Meta(ge=1, le=MOST_PARTS)]
    tokenizer: TokenizerEntry
    options: dict[Text, Option]
    sources: list[SourceEntry]
    """All of the set's; counts and contents are this part's."""
    splits: dict[Text, SplitEntry]
    longest: Count
    leading: Leading
    sha256: Sha256

    @property
    def manifest(self) -> Manifest:
        """For whoever reads the part as a set."""
        return Manifest(format_version=0, tokenizer=self.tokenizer, splits=self.splits)


def part_name(part: int, parts: int) -> str:
    return f"{part:05d}-of-{parts:05d}"


def shared_out(sources: list[Source], part: int, parts: int) -> tuple[Units, int]:
    """The units of part `part` of `parts`, counted from 1, and how many bytes they have.

    A unit belongs to the part in whose share of all bytes it begins: every unit to one part, in order.
    """
    total, base = sum(source.total_bytes for source in sources), 0
    low, high = ((total * edge) // parts for edge in (part - 1, part))
    units, size = [], 0
    for source in sources:
        # The last part takes what begins at the very end: empty files.
        first = source.first_unit(max(low - base, 0))
        last = source.units if part == parts else source.first_unit(max(high - base, 0))
        units.append((first, last))
        base += source.total_bytes
        if source.units == len(source.inputs):
            size += sum(length for _, length in source.inputs[first:last])
        else:
            size += source.total_bytes * (last - first) // source.units
    return units, size


def read_part(folder: Path) -> PartRecord:
    """Raises: ValueError where the folder is no part, an unfinished or a changed one."""
    file = folder / PART
    try:
        contents = decode_json(read_bytes(inside(folder, PART, str(folder))), dict[str, Any], str(file))
    except FileNotFoundError:
        raise ValueError(f"{file_name(folder)} is no finished part of a set: there is no {PART}") from None
    if contents.get("format_version") != PART_FORMAT:
        raise FileError(f"{file} has format_version {contents.get('format_version')}; this version reads {PART_FORMAT}")
    if contents.get("sha256") != sealed(contents)["sha256"]:
        raise FileError(f"{file} was changed after it was written (its SHA-256 differs)")
    return convert(contents, PartRecord, str(file))


def found_parts(out: Path) -> list[tuple[Path, PartRecord]]:
    """The finished parts of the set in `out`, all of them, in order.

    Raises:
        ValueError: there are none, some are missing (they are named), or they do not belong together.
    """
    folder = out / PARTS_FOLDER
    named = {found: path for path in folder.glob("*-of-*") if (found := _NAME.fullmatch(path.name))}
    if not named:
        raise ValueError(f"{file_name(folder)} holds no parts; `infini prepare SOURCE... --part 1/N` makes them")
    counts = sorted({int(found[2]) for found in named})
    if len(counts) > 1:
        kinds = " and of ".join(map(str, counts))
        raise ValueError(f"{file_name(folder)} holds parts of {kinds}: leave one kind there")
    there = {int(found[1]): path for found, path in named.items()}
    missing = [number for number in range(1, counts[0] + 1) if number not in there]
    if missing:
        few = some(map(str, missing), 8)
        raise ValueError(f"{file_name(folder)}: of {counts[0]:,} parts these are missing: {few}")
    parts = [(there[number], read_part(there[number])) for number in range(1, counts[0] + 1)]
    first = parts[0][1]
    for path, record in parts:
        if (record.part, record.parts) != tuple(map(int, _NAME.fullmatch(path.name).groups())):
            raise FileError(f"{path / PART} is that of part {record.part} of {record.parts}")
        for what, there_, here in (
            ("tokenizers", record.tokenizer, first.tokenizer),
            ("options", record.options, first.options),
            ("sources", _identities(record), _identities(first)),
        ):
            if there_ != here:
                raise ValueError(f"{file_name(path)} and {file_name(parts[0][0])} were made with different {what}")
    return parts


def _identities(record: PartRecord) -> list[tuple[str, int, str]]:
    return [(source.spec, source.inputs, source.fingerprint) for source in record.sources]


@contextlib.contextmanager
def _building(folder: Path) -> Iterator[Path]:
    """The hidden folder in which a part is built; what a run that was killed has left there goes first.

    Raises:
        ValueError: another process builds the part, or somebody's files lie there.
    """
    building = folder.with_name(f".{folder.name}")
    building.mkdir(parents=True, exist_ok=True)
    with locked(building):
        if left := clear_building(building, also=(PART,)):
            raise ValueError(f"{file_name(building)} holds other files ({file_name(left[0])}, ...); remove them")
        try:
            yield building
        except BaseException:
            clear_building(building, also=(PART,))
            with contextlib.suppress(OSError):
                building.rmdir()
            raise


def prepare_part(
    out: Path,
    part: int,
    parts: int,
    sources: list[Source],
    options: PrepareOptions,
    tokenizer: Tokenizer,
    description: dict[str, Any],
    processes: int,
    report: Report,
) -> tuple[PartRecord, bool]:
    """Write a part into its folder in `out`; returns its record, and False where it was there already.

    Raises:
        ValueError: as `data.preparation.prepare.prepare`, or there is another part of that name.
    """
    folder = out / PARTS_FOLDER / part_name(part, parts)
    units, total = shared_out(sources, part, parts)
    if os.path.lexists(folder):
        record = read_part(folder)
        _refuse_other(folder, record, sources, units, tokenizer, description)
        return record, False
    for source in sources:
        source.check(tokenizer)
    leading = Leading()
    assigner = SplitAssigner(options.valid_fraction)

    def assign(document: EncodedDocument | None) -> list[tuple[str, EncodedDocument]]:
        return [] if document is None else [(assigner.split(document), document)]

    with _building(folder) as building:
        save_tokenizer(building, tokenizer)
        writers, encoding = encode(
            building, sources, units, total, options, tokenizer, assign, processes, report, leading.add
        )
        splits = {split: writer.close() for split, writer in writers.items()}
        write_inputs(building, sources, units)
        content: dict[str, Any] = {
            "format_version": PART_FORMAT,
            "part": part,
            "parts": parts,
            "tokenizer": tokenizer.entry,
            "options": description["options"],
            "sources": [
                SourceEntry(**entry, **asdict(count), contents=contents_hash(source.digests))
                for entry, count, source in zip(description["sources"], encoding.counts, sources, strict=True)
            ],
            "splits": splits,
            "longest": encoding.longest,
            "leading": leading,
        }
        content = sealed(msgspec.to_builtins(content))
        write_whole(building / PART, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        sync_folder(building)
        os.rename(building, folder)
        sync_folder(folder.parent)
    return convert(content, PartRecord, str(folder / PART)), True


def _refuse_other(
    folder: Path,
    record: PartRecord,
    sources: list[Source],
    units: Units,
    tokenizer: Tokenizer,
    description: dict[str, Any],
) -> None:
    differences = other_options(record.options, description["options"])
    if _identities(record) != [tuple(entry.values()) for entry in description["sources"]]:
        differences.append("the sources, or their files' names or sizes, are others")
    elif changed := inputs_changed(folder, sources, units):
        differences.append(changed)
    if tokenizer.entry != record.tokenizer:
        differences.append("the tokenizer is another one")
    if differences:
        raise ValueError(f"{file_name(folder)} is a part of another set ({'; '.join(differences)}); remove it")
