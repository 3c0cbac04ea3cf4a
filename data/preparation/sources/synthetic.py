"""Sources that are synthetic tasks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.files import place, read_bytes
from data.preparation.sources.base import Encoded, Job, Loaded, Source, parse_size
from data.prepared.manifest import MANIFEST
from data.prepared.shards import PreparedSet
from data.synthetic import (
    TASKS,
    TEXT_LIMIT,
    Spec,
    SyntheticDocument,
    build_generator,
    is_text_file,
    source_option,
    task_options,
)
from data.synthetic.ruler_qa import FILE_LIMIT as QUESTIONS_LIMIT
from data.tokenizer.tokenizer import Tokenizer, byte_tokenizer

_BYTES = byte_tokenizer()
_MOST_DOCUMENTS = 1_000_000_000
_MOST_TOKENS = 1 << 28
"""A document is made as a list of numbers: 2 GiB of them."""


@dataclass(frozen=True)
class SyntheticJob(Job):
    task: str
    length: int
    depth: float
    seed: int
    options: tuple[tuple[str, int], ...]
    source: str | None

    def load(self) -> Loaded:
        """The text with `length` counted in bytes and the paper's filler: what a tokenizer is trained on."""
        source = None if source_option(self.task) == "filler" else self.source
        return Loaded(_BYTES.decode(self._document(_BYTES, source, self.length).tokens))

    def encode(self, tokenizer: Tokenizer) -> Encoded:
        document = self._document(tokenizer, self.source, self.length - len(tokenizer.begin_ids))
        return Encoded(np.array(document.tokens, dtype=np.uint32), document.answers, document.questions)

    def _document(self, tokenizer: Tokenizer, source: str | None, length: int) -> SyntheticDocument:
        generator = build_generator(self.task, tokenizer, dict(self.options), source=source)
        return generator.document(length, self.depth, self.seed)


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
            self._source = parsed.source
            self._options = {
                name: _bounds(values[name], parse_size) if name in values else (default, default)
                for name, default in task_options(self._task).items()
            }
            if self._lengths[1] > _MOST_TOKENS:
                raise ValueError(f"a document has at most {_MOST_TOKENS:,} tokens")
            if not 1 <= self._count <= _MOST_DOCUMENTS or self._lengths[0] < 2:
                raise ValueError(f"there must be 1 to {_MOST_DOCUMENTS:,} documents, of at least 2 tokens")
            if not 0.0 <= self._depths[0] <= self._depths[1] <= 1.0 or self._seed < 0:
                raise ValueError("depths must lie in 0..1, and the seed must not be negative")
            for name, (least, _) in self._options.items():
                if least < 1:
                    raise ValueError(f"{name} must be at least 1")
            option = source_option(self._task)
            source = None if option == "filler" else self._source  # a set of another tokenizer is refused by `check`
            for corner in (0, 1):
                corners = {name: ends[corner] for name, ends in self._options.items()}
                build_generator(self._task, _BYTES, corners, source=source)
            if self._source is not None:
                if option == "questions":
                    known = read_bytes(place(self._source), QUESTIONS_LIMIT)
                elif is_text_file(self._source):
                    known = read_bytes(place(self._source), TEXT_LIMIT)
                else:
                    PreparedSet(self._source).close()
                    # A manifest has the hashes of everything in its set.
                    known = read_bytes(place(self._source) / MANIFEST)
                self.digests[f"{option}={self._source}"] = hashlib.sha256(known).hexdigest()
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

    def forget(self) -> None:
        """Nothing: a filler's hash is known from the beginning, and no file is read."""

    @property
    def units(self) -> int:
        return self._count

    def first_unit(self, at: int) -> int:
        return min(-(-at * self._count // max(self.total_bytes, 1)), self._count)

    def jobs(self, first: int = 0, last: int | None = None) -> Iterator[Job]:
        for number in range(self._count)[first:last]:
            length, depth, seed, options = self._draw(number)
            name = f"{self.spec}#{number}"  # 1 token for the end
            yield SyntheticJob(name, length, self._task, length - 1, depth, seed, options, self._source)

    def sample_jobs(self) -> Iterator[Job]:
        """Documents of some 4K characters, or what a task needs: the words of long ones are no others."""
        length = getattr(TASKS[self._task], "sample_length", 4096)
        for number in range(self._count):
            _, depth, seed, options = self._draw(number)
            yield SyntheticJob(f"{self.spec}#{number}", length, self._task, length, depth, seed, options, self._source)

    def check(self, tokenizer: Tokenizer) -> None:
        try:
            # Digits may be joined into tokens, differently in each document; the generator says what it needs.
            most = {name: high for name, (_, high) in self._options.items()}
            generator = build_generator(self._task, tokenizer, most, source=self._source)
            generator.document(self._lengths[0] - 1 - len(tokenizer.begin_ids), 0.5, 0)
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
