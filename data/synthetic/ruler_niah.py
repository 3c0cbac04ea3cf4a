"""RULER's needles in a haystack (arXiv 2404.06654), with its templates and its settings under its names.

    A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the
    number afterwards.                                                                                  (one line)
    HAYSTACK with 'One of the special magic numbers for KEY is: VALUE.'
    What is the special magic number for KEY mentioned in the provided text? The special magic number for KEY mentioned
    in the provided text is                                                                             (one line)

| name | haystack | keys | values of each | keys asked for |
| --- | --- | --- | --- | --- |
| niah_single_1 | the five sentences, a line each time | 1 word | 1 number | 1 |
| niah_single_2, 3 | essays | 1 word | 1 number, 1 uuid | 1 |
| niah_multikey_1 | essays | 4 words | 1 number | 1 |
| niah_multikey_2, 3 | other needles, a line each | words, uuids | 1 number, 1 uuid | 1 |
| niah_multivalue | essays | 1 word | 4 numbers | 1 |
| niah_multiquery | essays | 4 words | 1 number | 4 |

Words are an adjective and a noun, numbers have seven digits. With several answers the template begins 'Some special
magic numbers are hidden' and asks 'What are all'.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data.synthetic.base import (
    FILLER,
    Ask,
    Draft,
    Encoder,
    Filler,
    FillerTask,
    SentenceFiller,
    SyntheticDocument,
    check_depth,
    with_match,
)
from data.synthetic.vocabulary import ADJECTIVES, NOUNS

INTRODUCTION = (
    "{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
QUESTION = (
    "What {are_all} the special magic {kind} for {keys} mentioned in the provided text? "
    "The special magic {kind} for {keys} mentioned in the provided text {are}"
)
NEW_TOKENS = 128


@dataclass(frozen=True)
class Form:
    """What tells one of RULER's needle tasks from another."""

    haystack: str
    """`repeat`, `essay` or `needle`."""
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def single(self) -> bool:
        return self.values == self.queries == 1


class NoFiller:
    """For documents whose facts are all there is: they are as long as whole facts make them."""

    def place(self, depth: float, room: int, seed: int) -> int:
        return 0

    def tokens(self, room: int, seed: int, last_fact: int) -> list[int]:
        return []


class NiahGenerator(FillerTask):
    """Makes documents of the task that a subclass's `form` says."""

    form: Form

    def __init__(self, tokenizer: Encoder, filler: Filler | None) -> None:
        super().__init__(tokenizer, 1, filler)
        self._kind = self.form.value[:-1] if self.form.single else self.form.value

    def document(self, length: int, depth: float, seed: int) -> SyntheticDocument:
        """See `base.Generator`; the first value of the key that is asked for stands at `depth`."""
        check_depth(depth)
        form, rng = self.form, np.random.default_rng(seed)
        keys = _different(form.keys, _DRAWS[form.key], rng)
        pairs = [(key, value) for key in keys for value in _different(form.values, _DRAWS[form.value], rng)]
        asks = []
        for first in range(0, form.keys, form.queries):
            asked = keys[first : first + form.queries]
            values = [value for key, value in pairs if key in asked]
            asks.append((asked, values))
        if form.haystack == "needle":
            pairs = self._among_others(pairs, asks[0], length, depth, rng)
            depths = [0.0] * len(pairs)
        else:
            depths = [depth, *rng.uniform(size=len(pairs) - 1)]
            order = sorted(range(len(pairs)), key=lambda i: depths[i])
            pairs, depths = [pairs[i] for i in order], [depths[i] for i in order]
        draft = Draft(
            self._introduction(),
            [self._fact(key, value) for key, value in pairs],
            depths,
            [self._ask(asked, values, pairs) for asked, values in asks],
        )
        name = type(self).__name__
        made = self.assemble(draft, length=length, seed=seed, key=f"{name}-{length}-{depth:.4f}-{seed}")
        return with_match(made, self._tokenizer, draft.asks[0], NEW_TOKENS, asks[0][1])

    def _introduction(self) -> str:
        some, are = ("A", "is") if self.form.single else ("Some", "are")
        return INTRODUCTION.format(some=some, kind=self._kind, are=are)

    def _fact(self, key: str, value: str) -> str:
        needle = NEEDLE.format(kind=self.form.value, key=key, value=value)
        return f" {needle}" if self.form.haystack == "essay" else f"{needle}\n"

    def _ask(self, asked: list[str], values: list[str], pairs: list[tuple[str, str]]) -> Ask:
        are, are_all = ("is", "is") if self.form.single else ("are", "are all")
        keys = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
        question = QUESTION.format(are_all=are_all, kind=self._kind, keys=keys, are=are)
        line = "\n" if self.form.haystack == "essay" else ""  # the other haystacks end with one
        last = max(place for place, (key, _) in enumerate(pairs) if key in asked)
        return Ask(line + question, " " + ", ".join(values), last)

    def _among_others(
        self,
        pairs: list[tuple[str, str]],
        asked: tuple[list[str], list[str]],
        length: int,
        depth: float,
        rng: np.random.Generator,
    ) -> list[tuple[str, str]]:
        """The pairs among as many others, with other keys and values, as the length allows."""
        ask = self._ask(*asked, pairs)
        fixed = [self._introduction(), *(self._fact(*pair) for pair in pairs), ask.question, ask.answer]
        room = length - sum(len(self._tokenizer.encode(text)) for text in fixed)
        known = {text for pair in pairs for text in pair}
        others: list[tuple[str, str]] = []
        while room > 0:
            pair = (_DRAWS[self.form.key](rng), _DRAWS[self.form.value](rng))
            if known & set(pair):
                continue
            room -= len(self._tokenizer.encode(self._fact(*pair)))
            if room >= 0:
                others.append(pair)
        place = round(depth * len(others))
        return [*others[:place], *pairs, *others[place:]]


class _NiahInLines(NiahGenerator):
    """The five sentences, a line each time, or other needles."""

    has_depth = True

    def __init__(self, tokenizer: Encoder) -> None:
        lines = NoFiller() if self.form.haystack == "needle" else SentenceFiller(tokenizer, FILLER.strip() + "\n")
        super().__init__(tokenizer, lines)


class _NiahInEssays(NiahGenerator):
    has_depth = True
    needs_filler = "essays"

    def __init__(self, tokenizer: Encoder, *, filler: Filler | None = None) -> None:
        super().__init__(tokenizer, filler)


def _word(rng: np.random.Generator) -> str:
    return f"{ADJECTIVES[int(rng.integers(len(ADJECTIVES)))]}-{NOUNS[int(rng.integers(len(NOUNS)))]}"


def _number(rng: np.random.Generator) -> str:
    return str(rng.integers(10**6, 10**7))


def _uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


_DRAWS: dict[str, Callable[[np.random.Generator], str]] = {"words": _word, "numbers": _number, "uuids": _uuid}


def _different(count: int, draw: Callable[[np.random.Generator], str], rng: np.random.Generator) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[draw(rng)] = None
    return list(drawn)


FORMS = {
    "niah_single_1": Form("repeat"),
    "niah_single_2": Form("essay"),
    "niah_single_3": Form("essay", value="uuids"),
    "niah_multikey_1": Form("essay", keys=4),
    "niah_multikey_2": Form("needle"),
    "niah_multikey_3": Form("needle", key="uuids", value="uuids"),
    "niah_multivalue": Form("essay", values=4),
    "niah_multiquery": Form("essay", keys=4, queries=4),
}

NIAH = {
    name: type(name, (_NiahInEssays if form.haystack == "essay" else _NiahInLines,), {"form": form})
    for name, form in FORMS.items()
}
"""Generators by RULER's names."""
