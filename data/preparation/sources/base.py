"""What a source is: named inputs, and jobs that make documents of them."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from data.files import FileError
from data.preparation.streams import FileInput
from data.prepared.questions import Question
from data.tokenizer.tokenizer import Tokenizer

TEXT_PATTERNS = ("*.txt", "*.text", "*.md", "*.markdown", "*.rst", "*.tex")

_SIZE_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_size(text: str) -> int:
    """`64M` -> 67108864: a whole number with an optional suffix K, M or G, in powers of 1,024.

    Raises:
        ValueError: anything else.
    """
    number, suffix = (text[:-1], text[-1].upper()) if text[-1:].upper() in ("K", "M", "G") else (text, "")
    if not number.isdecimal():
        raise ValueError(f"{text!r} is not a size; valid are whole numbers with an optional K, M or G, such as 64M")
    return int(number) * _SIZE_SUFFIXES[suffix]


class BadInputError(FileError):
    """A file or record of a source cannot be read: an error, or left out and counted with `--skip-bad`.

    Args:
        digests: sha256 of the files, as far as they could be read.
    """

    def __init__(self, message: str, digests: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.digests = digests or {}


class Loaded(NamedTuple):
    text: str
    skipped_files: int = 0
    """Files of a Python package that are not UTF-8."""
    digests: dict[str, str] = {}  # noqa: RUF012 - never written to
    """sha256 of the files that were read, by the names of `Source.files`."""


@dataclass
class Encoded:
    """A document as tokens, without an end token."""

    tokens: np.ndarray
    answers: list[tuple[int, int]] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    skipped_files: int = 0
    digests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job(ABC):
    """One document to read and encode."""

    id: str
    """Names the document; the same on every machine."""
    input_bytes: int
    """How far this document brings the source's `total_bytes`, for the progress bar."""

    @property
    def weight(self) -> int:
        """About how many bytes of text there are to encode."""
        return self.input_bytes

    @property
    def is_record(self) -> bool:
        """Whether it is one of many documents of a file."""
        return False

    @abstractmethod
    def load(self) -> Loaded:
        """Raises: BadInputError."""

    def encode(self, tokenizer: Tokenizer) -> Encoded:
        loaded = self.load()
        return Encoded(tokenizer.encode_array(loaded.text), skipped_files=loaded.skipped_files, digests=loaded.digests)


@dataclass(frozen=True)
class SourceOptions:
    """How sources are read."""

    text_column: str = "text"
    """Field or column of records."""
    text_patterns: tuple[str, ...] = TEXT_PATTERNS
    """File names that are texts, in folders; small or capital letters."""
    max_document_bytes: int = 1 << 30
    """A longer line, text file or sub-package is bad input."""
    skip_bad: bool = False
    """Whether bad records and files are left out and counted, or refused."""
    seed: int = 0
    """For synthetic sources that name none."""


class Source(ABC):
    """A SOURCE argument, its inputs found and counted."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.digests: dict[str, str] = {}
        """sha256 of what was read, by name: filled while jobs are made, and by whoever runs them."""
        self.notes: list[str] = []
        """What a user should know of the inputs before they are read."""
        self.passed_over: dict[str, int] = {}
        """Files of a folder that are not read, by their kind."""

    @property
    @abstractmethod
    def inputs(self) -> list[tuple[str, int]]:
        """Name and bytes of everything that is read, in order."""

    @property
    def files(self) -> list[FileInput]:
        """The files that are read, in order."""
        return self.files_of(0, self.units)

    def files_of(self, first: int, last: int) -> list[FileInput]:
        """The files of the units [first, last)."""
        return []

    @property
    def units(self) -> int:
        """What several machines share out among them: the inputs, unless a source says otherwise."""
        return len(self.inputs)

    def first_unit(self, at: int) -> int:
        """The first unit that begins at byte `at` of `total_bytes` or behind it."""
        begin = 0
        for unit, (_, size) in enumerate(self.inputs):
            if begin >= at:
                return unit
            begin += size
        return self.units

    @abstractmethod
    def jobs(self, first: int = 0, last: int | None = None) -> Iterator[Job]:
        """The documents of the units [first, last), of all by default."""

    def forget(self) -> None:
        """Drop what reading has told, before other units are read."""
        self.digests.clear()

    def sample_jobs(self) -> Iterator[Job]:
        """The jobs a tokenizer is trained on."""
        return self.jobs()

    @property
    def synthetic(self) -> bool:
        return False

    def check(self, tokenizer: Tokenizer) -> None:  # noqa: B027 - most sources accept every tokenizer
        """Raise ValueError where documents cannot be made with this tokenizer."""

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size in self.inputs)

    @property
    def fingerprint(self) -> str:
        """Changes with the names and sizes of the inputs: nothing is read for it."""
        return hashlib.sha256(json.dumps(self.inputs).encode()).hexdigest()
