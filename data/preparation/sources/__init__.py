"""Where documents come from: what may stand as SOURCE in `infini prepare`.

    notes.md, book.txt.gz       a text file is a document
    folder/                     every text and record file in it
    corpus.jsonl, .ndjson       a document per line, its text in one field
    corpus.json                 lines, an array of records, or one record
    corpus.parquet              a document per row, its text in one column
    python:torch,numpy          the installed packages' own source code, a document per sub-package
    passkey:N,length=LO..HI     N synthetic documents of a task (see data/synthetic)

A source lists its inputs at once and yields *jobs*, one per document, in an order that depends on the inputs alone. A
job is small and picklable; whoever runs it, maybe in another process, reads the text and encodes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from data.preparation.sources.base import (
    TEXT_PATTERNS,
    BadInputError,
    Encoded,
    Job,
    Loaded,
    Source,
    SourceOptions,
    parse_size,
)
from data.preparation.sources.python import PythonSource
from data.preparation.sources.synthetic import SyntheticSource
from data.preparation.sources.text_files import FileSource
from data.synthetic import is_synthetic

__all__ = [
    "TEXT_PATTERNS",
    "BadInputError",
    "Encoded",
    "FileSource",
    "Job",
    "Loaded",
    "PythonSource",
    "Source",
    "SourceOptions",
    "SyntheticSource",
    "open_sources",
    "parse_size",
]


def open_sources(specs: Sequence[str], options: SourceOptions) -> list[Source]:
    """Find out what kind of source each is, and that its inputs are there. No file is read by two of them.

    Raises:
        ValueError: nothing like that exists, or it cannot be read.
    """
    seen: dict[tuple[object, ...], str] = {}
    sources: list[Source] = []
    for spec in specs:
        if spec.startswith("python:"):
            sources.append(PythonSource(spec, options))
        elif is_synthetic(spec):
            sources.append(SyntheticSource(spec, options.seed))
        else:
            sources.append(FileSource(spec, options, seen))
    return sources
