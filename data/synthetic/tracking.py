"""Variable tracking, as RULER has it (arXiv 2404.06654), with names of three letters for its five.

    Memorize and track the chain(s) of variable assignment hidden in the following text.
    " VAR ABC = 12345."  " VAR XYZ = VAR ABC."  ...                        each chain in order, chains mixed
    " Question: Find all variables that are assigned the value 12345 in the text above. Answer: According to the
    chain(s) of variable assignment in the text above, 3 variables are assigned the value 12345, they are:" (one line)
    " ABC XYZ QRS"

The variables of the answer come in the order of their assignment.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

import numpy as np

from data.synthetic.base import Ask, Draft, Encoder, Filler, FillerTask, SyntheticDocument, digits

INTRODUCTION = "Memorize and track the chain(s) of variable assignment hidden in the following text."
FIRST = " VAR {name} = {value}."
NEXT = " VAR {name} = VAR {before}."
QUESTION = (
    " Question: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
    "chain(s) of variable assignment in the text above, {count} variables are assigned the value {value}, they are:"
)
LETTERS = 3


class TrackingGenerator(FillerTask):
    """Makes documents with `chains` chains of `hops` assignments behind the first.

    Args:
        questions: asked at the end of a document, each about another chain.
    """

    has_depth = False

    def __init__(
        self,
        tokenizer: Encoder,
        *,
        chains: int = 1,
        hops: int = 4,
        questions: int = 1,
        filler: Filler | None = None,
    ) -> None:
        if questions > chains:
            raise ValueError(f"questions = {questions}: must not be more than the chains, {chains}")
        most = len(string.ascii_uppercase) ** LETTERS // 2  # drawing the last names that are left would take for ever
        if chains * (hops + 1) > most:
            raise ValueError(f"chains = {chains}, hops = {hops}: there are names for {most:,} variables together")
        super().__init__(tokenizer, questions, filler)
        self._chains, self._hops = chains, hops

    def document(self, length: int, depth: float, seed: int) -> SyntheticDocument:
        """See `base.Generator`; `depth` is not used, the assignments stand anywhere."""
        rng = np.random.default_rng(seed)
        names, values = draw_chains(rng, self._chains, self._hops + 1, LETTERS, digits)
        facts, ends = assignments(rng, names, values, FIRST, NEXT)
        asks = [
            Ask(QUESTION.format(value=value, count=len(own)), " " + " ".join(own), end)
            for value, own, end in zip(values, names, ends, strict=True)
        ]
        draft = Draft(INTRODUCTION, facts, sorted(rng.uniform(size=len(facts))), asks)
        return self.assemble(draft, length=length, seed=seed, key=f"tracking-{length}-{seed}")


def draw_chains(
    rng: np.random.Generator, chains: int, each: int, letters: int, draw_value: Callable[[np.random.Generator], str]
) -> tuple[list[list[str]], list[str]]:
    """Different names of every chain's `each` variables, and different values of the chains."""
    names: dict[str, None] = {}
    while len(names) < chains * each:
        names["".join(rng.choice(list(string.ascii_uppercase), letters))] = None
    values: dict[str, None] = {}
    while len(values) < chains:
        values[draw_value(rng)] = None
    flat = list(names)
    return [flat[i * each : (i + 1) * each] for i in range(chains)], list(values)


def assignments(
    rng: np.random.Generator, names: Sequence[Sequence[str]], values: Sequence[str], first: str, following: str
) -> tuple[list[str], list[int]]:
    """The assignments of all chains, each chain in order and the chains mixed, and where each chain's last one stands.

    Args:
        first, following: forms of an assignment, with `name`, `value` and `before`.
    """
    turns = rng.permutation(np.repeat(np.arange(len(names)), len(names[0]))).tolist()
    facts, done, ends = [], [0] * len(names), [0] * len(names)
    for place, chain in enumerate(turns):
        own, step = names[chain], done[chain]
        form = following if step else first
        facts.append(form.format(name=own[step], before=own[step - 1], value=values[chain]))
        done[chain], ends[chain] = step + 1, place
    return facts, ends
