"""Needles with several keys, values and queries, as RULER has them (arXiv 2404.06654), with five digits for its seven.

    Some special magic numbers are hidden within the following text. Make sure to memorize them. I will quiz you about
    the numbers afterwards.                                                                             (one line)
    " One of the special magic numbers for W is: N."                       for every key W and each of its values N
    " What are all the special magic numbers for W1, W2 mentioned in the provided text? The special magic numbers for
    W1, W2 mentioned in the provided text are"                                                          (one line)
    " N1, N2, N3, N4"

The answer has the values of the first word asked for, in the order in which they stand in the text, then those of the
next. With one word and one value it reads 'What is the special magic number for W ...'. Words are `vocabulary.NOUNS`.
"""

from __future__ import annotations

import numpy as np

from data.synthetic.base import Ask, Draft, Encoder, Filler, FillerTask, SyntheticDocument, check_depth
from data.synthetic.base import digits as draw_digits
from data.synthetic.vocabulary import NOUNS

INTRODUCTION = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the numbers afterwards."
)
NEEDLE = " One of the special magic numbers for {word} is: {number}."
QUESTION_ONE = (
    " What is the special magic number for {words} mentioned in the provided text? "
    "The special magic number for {words} mentioned in the provided text is"
)
QUESTION_ALL = (
    " What are all the special magic numbers for {words} mentioned in the provided text? "
    "The special magic numbers for {words} mentioned in the provided text are"
)


class NeedlesGenerator(FillerTask):
    """Makes documents with `keys` words of `values` numbers each; a question asks for `queries` words.

    Args:
        questions: asked at the end of a document, each about other words.
    """

    has_depth = True

    def __init__(
        self,
        tokenizer: Encoder,
        *,
        keys: int = 4,
        values: int = 1,
        queries: int = 1,
        questions: int = 1,
        filler: Filler | None = None,
    ) -> None:
        if not 1 <= keys <= len(NOUNS):
            raise ValueError(f"keys = {keys}: must be between 1 and {len(NOUNS)}")
        if queries * questions > keys:
            raise ValueError(f"queries x questions = {queries * questions}: must not be more than the keys, {keys}")
        super().__init__(tokenizer, questions, filler)
        self._keys, self._values, self._queries = keys, values, queries

    def document(self, length: int, depth: float, seed: int) -> SyntheticDocument:
        """See `base.Generator`; the first value of the word that is asked first stands at `depth`."""
        check_depth(depth)
        rng = np.random.default_rng(seed)
        words = [NOUNS[i] for i in rng.permutation(len(NOUNS))[: self._keys]]
        pairs = [(word, draw_digits(rng)) for word in words for _ in range(self._values)]
        depths = [depth, *rng.uniform(size=len(pairs) - 1)]
        order = sorted(range(len(pairs)), key=lambda i: depths[i])
        form = QUESTION_ONE if self._queries == self._values == 1 else QUESTION_ALL
        asks = []
        for first in range(0, self._keys - self._queries + 1, self._queries):
            asked = words[first : first + self._queries]
            found = [place for word in asked for place, i in enumerate(order) if pairs[i][0] == word]
            answer = " " + ", ".join(pairs[order[place]][1] for place in found)
            asks.append(Ask(form.format(words=", ".join(asked)), answer, max(found)))
        facts = [NEEDLE.format(word=pairs[i][0], number=pairs[i][1]) for i in order]
        draft = Draft(INTRODUCTION, facts, [depths[i] for i in order], asks)
        return self.assemble(draft, length=length, seed=seed, key=f"needles-{length}-{depth:.4f}-{seed}")
