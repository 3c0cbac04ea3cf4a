"""The passkey task: the Infini-attention paper's (appendix B), and with named keys.

The text of a document is, with five random digits K in place of 9054's four,

    There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about
    the important information there.                                                                    (one line)
    x times: " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    " The pass key is K. Remember it. K is the pass key."
    y times: the same filler
    " What is the pass key? The pass key is"
    " K"

joined without anything between the parts. The digits of the last K are the answer. x + y is what the length allows, and
x = round(depth * (x + y)); what they leave of the length is the end of a filler behind the needle. With several keys
each has a word W, drawn from `vocabulary.NOUNS`:

    " The pass key of W is K. Remember it. K is the pass key of W."
    " What is the pass key of W? The pass key of W is"

The key that is asked first stands at the depth asked for, the others anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.synthetic.base import (
    FILLER,
    Ask,
    Draft,
    Encoder,
    Filler,
    FillerTask,
    SyntheticDocument,
    ask_tokens,
    check_depth,
    digits,
)
from data.synthetic.vocabulary import NOUNS

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
NEEDLE = " The pass key{of} is {key}. Remember it. {key} is the pass key{of}."
QUESTION = " What is the pass key{of}? The pass key{of} is"


@dataclass(frozen=True)
class PasskeyParts:
    """The tokens of a passkey document's parts."""

    introduction: list[int]
    """With the tokens that begin a document."""
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


class PasskeyGenerator(FillerTask):
    """Makes passkey documents with one tokenizer; a document is a function of (length, depth, seed) alone.

    Args:
        keys: in a document; one alone has no name.
        questions: asked at the end of a document; the others may be asked by probes.
        filler: what the keys are hidden in; None is the paper's sentences.
    """

    has_depth = True

    def __init__(self, tokenizer: Encoder, *, keys: int = 1, questions: int = 1, filler: Filler | None = None) -> None:
        if not 1 <= keys <= len(NOUNS):
            raise ValueError(f"keys = {keys}: must be between 1 and {len(NOUNS)}")
        if questions > keys:
            raise ValueError(f"questions = {questions}: must not be more than the keys, {keys}")
        super().__init__(tokenizer, questions, filler)
        self._keys = keys

    def parts(self, seed: int) -> PasskeyParts:
        """The parts of a document with one key; `seed` decides the digits."""
        key = digits(np.random.default_rng(seed))
        question = self._tokenizer.encode(QUESTION.format(of=""))
        asked, (first, _) = ask_tokens(self._tokenizer, QUESTION.format(of=""), f" {key}")
        return PasskeyParts(
            [*self._tokenizer.begin_ids, *self._tokenizer.encode(INTRODUCTION)],
            self._tokenizer.encode(FILLER),
            self._tokenizer.encode(NEEDLE.format(key=key, of="")),
            question,
            asked[len(question) :],
            first - len(question),
        )

    def document(self, length: int, depth: float, seed: int) -> SyntheticDocument:
        """A document of `length` tokens, see `base.Generator`.

        Raises:
            ValueError: `length` does not hold the document without any filler, or `depth` is outside of [0, 1].
        """
        check_depth(depth)
        rng = np.random.default_rng(seed)
        keys = [digits(rng) for _ in range(self._keys)]
        names = [f" of {NOUNS[i]}" for i in rng.permutation(len(NOUNS))[: self._keys]] if self._keys > 1 else [""]
        depths = [depth, *rng.uniform(size=self._keys - 1)]
        order = sorted(range(self._keys), key=lambda i: depths[i])
        draft = Draft(
            INTRODUCTION,
            [NEEDLE.format(key=keys[i], of=names[i]) for i in order],
            [depths[i] for i in order],
            [Ask(QUESTION.format(of=names[i]), f" {keys[i]}", order.index(i)) for i in range(self._keys)],
        )
        return self.assemble(draft, length=length, seed=seed, key=f"passkey-{length}-{depth:.4f}-{seed}")
