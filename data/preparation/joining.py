"""One set of all parts: the bytes that one machine would have written, at the speed of a copy.

Shards are numbered through, documents too, and a shard ends where the next document would not fit; so what stands in
which shard follows from the members' sizes alone. These are read first, and then every shard is written by itself,
several at a time. Each document's tokens are compared with the hash that they carry on their way.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.files import FileError
from data.preparation.building import save_tokenizer
from data.preparation.encoding import Counts, Report, refuse_empty
from data.preparation.identity import contents_hash, join_inputs
from data.preparation.parts import Candidate, Leading, PartRecord, nearer, read_part
from data.preparation.pool import follow_parent
from data.prepared.document_index import document_key
from data.prepared.manifest import SPLITS, Manifest, ShardEntry, SourceEntry, shard_name, write_manifest
from data.prepared.questions import to_rows
from data.prepared.shard_writer import IndexWriter, ShardWriter, document_bytes, npy_header, overflows
from data.prepared.shards import PreparedSet, token_dtype
from data.tokenizer.tokenizer import load_tokenizer

SIZES = "reading sizes"
"""The phase in which documents are counted, not bytes."""
_REPORTED = 4096
_OPEN_PARTS = 3
"""A shard may have the end of one part and the beginning of the next; a document that was held back is of a third."""


class Piece(NamedTuple):
    """Documents [first, stop) of one part's split."""

    part: int
    """Counted from 0."""
    split: str
    """That they have in the part."""
    first: int
    stop: int


@dataclass(frozen=True)
class ShardPlan:
    """A shard that is to be written."""

    name: str
    first: int
    """Number in the split of its first document."""
    pieces: tuple[Piece, ...]
    bytes: int
    """Of its documents."""


def order(leading: list[Leading], documents: list[dict[str, int]], valid_fraction: float) -> dict[str, list[Piece]]:
    """In which order the parts' documents stand in the splits: as if one process had met them all.

    Args:
        leading: of each part.
        documents: of each part by split.
        valid_fraction: as the option.
    """
    pieces = {
        split: [Piece(part, split, 0, counts[split]) for part, counts in enumerate(documents)] for split in SPLITS
    }
    begun = [part for part, one in enumerate(leading) if one.split is not None]
    if not valid_fraction or not begun:
        return _without_empty(pieces)
    # `SplitAssigner` over all parts. Until the other split gets a document, each one that is nearest to it so far is
    # held back, and the one that was held before is written in its place.
    split = leading[begun[0]].split
    assert split is not None
    held: tuple[Piece, Candidate] | None = None
    found: list[Piece] = []
    whole, behind = 0, len(documents)  # behind: the first part whose documents of the split are no leading ones
    for part, one in enumerate(leading):
        if one.split not in (None, split):
            found += [held[0]] if held else []
            held, behind = None, part
            break
        at = 0
        for candidate in one.candidates:
            if held is None or nearer(split, candidate, held[1]):
                found.append(Piece(part, split, at, candidate.first))
                found += [held[0]] if held else []
                held = Piece(part, split, candidate.first, candidate.stop), candidate
                at = candidate.stop
        whole += one.whole
        found.append(Piece(part, split, at, one.documents))
        if one.ended:
            found += [held[0]] if held else []
            found.append(Piece(part, split, one.documents, documents[part][split]))
            held, behind = None, part + 1
            break
    pieces[split] = found + pieces[split][behind:]
    if held is not None:  # the other split has nothing
        pieces["valid" if split == "train" and whole > 1 else "train"].append(held[0])
    return _without_empty(pieces)


def _without_empty(pieces: dict[str, list[Piece]]) -> dict[str, list[Piece]]:
    return {split: [piece for piece in found if piece.first < piece.stop] for split, found in pieces.items()}


class Parts:
    """The parts' documents as they lie in their shards; few parts are open at a time."""

    def __init__(self, folders: list[Path]) -> None:
        self._folders = folders
        self._open: OrderedDict[tuple[int, str], PreparedSet] = OrderedDict()

    def set(self, piece: Piece) -> PreparedSet:
        """The part that a piece is of."""
        found = self._open.pop(key := (piece.part, piece.split), None)
        if found is None:
            if len(self._open) >= _OPEN_PARTS:
                self._open.popitem(last=False)[1].close()
            folder = self._folders[piece.part]
            found = PreparedSet(folder, piece.split, manifest=read_part(folder).manifest)
        self._open[key] = found
        return found

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


def _members(part: PreparedSet, number: int) -> tuple[bytes, bytes]:
    """The JSON and the tokens' bytes of a document.

    Raises:
        FileError: the tokens are not those of its hash.
    """
    text, tokens = part.metadata_text(number), part.token_bytes(number)
    # Quotes inside of a name are escaped: this is the key.
    _, found, rest = text.partition(b'"hash": "')
    if not found or hashlib.sha256(tokens).hexdigest().encode() != rest[:64]:
        raise FileError(f"{part.document_name(number)}: its tokens are not those of its hash: the part is damaged")
    return text, tokens


def join(building: Path, parts: list[tuple[Path, PartRecord]], processes: int, report: Report) -> Manifest:
    """Write the set of all parts into `building`.

    Raises:
        ValueError: a part is damaged, or a source has no documents.
        OSError: the disk would not have it.
    """
    first = parts[0][1]
    counts = [Counts(passed_over=dict(source.passed_over)) for source in first.sources]
    for _, record in parts:
        for count, source in zip(counts, record.sources, strict=True):
            count.join(source)
    specs = [source.spec for source in first.sources]
    refuse_empty(specs, counts, max(record.longest for _, record in parts), int(first.options["min_tokens"]))
    digests = join_inputs(building, [folder for folder, _ in parts], len(specs))
    tokenizer = load_tokenizer(parts[0][0])
    save_tokenizer(building, tokenizer)

    folders = [folder for folder, _ in parts]
    documents = [{split: record.splits[split].documents for split in SPLITS} for _, record in parts]
    ordered = order([record.leading for _, record in parts], documents, float(first.options["valid_fraction"]))
    opened = Parts(folders)
    plans = {
        split: _plan(split, pieces, opened, int(first.options["shard_bytes"]), report)
        for split, pieces in ordered.items()
    }
    total, done = sum(plan.bytes for found in plans.values() for plan in found), 0
    splits = {}
    for split, found in plans.items():
        if not found:
            continue
        index, shards = IndexWriter(building, split), []
        try:
            for plan, (entry, offsets) in zip(found, _written(found, building, folders, processes), strict=True):
                _index(index, len(shards), plan, offsets, opened)
                shards.append(entry)
                done += plan.bytes
                report("joining", done, total, 0)
            splits[split] = index.close(shards)
        except BaseException:
            index.abandon()
            raise
    opened.close()
    return write_manifest(
        building,
        tokenizer=first.tokenizer,
        options=first.options,
        splits=splits,
        sources=[
            SourceEntry(
                spec=source.spec,
                inputs=source.inputs,
                fingerprint=source.fingerprint,
                contents=contents_hash(digests[number]) or source.contents,
                **asdict(count),
            )
            for number, (source, count) in enumerate(zip(first.sources, counts, strict=True))
        ],
    )


def _plan(split: str, pieces: list[Piece], parts: Parts, shard_bytes: int, report: Report) -> list[ShardPlan]:
    """Which documents stand in which shard."""
    plans: list[ShardPlan] = []
    inside: list[Piece] = []
    offset = number = begun = 0
    total = sum(piece.stop - piece.first for piece in pieces)

    def close() -> None:
        nonlocal inside, offset, begun
        plans.append(ShardPlan(shard_name(split, len(plans)), begun, tuple(inside), offset))
        inside, offset, begun = [], 0, number

    for piece in pieces:
        part, start = parts.set(piece), piece.first
        dtype = token_dtype(part.vocab_size)
        for at in range(piece.first, piece.stop):
            tokens = int(part.lengths[at])
            text, npy = part.metadata_bytes(at), len(npy_header(tokens, dtype)) + tokens * dtype.itemsize
            if offset and overflows(offset, text, npy, shard_bytes):
                if start < at:
                    inside.append(piece._replace(first=start, stop=at))
                start = at
                close()
            offset += document_bytes(text, npy)
            number += 1
            if number % _REPORTED == 0:
                report(SIZES, number, total, 0)
        inside.append(piece._replace(first=start))
    if inside:
        close()
    return plans


def _written(
    plans: list[ShardPlan], building: Path, folders: list[Path], processes: int
) -> Iterator[tuple[ShardEntry, np.ndarray]]:
    """Every shard's entry, and where its documents' tokens begin, in order."""
    if processes == 1 or len(plans) == 1:
        _start(building, folders)
        yield from map(_write, plans)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_process, (building, folders)) as executor:
        under_way = deque(executor.submit(_write, plan) for plan in plans[: 2 * processes])
        for plan in [*plans[2 * processes :], *[None] * len(under_way)]:
            yield under_way.popleft().result()
            if plan is not None:
                under_way.append(executor.submit(_write, plan))


_building: Path | None = None
_parts: Parts | None = None
"""Of the process that writes shards: opening a part takes a second or so a million documents."""


def _start(building: Path, folders: list[Path]) -> None:
    global _building, _parts
    if _parts is not None:
        _parts.close()
    _building, _parts = building, Parts(folders)


def _start_process(building: Path, folders: list[Path]) -> None:
    follow_parent()
    _start(building, folders)


def _write(plan: ShardPlan) -> tuple[ShardEntry, np.ndarray]:
    assert _building is not None and _parts is not None
    writer = ShardWriter(_building, plan.name)
    offsets: list[int] = []
    try:
        for piece in plan.pieces:
            part = _parts.set(piece)
            dtype = token_dtype(part.vocab_size)
            for number in range(piece.first, piece.stop):
                text, tokens = _members(part, number)
                count = len(tokens) // dtype.itemsize
                header = npy_header(count, dtype)
                key = document_key(plan.first + len(offsets))
                offsets.append(writer.add(key, text, header + tokens, len(header), count))
        return writer.close(), np.array(offsets, dtype=np.int64)
    except BaseException:
        writer.abandon()
        raise


def _index(index: IndexWriter, shard: int, plan: ShardPlan, offsets: np.ndarray, parts: Parts) -> None:
    at = 0
    for piece in plan.pieces:
        part = parts.set(piece)
        for number in range(piece.first, piece.stop):
            edges = [edge for span in part.answers(number) for edge in span]
            index.add(shard, int(offsets[at]), int(part.lengths[number]), edges, to_rows(part.questions(number)))
            at += 1
