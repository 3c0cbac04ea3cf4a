"""Synthetic long-range documents: the passkey task of the Infini-attention paper (appendix B).

The text of a document is, with five random digits K in place of 9054's four,

    There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about
    the important information there.                                                                    (one line)
    x times: " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    " The pass key is K. Remember it. K is the pass key."
    y times: the same filler
    " What is the pass key? The pass key is"
    " K"

joined without anything between the parts. The digits of the last K are the answer. x + y is what the length allows, and
x = round(depth * (x + y)). The tokens are the parts' tokens joined: each part is encoded once, so a document of a
million tokens costs no more than its list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data.questions import Question

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = " What is the pass key? The pass key is"
DIGITS = 5


class Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class SyntheticDocument:
    tokens: list[int]
    """Without an end token; the answer is the end."""
    answers: list[tuple[int, int]]
    """Spans [start, stop) of answer tokens."""
    questions: list[Question]
    """What can be asked once the needle has been read (see `data.questions`)."""
    key: str
    """Length asked for, depth and seed: names the document."""


@dataclass(frozen=True)
class PasskeyParts:
    """The tokens of a passkey document's parts."""

    introduction: list[int]
    filler: list[int]
    needle: list[int]
    question: list[int]
    """The answer is not part of it."""
    answer: list[int]
    lead: int
    """Tokens at the answer's beginning that hold none of its digits (a space of its own)."""

    @property
    def fixed(self) -> int:
        """Tokens of a document without filler."""
        return len(self.introduction) + len(self.needle) + len(self.question) + len(self.answer)

    def fillers(self, length: int) -> int:
        """How many whole fillers a document of `length` tokens holds.

        Raises:
            ValueError: it does not even hold a document without any.
        """
        if length < self.fixed:
            raise ValueError(f"a passkey document has at least {self.fixed} tokens with this tokenizer, not {length}")
        return (length - self.fixed) // len(self.filler)


class PasskeyGenerator:
    """Makes passkey documents with one tokenizer; a document is a function of (length, depth, seed) alone."""

    def __init__(self, tokenizer: Encoder) -> None:
        self._tokenizer = tokenizer
        self._introduction = tokenizer.encode(INTRODUCTION)
        self._filler = tokenizer.encode(FILLER)
        self._question = tokenizer.encode(QUESTION)

    def parts(self, seed: int) -> PasskeyParts:
        """The parts of a document; `seed` decides the digits."""
        digits = "".join(str(digit) for digit in np.random.default_rng(seed).integers(0, 10, DIGITS))
        needle = self._tokenizer.encode(NEEDLE.format(key=digits))
        answer = self._tokenizer.encode(" " + digits)
        # Where digits are tokens of their own the space before them is not part of the answer.
        lead = 0
        while lead < len(answer) - 1 and not self._tokenizer.decode(answer[: lead + 1]).strip():
            lead += 1
        return PasskeyParts(self._introduction, self._filler, needle, self._question, answer, lead)

    def document(self, length: int, depth: float, seed: int) -> SyntheticDocument:
        """A document of at most `length` tokens, as many whole fillers as fit, the needle `depth` of the way in.

        Args:
            length: tokens at most, the answer included.
            depth: place of the needle among the fillers, 0 (before all) to 1 (after all).
            seed: decides the digits.

        Raises:
            ValueError: `length` does not hold the document without any filler, or `depth` is outside of [0, 1].
        """
        if not 0.0 <= depth <= 1.0:
            raise ValueError(f"passkey depth {depth} is outside of [0, 1]")
        parts = self.parts(seed)
        fillers = parts.fillers(length)
        before = round(depth * fillers)
        tokens = (
            parts.introduction
            + parts.filler * before
            + parts.needle
            + parts.filler * (fillers - before)
            + parts.question
            + parts.answer
        )
        span = (len(tokens) - len(parts.answer) + parts.lead, len(tokens))
        asked = (*parts.question, *parts.answer)
        question = Question(
            asked,
            (len(parts.question) + parts.lead, len(asked)),
            after=len(parts.introduction) + before * len(parts.filler) + len(parts.needle),
        )
        return SyntheticDocument(tokens, [span], [question], f"passkey-{length}-{depth:.4f}-{seed}")
