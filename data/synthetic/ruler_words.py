"""RULER's common and frequent words (arXiv 2404.06654), with its templates.

cwe: 10 words come 30 times each, the others 3 times (6 and once in documents of fewer than 4,096 tokens), mixed; as
many others as the length allows. An example of the same kind comes first.

    Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that
    appear most often.                                                                                  (one line)
    1. bridge 2. lemon 3. bridge ...
    Question: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often in
    the list are:                                                                                       (one line)

fwe: words of six random letters; the one of rank k comes N k^-2 / zeta(2) times, rounded down; the first rank is dots.

    Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared
    coded words. ... kxqbna ... vrtomu                                                                  (one line)
    Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently
    appeared words in the above coded text? Answer: According to the coded text above, the three most frequently
    appeared words are:                                                                                 (one line)
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence

import numpy as np

from data.prepared.questions import Question
from data.synthetic.base import Ask, Encoder, SyntheticDocument, ask_tokens, with_match
from data.synthetic.vocabulary import ADJECTIVES, CODED_WORDS, NOUNS, coded_word

CWE_INTRODUCTION = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
CWE_QUESTION = (
    "\nQuestion: What are the 10 most common words in the above list? "
    "Answer: The top 10 words that appear most often in the list are:"
)
COMMON = 10
LONG = 4096
"""From so many tokens on words come more often."""
CWE_NEW_TOKENS = 120

FWE_INTRODUCTION = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words."
)
FWE_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
    "appeared words are:"
)
ASKED = 3
FWE_LETTERS = 6
TOKENS_PER_WORD = 50
"""One different word for so many tokens of a document."""
FWE_NEW_TOKENS = 50


class CweGenerator:
    """Makes numbered lists of nouns and adjectives; with many words, coded ones are among those that are not common."""

    has_depth = False
    sample_length = 1 << 14

    def __init__(self, tokenizer: Encoder) -> None:
        self._tokenizer = tokenizer

    def document(self, length: int, depth: float, seed: int) -> SyntheticDocument:
        """See `base.Generator`; `depth` is not used."""
        rng = np.random.default_rng(seed)
        plain = sorted({*NOUNS, *ADJECTIVES})
        often, seldom, others = (10, 3, 30) if length >= LONG else (3, 1, 10)
        shown = [plain[i] for i in rng.permutation(len(plain))[: COMMON + others]]
        example = _numbered(_mixed(shown, often, seldom, rng)) + CWE_QUESTION + _numbered(shown[:COMMON])
        introduction = f"{CWE_INTRODUCTION}{example}\n{CWE_INTRODUCTION}"
        often, seldom = (30, 3) if length >= LONG else (6, 1)
        words = [plain[i] for i in rng.permutation(len(plain))]
        words += [coded_word(int(i)) for i in rng.permutation(CODED_WORDS)]
        ask = Ask(CWE_QUESTION, " " + _numbered(words[:COMMON]), 0)
        tokens = self._tokenizer.encode(introduction)
        fixed = len(tokens) + sum(len(self._tokenizer.encode(text)) for text in (ask.question, ask.answer))
        count = self._fitting(words, often, seldom, length - fixed)
        if count <= COMMON:
            raise ValueError(f"a list of {length} tokens is too short for {COMMON} common words and another one")
        for number, word in enumerate(_mixed(words[:count], often, seldom, rng)):
            tokens += self._tokenizer.encode(_number(number)) + self._tokenizer.encode(f" {word}")
        return _ending(self._tokenizer, tokens, ask, f"cwe-{length}-{seed}", CWE_NEW_TOKENS, words[:COMMON])

    def _fitting(self, words: Sequence[str], often: int, seldom: int, room: int) -> int:
        """How many of the words there is room for; the first `COMMON` come `often`, the others `seldom`."""
        listed = 0
        for count, word in enumerate(words):
            times = often if count < COMMON else seldom
            numbers = range(listed, listed + times)
            room -= sum(len(self._tokenizer.encode(_number(number))) for number in numbers)
            room -= times * len(self._tokenizer.encode(f" {word}"))
            if room < 0:
                return count
            listed += times
        return len(words)


class FweGenerator:
    """Makes texts of coded words whose numbers fall as the square of their rank."""

    has_depth = False

    def __init__(self, tokenizer: Encoder) -> None:
        self._tokenizer = tokenizer

    def document(self, length: int, depth: float, seed: int) -> SyntheticDocument:
        """See `base.Generator`; `depth` is not used."""
        rng = np.random.default_rng(seed)
        letters = list(string.ascii_lowercase)
        kinds: dict[str, None] = {"...": None}
        while len(kinds) < max(length // TOKENS_PER_WORD, ASKED + 2):
            kinds["".join(rng.choice(letters, FWE_LETTERS))] = None
        words = list(kinds)
        asked = words[1 : ASKED + 1]
        ask = Ask(FWE_QUESTION, " " + " ".join(asked), 0)
        tokens = self._tokenizer.encode(FWE_INTRODUCTION)
        room = length - len(tokens) - sum(len(self._tokenizer.encode(text)) for text in (ask.question, ask.answer))
        encoded = [self._tokenizer.encode(f" {word}") for word in words]
        sizes = np.array([len(own) for own in encoded])
        total = max(room, 0)  # a word has a token at least, and all words together are fewer than N
        while (_counts(total, len(words)) * sizes).sum() > room > 0:
            total -= max(1, total // 200)
        counts = _counts(total, len(words)).tolist()
        if len(set(counts[1 : ASKED + 2])) <= ASKED:
            raise ValueError(f"a text of {length} tokens is too short to have {ASKED} frequent words")
        order = rng.permutation(np.repeat(np.arange(len(words)), counts)).tolist()
        tokens += [token for word in order for token in encoded[word]]
        return _ending(self._tokenizer, tokens, ask, f"fwe-{length}-{seed}", FWE_NEW_TOKENS, asked)


def _counts(total: int, words: int) -> np.ndarray:
    """How often the word of each rank comes."""
    return np.floor(total * np.arange(1.0, words + 1) ** -2 / (math.pi**2 / 6)).astype(np.int64)


def _mixed(words: Sequence[str], often: int, seldom: int, rng: np.random.Generator) -> list[str]:
    """The first `COMMON` words `often` and the others `seldom`, in any order."""
    all_of_them = [*words[:COMMON] * often, *words[COMMON:] * seldom]
    return [all_of_them[i] for i in rng.permutation(len(all_of_them))]


def _number(place: int) -> str:
    return f"{' ' if place else ''}{place + 1}."


def _numbered(words: Sequence[str]) -> str:
    return "".join(f"{_number(place)} {word}" for place, word in enumerate(words))


def _ending(
    tokenizer: Encoder, tokens: list[int], ask: Ask, key: str, new_tokens: int, references: Sequence[str]
) -> SyntheticDocument:
    """The document that `tokens` and a question about all of them make."""
    piece, (first, stop) = ask_tokens(tokenizer, ask.question, ask.answer)
    span = (len(tokens) + first, len(tokens) + stop)
    probe = Question(tuple(piece), (first, stop), after=len(tokens))
    made = SyntheticDocument(tokens + piece, [span], [probe], key)
    return with_match(made, tokenizer, ask, new_tokens, references)
