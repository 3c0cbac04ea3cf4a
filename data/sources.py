"""Where documents come from: what may stand as SOURCE in `infini prepare`.

    notes.md, book.txt          a text file is a document
    folder/                     every text and record file in it
    corpus.jsonl[.gz|.zst]      a document per line, its text in one field
    corpus.parquet              a document per row, its text in one column
    python:torch,numpy          the installed packages' own source code, a document per sub-package
    passkey:N,length=LO..HI     N synthetic documents of a task (see data/synthetic)

A source lists its inputs at once and yields *jobs*, one per document, in an order that depends on the inputs alone. A
job is small and picklable; whoever runs it, maybe in another process, reads the text and encodes it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.questions import Question
from data.records import RECORD_SUFFIXES, is_record_file, open_parquet, read_records
from data.shards import PreparedSet
from data.synthetic import Spec, SyntheticDocument, build_generator, is_synthetic, task_options
from data.tokenizer import Tokenizer, byte_tokenizer

TEXT_PATTERNS = ("*.txt", "*.text", "*.md", "*.markdown", "*.rst", "*.tex")

_BYTES = byte_tokenizer()
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


@dataclass
class Encoded:
    """A document as tokens, without an end token."""

    tokens: np.ndarray
    answers: list[tuple[int, int]] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    skipped_files: int = 0


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

    @abstractmethod
    def load(self) -> tuple[str, int]:
        """The text, and how many files were left out because they are not UTF-8."""

    def encode(self, tokenizer: Tokenizer) -> Encoded:
        text, skipped = self.load()
        return Encoded(tokenizer.encode_array(text), skipped_files=skipped)


@dataclass(frozen=True)
class FileJob(Job):
    path: Path

    def load(self) -> tuple[str, int]:
        return _read_utf8(self.path), 0


@dataclass(frozen=True)
class RecordJob(Job):
    text: str

    @property
    def weight(self) -> int:
        return len(self.text)

    def load(self) -> tuple[str, int]:
        return self.text, 0


@dataclass(frozen=True)
class PythonJob(Job):
    files: tuple[tuple[str, Path], ...]
    """Name as it stands in the header line, and where the file is."""

    def load(self) -> tuple[str, int]:
        parts, skipped = [], 0
        for name, path in self.files:
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                skipped += 1
                continue
            parts.append(f"# file: {name}\n{text}" + ("" if text.endswith("\n") else "\n"))
        return "".join(parts), skipped


@dataclass(frozen=True)
class SyntheticJob(Job):
    task: str
    length: int
    depth: float
    seed: int
    options: tuple[tuple[str, int], ...]
    filler: str | None

    def load(self) -> tuple[str, int]:
        """The text with `length` counted in bytes and the paper's filler: what a tokenizer is trained on."""
        return _BYTES.decode(self._document(_BYTES, None).tokens), 0

    def encode(self, tokenizer: Tokenizer) -> Encoded:
        document = self._document(tokenizer, self.filler)
        return Encoded(np.array(document.tokens, dtype=np.uint32), document.answers, document.questions)

    def _document(self, tokenizer: Tokenizer, filler: str | None) -> SyntheticDocument:
        generator = build_generator(self.task, tokenizer, dict(self.options), filler=filler)
        return generator.document(self.length, self.depth, self.seed)


def _read_utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None


class Source(ABC):
    """A SOURCE argument, its inputs found and counted."""

    def __init__(self, spec: str) -> None:
        self.spec = spec

    @property
    @abstractmethod
    def inputs(self) -> list[tuple[str, int]]:
        """Name and bytes of everything that is read, in order."""

    @abstractmethod
    def jobs(self) -> Iterator[Job]: ...

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
        """Changes with the names and sizes of the inputs (not with contents of equal size: nothing is read)."""
        return hashlib.sha256(json.dumps(self.inputs).encode()).hexdigest()


class FileSource(Source):
    """A file, or all matching files of a folder, hidden ones left out, in the order of their paths."""

    def __init__(self, spec: str, text_column: str, text_patterns: tuple[str, ...]) -> None:
        super().__init__(spec)
        self._column = text_column
        root = Path(spec)
        if not root.exists():
            raise ValueError(
                f"source {spec} does not exist (other kinds of sources start with python:, passkey: or another task)"
            )
        if root.is_dir():
            # resolve(): the name of `.` or `..` is the folder's
            name = root.resolve().name
            found = sorted(_walk(root))
            self._files = [
                (f"{name}/{relative}", root / relative)
                for relative in found
                if is_record_file(relative) or any(fnmatch.fnmatch(relative, pattern) for pattern in text_patterns)
            ]
            if not self._files:
                raise ValueError(
                    f"source {spec} holds no file that matches {', '.join(text_patterns)} or ends in "
                    f"{', '.join(RECORD_SUFFIXES)} (see --text-pattern)"
                )
        else:
            self._files = [(root.name, root)]
        self._inputs = [(name, path.stat().st_size) for name, path in self._files]
        for _, path in self._files:
            if path.name.endswith(".parquet"):
                open_parquet(path, self._column)

    @property
    def inputs(self) -> list[tuple[str, int]]:
        return self._inputs

    def jobs(self) -> Iterator[Job]:
        for (name, path), (_, size) in zip(self._files, self._inputs, strict=True):
            if not is_record_file(path.name):
                yield FileJob(name, size, path)
                continue
            for number, input_bytes, text in read_records(path, self._column):
                yield RecordJob(f"{name}#{number}", input_bytes, text)


def _walk(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                yield (Path(folder) / name).relative_to(root).as_posix()


class PythonSource(Source):
    """`python:torch,numpy`: source trees of installed packages, found without importing them.

    A document is a package `a.b` with everything below it, or the modules directly in `a`; files come in the order of
    their paths, each after a line `# file: a/b/c.py`. A dotted name (`python:megatron.core`) starts further down.
    """

    def __init__(self, spec: str) -> None:
        super().__init__(spec)
        names = [name.strip() for name in spec.removeprefix("python:").split(",") if name.strip()]
        if not names:
            raise ValueError(f"source {spec!r} names no package; valid is for instance python:torch,numpy")
        self._documents: list[tuple[str, tuple[tuple[str, Path], ...]]] = []
        for name in dict.fromkeys(names):
            self._documents += _python_documents(name)
        self._sizes = [sum(path.stat().st_size for _, path in files) for _, files in self._documents]

    @property
    def inputs(self) -> list[tuple[str, int]]:
        return [(name, size) for (name, _), size in zip(self._documents, self._sizes, strict=True)]

    def jobs(self) -> Iterator[Job]:
        for (name, files), size in zip(self._documents, self._sizes, strict=True):
            yield PythonJob(f"python:{name}", size, files)


def _python_documents(name: str) -> list[tuple[str, tuple[tuple[str, Path], ...]]]:
    """(package, files) for the modules of `name` and each of its sub-packages."""
    top, *below = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:
        spec = None
    if spec is None:
        raise ValueError(f"source python:{name}: no package {top!r} is installed")
    # find_spec of a dotted name would import the parent; its folders are looked up by hand in its place.
    folders = [Path(location).joinpath(*below) for location in spec.submodule_search_locations or []]
    folders = [folder for folder in folders if folder.is_dir()]
    if folders:
        files = {path.relative_to(folder): path for folder in reversed(folders) for path in folder.rglob("*.py")}
    elif not below and spec.origin and spec.origin.endswith(".py"):
        files = {Path(Path(spec.origin).name): Path(spec.origin)}
    else:
        files = {}
    groups: dict[str, list[tuple[str, Path]]] = {}
    prefix = name.replace(".", "/") + "/" if folders else ""
    for relative in sorted(files, key=Path.as_posix):
        group = name if len(relative.parts) == 1 else f"{name}.{relative.parts[0]}"
        groups.setdefault(group, []).append((prefix + relative.as_posix(), files[relative]))
    if not groups:
        raise ValueError(f"source python:{name}: it has no Python source files")
    return [(group, tuple(groups[group])) for group in sorted(groups)]


class SyntheticSource(Source):
    """Documents of a synthetic task, such as `passkey:N,length=LO..HI[,depth=A..B][,seed=K]`.

    Lengths (tokens, the end token included) and the task's own options are drawn log-uniformly, depths uniformly, from
    0..1 unless given; one value in place of two fixes it. A document depends on the seed and its number alone.
    """

    def __init__(self, spec: str, seed: int) -> None:
        super().__init__(spec)
        self._task = spec.partition(":")[0]
        try:
            parsed = Spec.parse(spec)
            values = parsed.values
            self._count = parse_size(parsed.count)
            self._lengths = _bounds(values["length"], parse_size)
            self._depths = _bounds(values.get("depth", "0..1"), float)
            self._seed = int(values.get("seed", seed))
            self._filler = values.get("filler")
            self._options = {
                name: _bounds(values[name], parse_size) if name in values else (default, default)
                for name, default in task_options(self._task).items()
            }
            if self._count < 1 or self._lengths[0] < 2:
                raise ValueError("the number of documents must be positive, and lengths at least 2")
            if not 0.0 <= self._depths[0] <= self._depths[1] <= 1.0 or self._seed < 0:
                raise ValueError("depths must lie in 0..1, and the seed must not be negative")
            for name, (least, _) in self._options.items():
                if least < 1:
                    raise ValueError(f"{name} must be at least 1")
            for corner in (0, 1):
                build_generator(self._task, _BYTES, {name: ends[corner] for name, ends in self._options.items()})
            if self._filler is not None:
                PreparedSet(self._filler)
        except ValueError as error:
            raise ValueError(f"source {spec!r}: {error}; valid is {Spec.usage(self._task)}") from None

    @property
    def inputs(self) -> list[tuple[str, int]]:
        # The mean of a log-uniform length, for the progress bar.
        low, high = self._lengths
        mean = low if low == high else (high - low) / math.log(high / low)
        return [(f"{self.spec}, seed {self._seed}", int(self._count * mean))]

    @property
    def synthetic(self) -> bool:
        return True

    def _draw(self, number: int) -> tuple[int, float, int, tuple[tuple[str, int], ...]]:
        rng = np.random.default_rng([self._seed, number])
        length = _log_uniform(rng, *self._lengths)
        depth, seed = float(rng.uniform(*self._depths)), int(rng.integers(1 << 62))
        options = [
            (name, low if low == high else _log_uniform(rng, low, high)) for name, (low, high) in self._options.items()
        ]
        return length, depth, seed, tuple(options)

    def jobs(self) -> Iterator[Job]:
        for number in range(self._count):
            length, depth, seed, options = self._draw(number)
            name = f"{self.spec}#{number}"  # 1 token for the end
            yield SyntheticJob(name, length, self._task, length - 1, depth, seed, options, self._filler)

    def sample_jobs(self) -> Iterator[Job]:
        """Documents of some 4K characters: the words of long ones are no others."""
        for number in range(self._count):
            _, depth, seed, options = self._draw(number)
            yield SyntheticJob(f"{self.spec}#{number}", 4096, self._task, 4096, depth, seed, options, self._filler)

    def check(self, tokenizer: Tokenizer) -> None:
        try:
            # Digits may be joined into tokens, differently in each document; the generator says what it needs.
            most = {name: high for name, (_, high) in self._options.items()}
            generator = build_generator(self._task, tokenizer, most, filler=self._filler)
            generator.document(self._lengths[0] - 1, 0.5, 0)
        except ValueError as error:
            raise ValueError(f"source {self.spec!r}, length={self._lengths[0]}: {error}") from None


def _log_uniform(rng: np.random.Generator, low: int, high: int) -> int:
    drawn = round(math.exp(rng.uniform(math.log(low), math.log(high))))
    return min(max(drawn, low), high)


def _bounds(text: str, parse: type | object) -> tuple:
    low, separator, high = text.partition("..")
    bounds = parse(low), parse(high if separator else low)  # type: ignore[operator]
    if bounds[0] > bounds[1]:
        raise ValueError(f"{text!r} is not a range: the first value is the larger one")
    return bounds


def open_source(spec: str, *, text_column: str, text_patterns: tuple[str, ...], seed: int) -> Source:
    """Find out what kind of source `spec` is, and that its inputs are there.

    Raises:
        ValueError: nothing like that exists, or it cannot be read.
    """
    if spec.startswith("python:"):
        return PythonSource(spec)
    if is_synthetic(spec):
        return SyntheticSource(spec, seed)
    return FileSource(spec, text_column, text_patterns)
