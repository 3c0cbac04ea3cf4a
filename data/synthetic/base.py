"""What all synthetic tasks have in common: facts hidden in filler, and questions about them.

A task says in words what a document holds (`Draft`); `FillerTask.assemble` makes tokens of it:

    introduction, filler, fact, filler, fact, ..., filler, question, answer, question, answer, ...

joined without anything between the parts; every text of a task but the introduction therefore begins with a space. The
tokens are the parts' tokens joined: each part is encoded once, so a document of a million tokens costs no more than its
list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from data.prepared.questions import Question
from data.synthetic.scoring import MatchAll, Written

FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DIGITS = 5


class Encoder(Protocol):
    begin_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class SyntheticDocument:
    tokens: list[int]
    """Without the tokens that begin and end a document; the answer is the end."""
    answers: list[tuple[int, int]]
    """Spans [start, stop) of answer tokens."""
    questions: list[Question]
    """What can be asked once the facts that it needs have been read (see `data.prepared.questions`)."""
    key: str
    """Task, length asked for, depth and seed: names the document."""
    written: Written | None = None
    """How a benchmark scores what a model writes at the end; None where an answer is right when it is the one here."""


class Generator(Protocol):
    """Makes the documents of one task with one tokenizer."""

    def document(self, length: int, depth: float, seed: int) -> SyntheticDocument:
        """A document of `length` tokens (of words or needles alone: at most), of these arguments and the task's options
        alone.

        Args:
            depth: where the fact that is asked first stands, 0 (beginning) to 1 (end), in tasks that have depths.

        Raises:
            ValueError: `length` does not hold the document without any filler.
        """
        ...


class Filler(Protocol):
    """What the facts are hidden in."""

    def place(self, depth: float, room: int, seed: int) -> int:
        """Where a fact at `depth` of `room` tokens stands, in the text of the same room and seed."""
        ...

    def tokens(self, room: int, seed: int, last_fact: int) -> list[int]:
        """`room` tokens, the last fact to stand after the first `last_fact` of them."""
        ...


class SentenceFiller:
    """The paper's five sentences (or another text) again and again; facts stand between whole repetitions.

    What whole repetitions leave of the room is the end of one, behind the last fact. Without it, question and filler
    would stand in few positions of a segment (segments of 64 tokens and fillers of 24: in 8), and a model that has seen
    no others answers half as often in those.
    """

    def __init__(self, tokenizer: Encoder, text: str = FILLER) -> None:
        self._tokens = tokenizer.encode(text)

    def place(self, depth: float, room: int, seed: int) -> int:
        return round(depth * (room // len(self._tokens))) * len(self._tokens)

    def tokens(self, room: int, seed: int, last_fact: int) -> list[int]:
        fillers, rest = divmod(room, len(self._tokens))
        before = last_fact // len(self._tokens)
        piece = self._tokens[len(self._tokens) - rest :]
        return self._tokens * before + piece + self._tokens * (fillers - before)


@dataclass(frozen=True)
class Ask:
    """A question about a draft's facts."""

    question: str
    answer: str
    needs: int
    """The last fact, by its index in the draft, that must have been read."""


@dataclass(frozen=True)
class Draft:
    """A document in words."""

    introduction: str
    facts: Sequence[str]
    """In the order in which they stand."""
    depths: Sequence[float]
    """Of the facts, 0 to 1, rising."""
    asks: Sequence[Ask]
    """The first ones are asked at the end of the document, all of them may be asked before."""


class FillerTask:
    """What the generators of facts hidden in filler share.

    Args:
        questions: asked at the end of a document, if its draft has so many.
        filler: what the facts are hidden in; None is the paper's sentences.
    """

    def __init__(self, tokenizer: Encoder, questions: int, filler: Filler | None) -> None:
        self._tokenizer = tokenizer
        self._questions = questions
        self._filler = filler or SentenceFiller(tokenizer)

    def assemble(self, draft: Draft, *, length: int, seed: int, key: str) -> SyntheticDocument:
        """Make a document of a draft.

        Args:
            length: tokens.
            seed: for the filler.
            key: names the document; the task comes first in it.

        Raises:
            ValueError: `length` does not hold it without any filler.
        """
        introduction = self._tokenizer.encode(draft.introduction)
        facts = [self._tokenizer.encode(fact) for fact in draft.facts]
        asked = [(ask, *ask_tokens(self._tokenizer, ask.question, ask.answer)) for ask in draft.asks]
        last = asked[: self._questions]
        fixed = sum(map(len, [introduction, *facts, *(tokens for _, tokens, _ in last)]))
        if length < fixed:
            task = key.partition("-")[0]
            raise ValueError(f"a {task} document has at least {fixed} tokens with this tokenizer, not {length}")
        room = length - fixed
        places = [self._filler.place(depth, room, seed) for depth in draft.depths]
        text = self._filler.tokens(room, seed, places[-1])
        tokens, start, ends = list(introduction), 0, []
        for fact, place in zip(facts, places, strict=True):
            tokens += text[start:place]
            tokens += fact
            ends.append(len(tokens))
            start = place
        tokens += text[start:]
        answers = []
        for _, piece, (first, stop) in last:
            answers.append((len(tokens) + first, len(tokens) + stop))
            tokens += piece
        probes = [Question(tuple(piece), span, after=ends[ask.needs]) for ask, piece, span in asked]
        return SyntheticDocument(tokens, answers, probes, key)


def ask_tokens(tokenizer: Encoder, question: str, answer: str) -> tuple[list[int], tuple[int, int]]:
    """A question's tokens with its answer, and the span of the answer.

    Where the space before the answer is a token of its own, it is not part of the answer.
    """
    before, after = tokenizer.encode(question), tokenizer.encode(answer)
    lead = 0
    while lead < len(after) - 1 and not tokenizer.decode(after[: lead + 1]).strip():
        lead += 1
    return before + after, (len(before) + lead, len(before) + len(after))


def with_match(
    made: SyntheticDocument, tokenizer: Encoder, ask: Ask, new_tokens: int, references: Sequence[str]
) -> SyntheticDocument:
    """A document that ends with `ask`, scored as by RULER: `references` that are in what is written after it."""
    question, answer = tokenizer.encode(ask.question), tokenizer.encode(ask.answer)
    kept = len(made.tokens) - len(question) - len(answer)
    return replace(made, written=MatchAll(kept, tuple(question), new_tokens, tuple(references)))


def digits(rng: np.random.Generator, count: int = DIGITS) -> str:
    return "".join(str(digit) for digit in rng.integers(0, 10, count))


def check_depth(depth: float) -> None:
    """Raises: ValueError outside of [0, 1]."""
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth {depth} is outside of [0, 1]")
