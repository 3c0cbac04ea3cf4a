"""Questions that a document answers, and the probes made of them.

A probe is a read-only segment that branches off a lane's memory inside a window: some text of the document, then a
question with its answer. It is trained on but not written to the memory, so a document can be asked many times, at
many distances, without the answers leaking into what later questions read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa


@dataclass(frozen=True)
class Question:
    tokens: tuple[int, ...]
    """The question with its answer, which ends it."""
    answer: tuple[int, int]
    """Span [start, stop) of the answer in `tokens`."""
    after: int
    """May be asked once the document's tokens [0, after) have been read."""

    def check(self, document_tokens: int) -> None:
        """Raises: ValueError for spans that do not fit a document of so many tokens."""
        start, stop = self.answer
        if not (0 < start < stop <= len(self.tokens)) or not 0 <= self.after <= document_tokens:
            raise ValueError(
                f"a question of {len(self.tokens)} tokens cannot have its answer at [{start}, {stop}) "
                f"and be asked after token {self.after} of {document_tokens}"
            )


COLUMN_TYPE = pa.list_(
    pa.struct(
        [
            ("tokens", pa.list_(pa.int32())),
            ("answer", pa.list_(pa.int32())),
            ("after", pa.int64()),
        ]
    )
)
"""Type of the index column that holds the questions of every document."""


def to_rows(questions: Sequence[Question]) -> list[dict[str, Any]]:
    """What the index column and a document's metadata hold."""
    return [{"tokens": list(q.tokens), "answer": list(q.answer), "after": q.after} for q in questions]


def from_rows(rows: Sequence[dict[str, Any]]) -> list[Question]:
    return [Question(tuple(row["tokens"]), tuple(row["answer"]), row["after"]) for row in rows]


def askable(question: Question, first_token: int, segment_length: int) -> bool:
    """Whether a probe that starts at `first_token` of the document can ask: the question fits, its subject was read."""
    text = segment_length + 1 - len(question.tokens)
    return text >= 1 and question.after <= first_token + text
