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


class PasskeyGenerator:
    """Makes passkey documents with one tokenizer; a document is a function of (length, depth, seed) alone."""

    def __init__(self, tokenizer: Encoder) -> None:
        self._tokenizer = tokenizer
        self._introduction = tokenizer.encode(INTRODUCTION)
        self._filler = tokenizer.encode(FILLER)
        self._question = tokenizer.encode(QUESTION)

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
        digits = "".join(str(digit) for digit in np.random.default_rng(seed).integers(0, 10, DIGITS))
        needle = self._tokenizer.encode(NEEDLE.format(key=digits))
        answer = self._tokenizer.encode(" " + digits)
        # Where digits are tokens of their own the space before them is not part of the answer.
        lead = 0
        while lead < len(answer) - 1 and not self._tokenizer.decode(answer[: lead + 1]).strip():
            lead += 1
        fixed = len(self._introduction) + len(needle) + len(self._question) + len(answer)
        fillers = (length - fixed) // len(self._filler)
        if fillers < 0:
            raise ValueError(f"a passkey document has at least {fixed} tokens with this tokenizer, not {length}")
        before = round(depth * fillers)
        tokens = (
            self._introduction
            + self._filler * before
            + needle
            + self._filler * (fillers - before)
            + self._question
            + answer
        )
        span = (len(tokens) - len(answer) + lead, len(tokens))
        asked = (*self._question, *answer)
        question = Question(
            asked,
            (len(self._question) + lead, len(asked)),
            after=len(self._introduction) + before * len(self._filler) + len(needle),
        )
        return SyntheticDocument(tokens, [span], [question], f"passkey-{length}-{depth:.4f}-{seed}")
