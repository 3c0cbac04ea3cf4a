"""Associative recall with any number of pairs: how much a memory holds.

    Each name below has a number. Remember all of them.
    " riko: 47."                                                           for every pair
    " What is the number of riko? riko:"
    " 47"

Names are coded words (`vocabulary.coded_word`), drawn from the first 64 or from twice as many as there are pairs;
numbers have `digits` digits and do not begin with 0: with two, guessing is right once in 90 times, with one, once in 9.
With a tokenizer that was trained on the task, a name and a digit are a token each; one digit then asks for matching and
holding alone.
"""

from __future__ import annotations

import numpy as np

from data.synthetic.base import Ask, Draft, Encoder, Filler, FillerTask, SyntheticDocument
from data.synthetic.vocabulary import CODED_WORDS, coded_word

INTRODUCTION = "Each name below has a number. Remember all of them."
FACT = " {name}: {number}."
QUESTION = " What is the number of {name}? {name}:"
FEWEST_NAMES = 64


class RecallGenerator(FillerTask):
    """Makes documents with `pairs` pairs.

    Args:
        questions: asked at the end of a document, each about another pair.
        digits: of a number.
    """

    has_depth = False

    def __init__(
        self,
        tokenizer: Encoder,
        *,
        pairs: int = 16,
        questions: int = 1,
        digits: int = 2,
        filler: Filler | None = None,
    ) -> None:
        if not 1 <= pairs <= CODED_WORDS // 2:
            raise ValueError(f"pairs = {pairs}: must be between 1 and {CODED_WORDS // 2}")
        if questions > pairs:
            raise ValueError(f"questions = {questions}: must not be more than the pairs, {pairs}")
        if not 1 <= digits <= 18:
            raise ValueError(f"digits = {digits}: must be between 1 and 18")
        super().__init__(tokenizer, questions, filler)
        self._pairs = pairs
        self._digits = digits

    def document(self, length: int, depth: float, seed: int) -> SyntheticDocument:
        """See `base.Generator`; `depth` is not used, the pairs stand anywhere."""
        rng = np.random.default_rng(seed)
        names = [coded_word(int(i)) for i in rng.permutation(max(FEWEST_NAMES, 2 * self._pairs))[: self._pairs]]
        numbers = rng.integers(10 ** (self._digits - 1), 10**self._digits, size=self._pairs).tolist()
        asks = [Ask(QUESTION.format(name=names[i]), f" {numbers[i]}", i) for i in rng.permutation(self._pairs).tolist()]
        facts = [FACT.format(name=name, number=number) for name, number in zip(names, numbers, strict=True)]
        draft = Draft(INTRODUCTION, facts, sorted(rng.uniform(size=self._pairs)), asks)
        return self.assemble(draft, length=length, seed=seed, key=f"recall-{length}-{self._pairs}-{seed}")
