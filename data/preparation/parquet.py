"""Texts of a parquet file, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.files import FileError, open_regular, shown
from data.preparation.streams import FileInput, HashingReader, Record, hash_file, listed, too_long

_ROWS = 256
_BATCH_BYTES = 1 << 30
"""What rows that are read together may take."""
_PAGE_BUFFER_BYTES = 1 << 20

_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError)


def open_parquet(file: FileInput, column: str) -> pq.ParquetFile:
    """Open a file and check that it has texts in `column`. Close it with force.

    Raises:
        FileError: it is no regular file, damaged, or without such a column.
        OSError: it cannot be opened.
    """
    source = open_regular(file.path)
    try:
        opened = _open(source)
        _check_column(opened.schema_arrow, column, file.shown)
        return opened
    except FileError:
        source.close()
        raise
    except _ERRORS as error:
        source.close()
        raise FileError(f"{file.shown} is damaged: {error}") from error


def _open(source: BinaryIO, **more: Any) -> pq.ParquetFile:
    # Buffered, so page by page: a whole row group may be larger than the memory. A page with a checksum is checked.
    return pq.ParquetFile(
        source, buffer_size=_PAGE_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True, **more
    )


def _check_column(schema: pa.Schema, column: str, where: str) -> None:
    found = schema.get_all_field_indices(column)
    if not found:
        parent = column.partition(".")[0]
        if parent in schema.names:
            raise FileError(
                f"{where}: column {shown(parent)} holds {schema.field(parent).type}; columns inside of others are not "
                "read, so write the texts into a column of their own"
            )
        raise FileError(f"{where}: no column {shown(column)}; it has {listed(schema.names)} (see --text-column)")
    if len(found) > 1:
        raise FileError(f"{where}: column {shown(column)} stands there {len(found)} times")
    kind = schema.field(column).type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(values) or pa.types.is_large_string(values) or pa.types.is_string_view(values)):
        raise FileError(f"{where}: column {shown(column)} holds {str(kind)[:80]}, not text")


def read_parquet(file: FileInput, column: str, limit: int, digests: dict[str, str]) -> Iterator[Record]:
    """The rows of a file, see `data.preparation.records.read_records`."""
    digests[file.name] = hash_file(file)
    opened = open_parquet(file, column)
    try:
        yield from _rows(file, opened, column, limit)
    finally:
        opened.close(force=True)
    HashingReader(file).close()  # still the file that was hashed


def _rows_at_once(file: FileInput, opened: pq.ParquetFile, group: int, column: str) -> int:
    """How many rows of a group can be read together, whatever stands in them.

    All together are no longer than the group, unless they are places in its dictionary: then each may be its longest
    text. (What the file says of the columns' encodings is no help: a damaged one ends the process inside of Arrow.)
    """
    if opened.metadata.row_group(group).total_byte_size > _BATCH_BYTES:
        return 1
    with open_regular(file.path) as source:
        first = next(
            _open(source, read_dictionary=[column]).iter_batches(batch_size=1, row_groups=[group], columns=[column]),
            None,
        )
    if first is None:
        return _ROWS
    longest = pc.max(pc.binary_length(first.column(column).dictionary)).as_py() or 1
    return min(_ROWS, max(1, _BATCH_BYTES // longest))


def _rows(file: FileInput, opened: pq.ParquetFile, column: str, limit: int) -> Iterator[Record]:
    row, rows = 0, opened.metadata.num_rows
    for group in range(opened.metadata.num_row_groups):
        batches: Iterator[pa.RecordBatch] | None = None
        while True:
            try:
                if batches is None:
                    batch_size = _rows_at_once(file, opened, group, column)
                    batches = opened.iter_batches(batch_size=batch_size, row_groups=[group], columns=[column])
                batch = next(batches, None)
            except _ERRORS as error:
                raise FileError(f"{file.shown} is damaged after row {row}: {error}") from error
            if batch is None:
                break
            # By its name: `a.b` also selects the field b of a column a.
            for value in batch.column(column):
                row += 1
                advanced = row * file.size // rows - (row - 1) * file.size // rows
                where = f"{file.shown}, row {row}"
                try:
                    text = value.as_py()
                except pa.ArrowException as error:
                    raise FileError(f"{where}: column {shown(column)} is damaged: {error}") from error
                except UnicodeDecodeError as error:
                    yield Record(row, advanced, "", f"{where}: column {shown(column)} is not UTF-8: {error.reason}")
                    continue
                if text is None:
                    yield Record(row, advanced, "", f"{where}: column {shown(column)} is null")
                # A character has at most 4 bytes.
                elif 4 * len(text) > limit and len(text.encode()) > limit:
                    yield Record(row, advanced, "", too_long(where, limit))
                else:
                    yield Record(row, advanced, text)
