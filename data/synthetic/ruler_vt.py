"""RULER's variable tracking (arXiv 2404.06654), its template with its example and its 'assgined'.

    Memorize and track the chain(s) of variable assignment hidden in the following text.       (and an empty line)
    The grass is green. ...                                       a line each time; between the lines, in any place:
     VAR ABCDE = 12345   VAR FGHIJ = VAR ABCDE  ...               names of five letters, numbers from 10000 to 99998
    Question: Find all variables that are assigned the value 12345 in the text above. Answer: According to the chain(s)
    of variable assignment in the text above, 5 variables are assgined the value 12345, they are:       (one line)

An example of the same kind with names of three letters, its answer and four line breaks come first.
"""

from __future__ import annotations

import numpy as np

from data.synthetic.base import FILLER, Ask, Draft, Encoder, FillerTask, SentenceFiller, SyntheticDocument, with_match
from data.synthetic.tracking import assignments, draw_chains

INTRODUCTION = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
LINE = FILLER + "\n"
FIRST = " VAR {name} = {value}"
NEXT = " VAR {name} = VAR {before} "
QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
    "chain(s) of variable assignment in the text above, {count} variables are assgined the value {value}, they are:"
)
LETTERS, EXAMPLE_LETTERS = 5, 3
EXAMPLE_LINES, EXAMPLE_HOPS = 10, 10
MOST_NAMES = 100_000
"""Far below the 11,881,376 of five letters: drawing the last ones that are left would take for ever."""
NEW_TOKENS = 30


class VtGenerator(FillerTask):
    """Makes documents with `chains` chains of `hops` assignments behind the first; the first chain is asked for."""

    has_depth = False

    def __init__(self, tokenizer: Encoder, *, chains: int = 1, hops: int = 4) -> None:
        if chains * (hops + 1) > MOST_NAMES:
            raise ValueError(f"chains = {chains}, hops = {hops}: there are at most {MOST_NAMES:,} variables together")
        super().__init__(tokenizer, 1, SentenceFiller(tokenizer, LINE))
        self._chains, self._hops = chains, hops

    def document(self, length: int, depth: float, seed: int) -> SyntheticDocument:
        """See `base.Generator`; `depth` is not used, the assignments stand anywhere."""
        rng = np.random.default_rng(seed)
        example = self._example(rng)
        names, values = draw_chains(rng, self._chains, self._hops + 1, LETTERS, _value)
        facts, ends = assignments(rng, names, values, FIRST, NEXT)
        asks = [
            Ask(_question(value, own), " " + " ".join(own), end)
            for value, own, end in zip(values, names, ends, strict=True)
        ]
        draft = Draft(example + INTRODUCTION, facts, sorted(rng.uniform(size=len(facts))), asks)
        made = self.assemble(draft, length=length, seed=seed, key=f"vt-{length}-{seed}")
        return with_match(made, self._tokenizer, asks[0], NEW_TOKENS, names[0])

    def _example(self, rng: np.random.Generator) -> str:
        (names,), (value,) = draw_chains(rng, 1, min(self._hops, EXAMPLE_HOPS) + 1, EXAMPLE_LETTERS, _value)
        facts, _ = assignments(rng, [names], [value], FIRST, NEXT)
        lines = [LINE] * EXAMPLE_LINES
        places = sorted(rng.integers(EXAMPLE_LINES + 1, size=len(facts)).tolist())
        for place, fact in reversed(list(zip(places, facts, strict=True))):
            lines.insert(place, fact)
        return f"{INTRODUCTION}{''.join(lines)}{_question(value, names)}  {' '.join(names)}\n\n\n\n"


def _question(value: str, names: list[str]) -> str:
    return QUESTION.format(value=value, count=len(names))


def _value(rng: np.random.Generator) -> str:
    return str(rng.integers(10_000, 99_999))
