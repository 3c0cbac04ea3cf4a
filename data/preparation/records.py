"""Files with many documents, read record by record: lines of JSON, an array of JSON, parquet.

    .jsonl .ndjson    a record per line; blank lines are passed over, as every reader of such files does
    .json             the same where the first line is a whole object; else an array of records; else one record
    .parquet          a record per row (`data.preparation.parquet`)

and the first two compressed, with .gz or .zst behind. Every message names the file and the line, element or row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from data.files import FileError, decode_json, shown
from data.preparation.parquet import read_parquet
from data.preparation.streams import (
    BOM,
    COMPRESSED_SUFFIXES,
    FileInput,
    HashingReader,
    Record,
    lines,
    listed,
    refuse_other_contents,
    too_long,
)

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
RECORD_SUFFIXES = (*JSON_SUFFIXES, ".parquet")
"""The first three may have one of `COMPRESSED_SUFFIXES` behind. Small or capital letters."""


def without_compression(name: str) -> str:
    """The name in small letters, without a suffix of compression."""
    lower = name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        lower = lower.removesuffix(suffix)
    return lower


def is_record_file(name: str) -> bool:
    return without_compression(name).endswith(JSON_SUFFIXES) or name.lower().endswith(".parquet")


def read_records(file: FileInput, column: str, limit: int, digests: dict[str, str]) -> Iterator[Record]:
    """The records of a file, bad ones included; at the end its sha256 stands in `digests` under its name.

    Args:
        limit: bytes of the longest document.

    Raises:
        FileError: the file is damaged, ends early or is something else; its records so far have been given.
        OSError: it cannot be opened.
    """
    if file.path.name.lower().endswith(".parquet"):
        yield from read_parquet(file, column, limit, digests)
        return
    with HashingReader(file) as reader:
        try:
            yield from _read_json(file, reader, column, limit)
        except FileError:
            digests[file.name] = reader.finish()
            raise
        digests[file.name] = reader.finish()


def _read_json(file: FileInput, reader: HashingReader, column: str, limit: int) -> Iterator[Record]:
    stream = reader.contents
    whole = without_compression(file.path.name).endswith(".json")
    number, position, before, shown_file = 0, 0, b"", file.shown
    try:
        refuse_other_contents(stream.peek(4)[:4], file.shown)
        found = lines(stream, limit)
        while (line := next(found, b"")) != b"":
            number += 1
            line = line and line.removeprefix(BOM)
            if line is not None and (not line or line.isspace()):
                continue
            if whole and line is not None and not _is_object(line):
                before = line
                break
            whole = False
            where = f"{shown_file}, line {number}"
            advanced, position = reader.position - position, reader.position
            yield _record(line, column, where, number, advanced, limit)
        else:
            return
        contents = before + stream.read(limit + 1)
    except OSError as error:
        raise FileError(f"{file.shown} is damaged after line {number}: {error}") from error
    yield from _read_whole(file, contents, column, limit)


def _is_object(line: bytes) -> bool:
    """Whether the line looks like a whole object, not like the beginning of something that goes on."""
    stripped = line.strip()
    return stripped.startswith(b"{") and stripped.endswith(b"}")


def _read_whole(file: FileInput, contents: bytes, column: str, limit: int) -> Iterator[Record]:
    """An array of records, or one record on several lines."""
    if len(contents) > limit:
        raise FileError(
            f"{file.shown}: an array or object of more than {limit:,} bytes is not read: write a record per line "
            "(.jsonl), or see --max-document-bytes"
        )
    elements: list[Any] = [contents]
    if contents.lstrip().startswith(b"["):
        try:
            elements = msgspec.json.decode(contents, type=list[msgspec.Raw])
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            raise FileError(f"{file.shown} is damaged: {error}") from None
    for number, element in enumerate(elements, start=1):
        share = number * file.size // len(elements) - (number - 1) * file.size // len(elements)
        yield _record(bytes(element), column, f"{file.shown}, record {number}", number, share, limit)


def _record(line: bytes | None, column: str, where: str, number: int, input_bytes: int, limit: int) -> Record:
    if line is None:
        return Record(number, input_bytes, "", too_long(where, limit))
    try:
        return Record(number, input_bytes, _text(line, column, where))
    except FileError as error:
        return Record(number, input_bytes, "", str(error))


def _text(line: bytes, column: str, where: str) -> str:
    record = decode_json(line, dict[str, Any], where)
    if column not in record:
        raise FileError(f"{where}: no column {shown(column)}; it has {listed(record)} (see --text-column)")
    text = record[column]
    if not isinstance(text, str):
        holds = "null" if text is None else type(text).__name__
        raise FileError(f"{where}: column {shown(column)} holds {holds}, not text")
    return text
