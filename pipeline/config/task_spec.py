"""What an evaluation reads in the spec of a synthetic task. Light: a configuration is checked with it.

A spec is that of `infini prepare` (see `data.synthetic`), with values separated by `/` that make a cell each:

    recall:50,length=1K,pairs=4/8/16/32/64
    passkey:20,length=4K/16K,depth=0/0.5/1,keys=4,filler=prepared/text

N documents per cell. Without `depth` the needles of tasks that have depths stand anywhere.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from data.preparation.sources import parse_size
from data.synthetic import Spec, source_option

MAX_SIZE = 1 << 40
"""Of a number: a document of a million million tokens."""
MAX_CELLS = 10_000

Settings = dict[str, int | float]
"""What a cell's documents have: `length`, maybe `depth`, and the task's options that are given."""


@dataclass(frozen=True)
class Task:
    """A spec as an evaluation reads it."""

    spec: str
    task: str
    documents: int
    """Per cell."""
    axes: dict[str, tuple[int | float, ...]]
    """Values of `length`, `depth` and the options that are given."""
    source: str | None
    """What its `filler`, or the `questions` of `qa_1` and `qa_2`, names."""

    @property
    def swept(self) -> list[str]:
        """What differs between cells."""
        return [name for name, values in self.axes.items() if len(values) > 1]

    @property
    def settings(self) -> list[Settings]:
        """Of every cell, in order."""
        return [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]

    @classmethod
    def parse(cls, spec: str) -> Task:
        """Raises: ValueError: it is no spec of an evaluation."""
        try:
            parsed = Spec.parse(spec)
            if "seed" in parsed.values:
                raise ValueError("the seed is evaluate.seed")
            axes = {
                name: tuple((float if name == "depth" else parse_size)(part) for part in text.split("/"))
                for name, text in parsed.values.items()
                if name != source_option(parsed.task)
            }
            documents = parse_size(parsed.count)
            least = min([documents, *(value for name, values in axes.items() if name != "depth" for value in values)])
            if max(documents, *(max(values) for values in axes.values())) > MAX_SIZE:
                raise ValueError(f"numbers must be at most {MAX_SIZE:,}")
            if math.prod(map(len, axes.values())) > MAX_CELLS:
                raise ValueError(f"more than {MAX_CELLS:,} cells")
            if least < 1 or any(not 0 <= depth <= 1 for depth in axes.get("depth", ())):
                raise ValueError("numbers must be at least 1, and depths lie in 0..1")
        except ValueError as error:
            raise ValueError(
                f"{spec!r}: {error}; valid is such as passkey:20,length=4K/16K,keys=4 (docs/synthetic_data.md)"
            ) from None
        return cls(spec, parsed.task, documents, axes, parsed.source)
