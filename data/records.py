"""Files with many documents: `.jsonl`, `.jsonl.gz`, `.jsonl.zst` and `.parquet`, streamed record by record.

Every error names the file and the line or row.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_PARQUET_ROWS = 256


def is_record_file(name: str) -> bool:
    return name.endswith(RECORD_SUFFIXES)


def read_records(path: Path, column: str) -> Iterator[tuple[int, int, str]]:
    """Yield (line or row counted from 1, bytes of the file used up for it, text) for every record.

    Raises:
        ValueError: the file is damaged or ends early, or a record has no text in `column`.
    """
    return _read_parquet(path, column) if path.name.endswith(".parquet") else _read_jsonl(path, column)


def _read_jsonl(path: Path, column: str) -> Iterator[tuple[int, int, str]]:
    compression = _COMPRESSION.get(path.suffix)
    number, position = 0, 0
    with path.open("rb") as raw:
        # Arrow's decompressor, because it takes an input that ends early for an error and zstandard's does not.
        stream = (
            io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), compression))
            if compression
            else raw
        )
        while True:
            try:
                line = stream.readline()
            except OSError as error:
                raise ValueError(f"{path} is damaged after line {number}: {error}") from error
            if not line:
                break
            number += 1
            if line.isspace():
                continue
            advanced, position = raw.tell() - position, raw.tell()
            yield number, advanced, _record_text(line, column, f"{path}, line {number}")


def _record_text(line: bytes, column: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not a JSON record in UTF-8: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a record must be a JSON object, not {type(record).__name__}")
    if column not in record:
        raise ValueError(f"{where}: no column {column!r}; it has {', '.join(map(repr, record))} (see --text-column)")
    text = record[column]
    if not isinstance(text, str):
        raise ValueError(f"{where}: column {column!r} holds {type(text).__name__}, not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: column {column!r} holds half of a surrogate pair at character {error.start}"
        ) from None
    return text


def open_parquet(path: Path, column: str) -> pq.ParquetFile:
    """Open a file and check that it has texts in `column`."""
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    schema = file.schema_arrow
    if column not in schema.names:
        raise ValueError(
            f"{path}: no column {column!r}; it has {', '.join(map(repr, schema.names))} (see --text-column)"
        )
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{path}: column {column!r} holds {kind}, not text")
    return file


def _read_parquet(path: Path, column: str) -> Iterator[tuple[int, int, str]]:
    size = path.stat().st_size
    with open_parquet(path, column) as file:
        rows, row = file.metadata.num_rows, 0
        batches = file.iter_batches(batch_size=_PARQUET_ROWS, columns=[column])
        while True:
            try:
                batch = next(batches, None)
                texts = [] if batch is None else batch.column(0).to_pylist()
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise ValueError(f"{path} is damaged after row {row}: {error}") from error
            if batch is None:
                return
            for text in texts:
                row += 1
                if text is None:
                    raise ValueError(f"{path}, row {row}: column {column!r} is null")
                yield row, row * size // rows - (row - 1) * size // rows, text
