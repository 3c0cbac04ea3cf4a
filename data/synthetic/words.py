"""Frequent words, as RULER has it (arXiv 2404.06654, frequent words extraction with its Zipf exponent 2).

    Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared
    coded words.                                                                                        (one line)
    " riko" " bada" ...                                                    as many as the length allows
    " Question: What are the three most frequently appeared words in the above coded text? Answer: According to the
    coded text above, the three most frequently appeared words are:"                                    (one line)
    " bada tune riko"

The answer begins with the most frequent one; the three and the fourth differ in their numbers. There is no filler, and
the question can only be asked at the end.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from data.prepared.questions import Question
from data.synthetic.base import Encoder, SyntheticDocument, ask_tokens
from data.synthetic.vocabulary import CODED_WORDS, coded_word

INTRODUCTION = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words."
)
QUESTION = (
    " Question: What are the three most frequently appeared words in the above coded text? Answer: According to the "
    "coded text above, the three most frequently appeared words are:"
)
EXPONENT = 2.0
WORDS = 50
"""Different words of a document."""
ASKED = 3


class WordsGenerator:
    """Makes documents of coded words whose frequencies fall as a power of their rank."""

    has_depth = False

    def __init__(self, tokenizer: Encoder) -> None:
        self._tokenizer = tokenizer

    def document(self, length: int, depth: float, seed: int) -> SyntheticDocument:
        """See `base.Generator`; `depth` is not used."""
        rng = np.random.default_rng(seed)
        words = [" " + coded_word(int(i)) for i in rng.permutation(CODED_WORDS)[:WORDS]]
        encoded = [self._tokenizer.encode(word) for word in words]
        introduction = self._tokenizer.encode(INTRODUCTION)
        longest = sum(sorted((len(tokens) for tokens in encoded), reverse=True)[:ASKED])
        room = length - len(introduction) - len(self._tokenizer.encode(QUESTION)) - longest
        share = np.arange(1, WORDS + 1) ** -EXPONENT
        drawn = rng.choice(WORDS, size=max(room, 0), p=share / share.sum()).tolist()
        sizes = np.cumsum([len(encoded[word]) for word in drawn])
        drawn = drawn[: int(np.searchsorted(sizes, room, side="right"))]
        while not _distinct(drawn):
            if not drawn:
                raise ValueError(f"a text of {length} tokens is too short to have {ASKED} frequent words")
            drawn.pop()
        tokens = introduction + [token for word in drawn for token in encoded[word]]
        answer = "".join(words[word] for word, _ in Counter(drawn).most_common(ASKED))
        asked, (first, stop) = ask_tokens(self._tokenizer, QUESTION, answer)
        question = Question(tuple(asked), (first, stop), after=len(tokens))
        span = (len(tokens) + first, len(tokens) + stop)
        return SyntheticDocument(tokens + asked, [span], [question], f"words-{length}-{seed}")


def _distinct(drawn: list[int]) -> bool:
    """Whether the most frequent words and the one after them come in different numbers."""
    counts = [count for _, count in Counter(drawn).most_common(ASKED + 1)]
    return len(counts) > ASKED and len(set(counts)) == len(counts)
