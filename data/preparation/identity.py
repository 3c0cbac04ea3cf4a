"""Are the sources still those that a set was made of?

A set records, for each source, one hash over the contents of its files (in the manifest), and for each file its size,
its times and its SHA-256 (in `inputs.parquet`). A file with the size and both times of then is taken for the same,
which reads nothing; any other file is read and its hash compared, so one that was only touched or copied is no
difference. The time of the inode's last change is among them: a tool that puts a file's own time back cannot set it.
The table may be lost or damaged: then everything is read. It is believed only where its hashes add up to the
manifest's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data.files import FileError, inside, open_regular, some, writing
from data.preparation.sources import Source
from data.preparation.streams import FileInput, hash_file
from data.prepared.manifest import Manifest, SourceEntry

INPUTS = "inputs.parquet"

_SCHEMA = pa.schema(
    [
        ("source", pa.int32()),
        ("name", pa.string()),
        ("bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("ctime_ns", pa.int64()),
        ("sha256", pa.string()),
    ]
)
_NAMES_SHOWN = 3


def contents_hash(digests: dict[str, str]) -> str | None:
    """One hash for a source's contents: of its files' names and hashes; None where nothing is read."""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest() if digests else None


def write_inputs(folder: Path, sources: list[Source], units: list[tuple[int, int]]) -> None:
    """Write the table of all files that were read: those of each source's units [first, last).

    Raises:
        OSError: the disk would not have it.
    """
    # Column by column: a corpus may have millions of files.
    found = [
        (number, source, file)
        for number, (source, (first, last)) in enumerate(zip(sources, units, strict=True))
        for file in source.files_of(first, last)
    ]
    columns = [
        [number for number, _, _ in found],
        [file.name for _, _, file in found],
        [file.size for _, _, file in found],
        [file.mtime_ns for _, _, file in found],
        [file.ctime_ns for _, _, file in found],
        [source.digests.get(file.name, "") for _, source, file in found],
    ]
    _write(folder, pa.table(columns, schema=_SCHEMA))


def _write(folder: Path, table: pa.Table) -> None:
    with writing(folder / INPUTS) as file:
        pq.write_table(table, file, compression="zstd")


def join_inputs(folder: Path, parts: list[Path], sources: int) -> list[dict[str, str]]:
    """Write the table of all parts' files into `folder`; returns each source's sha256 by name.

    Raises:
        ValueError: a part's table is missing or damaged.
    """
    tables = []
    for part in parts:
        table = _read(part)
        if table is None:
            raise FileError(f"{part / INPUTS} is missing or damaged: it says what the part was made of")
        tables.append(table)
    table = pa.concat_tables(tables).sort_by("source")  # stable: a source's files stay in order
    _write(folder, table.combine_chunks())
    digests: list[dict[str, str]] = [{} for _ in range(sources)]
    for number, name, sha256 in zip(*(table[name].to_pylist() for name in ("source", "name", "sha256")), strict=True):
        digests[number][name] = sha256
    return digests


def inputs_changed(folder: Path, sources: list[Source], units: list[tuple[int, int]]) -> str | None:
    """The first file that is another one than a part in `folder` was made of, by size and times; None where none is."""
    table = _read(folder)
    if table is None:
        return f"{INPUTS} is missing or damaged"
    rows = {(row["source"], row["name"]): row for row in table.to_pylist()}
    for number, (source, (first, last)) in enumerate(zip(sources, units, strict=True)):
        for file in source.files_of(first, last):
            row = rows.get((number, file.name))
            if row is None or (row["bytes"], row["mtime_ns"]) != (file.size, file.mtime_ns):
                return f"{file.name} was written to since"
    return None


class _Row(NamedTuple):
    bytes: int
    mtime_ns: int
    ctime_ns: int
    sha256: str


def changed_sources(
    folder: Path,
    manifest: Manifest,
    sources: list[Source],
    report: Callable[[str, int, int, int], None],
    say: Callable[[str], None],
) -> list[str]:
    """How sources differ from what the set in `folder` was made of: a text for each one that does.

    Args:
        report: is told (phase, bytes done, bytes in all, 0) while files are read.
        say: is told what could not be compared, and what was only touched.
    """
    recorded = _read_inputs(folder, manifest)
    changes = []
    for number, (source, entry) in enumerate(zip(sources, manifest.sources, strict=True)):
        there = recorded.get(number, {})
        names = _differing_names(source, entry, there)
        if names is not None:
            changes.append(f"files of {source.spec} have changed{names}")
            continue
        if not entry.contents:
            if source.files or source.digests:
                say(
                    f"{source.spec}: names and sizes are those of the set; contents were not compared, because the "
                    "version that made the set did not record them"
                )
            continue
        changed = _changed_contents(source, entry, there, report, say)
        if changed:
            changes.append(f"files of {source.spec} have changed{changed}")
    return changes


def _differing_names(source: Source, entry: SourceEntry, there: dict[str, _Row]) -> str | None:
    """Which names or sizes are others; None where none are."""
    if (entry.inputs, entry.fingerprint) == (len(source.inputs), source.fingerprint):
        return None
    here = {file.name: file.size for file in source.files}
    return _named(
        [f"{name} is new" for name in here if name not in there]
        + [f"{name} is gone" for name in there if name not in here]
        + [name for name in here if name in there and here[name] != there[name].bytes]
        if there
        else []
    )


def _changed_contents(
    source: Source,
    entry: SourceEntry,
    there: dict[str, _Row],
    report: Callable[[str, int, int, int], None],
    say: Callable[[str], None],
) -> str:
    """Which files have other contents; empty where none have."""
    digests = dict(source.digests)
    touched = [file for file in source.files if not _is_as_recorded(file, there.get(file.name))]
    total, done = sum(file.size for file in touched), 0
    digests.update({file.name: there[file.name].sha256 for file in source.files if file.name in there})
    changed = []
    for file in touched:
        report("comparing the sources", done, total, 0)
        digest = _digest(file)
        if digests.setdefault(file.name, digest) != digest:
            changed.append(file.name)
        digests[file.name] = digest
        done += file.size
    if contents_hash(digests) == entry.contents:
        if touched:
            say(f"{source.spec}: {len(touched):,} files have other times and the same contents (read and compared)")
        return ""
    return _named(changed or list(source.digests)) or ": contents of equal size are others"


def _is_as_recorded(file: FileInput, row: _Row | None) -> bool:
    return row is not None and (file.size, file.mtime_ns, file.ctime_ns) == row[:3]


def _digest(file: FileInput) -> str:
    try:
        return hash_file(file)
    except (FileError, OSError):
        return ""


def _read_inputs(folder: Path, manifest: Manifest) -> dict[int, dict[str, _Row]]:
    """The rows by source and name, of the sources whose hashes add up to what the manifest says."""
    table = _read(folder)
    if table is None:
        return {}
    try:
        numbers, names, *columns = (column.to_pylist() for column in table.columns)
    except UnicodeDecodeError:
        return {}
    found: dict[int, dict[str, _Row]] = {}
    for number, name, *row in zip(numbers, names, *columns, strict=True):
        found.setdefault(number, {})[name] = _Row(*row)
    return {
        number: files
        for number, files in found.items()
        if 0 <= number < len(manifest.sources)
        and contents_hash({name: row.sha256 for name, row in files.items()}) == manifest.sources[number].contents
    }


def _read(folder: Path) -> pa.Table | None:
    """The table; None where it is missing or damaged."""
    try:
        with open_regular(inside(folder, INPUTS, str(folder))) as file:
            table = pq.read_table(file)
    except (FileError, OSError, pa.ArrowException):
        return None
    return table if table.schema.equals(_SCHEMA) and not any(column.null_count for column in table.columns) else None


def _named(names: Iterable[str]) -> str:
    listed = some(names, _NAMES_SHOWN)
    return f": {listed}" if listed else ""
