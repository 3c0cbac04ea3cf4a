"""RULER's questions about documents (arXiv 2404.06654), with its template: `qa_1` from a file of SQuAD's, `qa_2` from
one of HotpotQA's.

    Answer the question based on the given documents. Only give me the answer and do not output any other words.
                                                                                                     (an empty line)
    The following are given documents.                                                               (an empty line)
    Document 1:
    ...                                                                                              (an empty line)
    Document 2:
    ...                                                                                              (an empty line)
    Answer the question based on the given documents. Only give me the answer and do not output any other words.
                                                                                                     (an empty line)
    Question: ... Answer:

The question's own documents, of `qa_1` the paragraph that it is about, of `qa_2` the ten paragraphs that come with it;
then as many others as the length allows, in any order. In `qa_1` the others are of the same article first.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from data.files import read_json
from data.prepared.questions import Question
from data.synthetic.base import Encoder, SyntheticDocument, ask_tokens
from data.synthetic.scoring import MatchPart

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
)
INTRODUCTION = f"{INSTRUCTION}The following are given documents.\n\n"
QUESTION = "\n\n" + INSTRUCTION + "Question: {question} Answer:"
NEW_TOKENS = 32
FILE_LIMIT = 1 << 30
"""Bytes of a file of questions: HotpotQA's training set has 566 MB."""


@dataclass(frozen=True)
class Asked:
    """A question of the file."""

    question: str
    answers: tuple[str, ...]
    """Different ones, each of them right."""
    own: tuple[int, ...]
    """Documents that it comes with, by their index."""
    near: tuple[int, ...] = ()
    """Others of the same article."""


@dataclass(frozen=True)
class Collection:
    """What a file holds."""

    documents: list[str]
    """Different ones, sorted."""
    asked: list[Asked]


@dataclass(frozen=True)
class _Answer:
    text: str


@dataclass(frozen=True)
class _SquadQuestion:
    question: str
    answers: list[_Answer]
    is_impossible: bool = False
    """Since SQuAD 2.0."""


@dataclass(frozen=True)
class _Paragraph:
    context: str
    qas: list[_SquadQuestion]


@dataclass(frozen=True)
class _Article:
    paragraphs: list[_Paragraph]


@dataclass(frozen=True)
class _Squad:
    data: list[_Article]


@dataclass(frozen=True)
class _HotpotQuestion:
    question: str
    answer: str
    context: list[tuple[str, list[str]]]
    """Title and sentences of each paragraph."""


def read_squad(path: str) -> Collection:
    """A file such as SQuAD's dev-v2.0.json; questions that it calls impossible are left out, as RULER does.

    Raises:
        FileNotFoundError, OSError, FileError: see `read_json`.
    """
    articles = read_json(path, _Squad, limit=FILE_LIMIT).data
    texts, place = _sorted(paragraph.context for article in articles for paragraph in article.paragraphs)
    asked = []
    for article in articles:
        of_article = dict.fromkeys(place[paragraph.context] for paragraph in article.paragraphs)
        for paragraph in article.paragraphs:
            own = place[paragraph.context]
            near = tuple(other for other in of_article if other != own)
            asked += [
                Asked(one.question, _different(answer.text for answer in one.answers), (own,), near)
                for one in paragraph.qas
                if not one.is_impossible
            ]
    return Collection(texts, asked)


def read_hotpotqa(path: str) -> Collection:
    """A file such as HotpotQA's hotpot_dev_distractor_v1.json.

    Raises:
        FileNotFoundError, OSError, FileError: see `read_json`.
    """
    questions = read_json(path, list[_HotpotQuestion], limit=FILE_LIMIT)
    contexts = [[f"{title}\n{''.join(sentences)}" for title, sentences in one.context] for one in questions]
    texts, place = _sorted(text for context in contexts for text in context)
    return Collection(
        texts,
        [
            Asked(one.question, (one.answer,), _different(place[text] for text in context))
            for one, context in zip(questions, contexts, strict=True)
        ],
    )


class QaGenerator:
    """Makes documents of the questions of a file, drawn by the seed.

    Args:
        questions: what the file holds; without it there is nothing to make documents of.
    """

    has_depth = False
    sample_length = 1 << 15
    name: ClassVar[str]
    needs: ClassVar[str]
    """What its file is."""

    def __init__(self, tokenizer: Encoder, *, questions: Collection) -> None:
        self._tokenizer = tokenizer
        self._collection = questions
        self._encoded: dict[int, list[int]] = {}

    @staticmethod
    def read(path: str) -> Collection:
        """The collection in a file."""
        raise NotImplementedError

    def document(self, length: int, depth: float, seed: int) -> SyntheticDocument:
        """See `base.Generator`; `depth` is not used. A question whose own documents do not fit gives way to another."""
        rng = np.random.default_rng(seed)
        introduction = self._tokenizer.encode(INTRODUCTION)
        least = None
        for number in rng.permutation(len(self._collection.asked)).tolist():
            asked = self._collection.asked[number]
            piece, (first, stop) = ask_tokens(
                self._tokenizer, QUESTION.format(question=asked.question), f" {asked.answers[0]}"
            )
            fixed = len(introduction) + len(piece)
            fixed += sum(self._size(place, document) for place, document in enumerate(asked.own))
            least = fixed if least is None else min(least, fixed)
            if fixed <= length:
                break
        else:
            raise ValueError(f"a {self.name} document has at least {least} tokens with this tokenizer, not {length}")
        shown = self._with_others(asked, length - fixed, rng)
        tokens, after = list(introduction), 0
        for place, index in enumerate(rng.permutation(len(shown)).tolist()):
            tokens += self._heading(place) + self._text(shown[index])
            if shown[index] in asked.own:
                after = len(tokens)
        kept = len(tokens)
        tokens += piece
        probe = Question(tuple(piece), (first, stop), after=after)
        made = SyntheticDocument(tokens, [(kept + first, kept + stop)], [probe], f"{self.name}-{length}-{seed}")
        question = tuple(self._tokenizer.encode(QUESTION.format(question=asked.question)))
        return replace(made, written=MatchPart(kept, question, NEW_TOKENS, asked.answers))

    def _with_others(self, asked: Asked, room: int, rng: np.random.Generator) -> list[int]:
        """The question's documents, and others in the room (tokens) that these leave."""
        shown = list(asked.own)
        near = [asked.near[i] for i in rng.permutation(len(asked.near))]
        known = {*asked.own, *near}
        far = (i for i in rng.permutation(len(self._collection.documents)).tolist() if i not in known)
        for document in (*near, *far):
            room -= self._size(len(shown), document)
            if room < 0:  # a shorter one is not looked for: documents would be shorter the less room there is
                break
            shown.append(document)
        return shown

    def _heading(self, place: int) -> list[int]:
        return self._tokenizer.encode(("\n\n" if place else "") + f"Document {place + 1}:\n")

    def _text(self, document: int) -> list[int]:
        if document not in self._encoded:
            self._encoded[document] = self._tokenizer.encode(self._collection.documents[document])
        return self._encoded[document]

    def _size(self, place: int, document: int) -> int:
        return len(self._heading(place)) + len(self._text(document))


class _Qa1(QaGenerator):
    name = "qa_1"
    needs = "a JSON file of SQuAD's"
    read = staticmethod(read_squad)


class _Qa2(QaGenerator):
    name = "qa_2"
    needs = "a JSON file of HotpotQA's"
    read = staticmethod(read_hotpotqa)


QA = {generator.name: generator for generator in (_Qa1, _Qa2)}
"""Generators by their names."""


def _sorted(texts: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """Different texts in order, and the place of each."""
    found = sorted(set(texts))
    return found, {text: place for place, text in enumerate(found)}


def _different(items: Iterable[Hashable]) -> tuple:
    return tuple(dict.fromkeys(items))
