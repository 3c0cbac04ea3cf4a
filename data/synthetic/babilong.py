"""BABILong's qa1 to qa5 (arXiv 2406.10149): a world as in bAbI's tasks 1 to 5, told in its words, in background text.

    qa1   'Mary moved to the bathroom.' ...                          'Where is Mary?'
    qa2   also 'Mary got the milk there.', 'Mary dropped the milk.'  'Where is the milk?'
    qa3   the same                                                   'Where was the milk before the bathroom?'
    qa4   'The office is north of the bedroom.' and another          'What is north of the bedroom?',
                                                                     'What is the bedroom north of?'
    qa5   also 'Fred gave the milk to Bill.'                         'What did Fred give to Bill?',
                                                                     'Who gave the milk?', 'Who gave the milk to Bill?',
                                                                     'Who did Fred give the milk to?',
                                                                     'Who received the milk?'

The stories are drawn here, not bAbI's own. Facts stand in the order in which they happen, between sentences of the
background. The prompt is BABILong's (`babilong_prompts`); what a model writes is scored as there. The answer that a
document ends with has the form of the prompt's examples; only its last word, the one asked for, counts as the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.synthetic.babilong_prompts import AFTER, PROMPTS
from data.synthetic.base import Ask, Draft, Encoder, Filler, FillerTask, SyntheticDocument
from data.synthetic.facts import PERSONS, PLACES, THINGS, Story
from data.synthetic.scoring import OnlyLabel

GO = ("moved to", "went to", "went back to", "travelled to", "journeyed to")
TAKE = ("got", "took", "grabbed", "picked up")
DROP = ("dropped", "discarded", "left", "put down")
GIVE = ("gave", "passed", "handed")
GIVERS = ("Fred", "Jeff", "Bill", "Mary")
DIRECTIONS = ("north", "south", "east", "west")
FEWEST = {1: 2, 2: 3, 3: 4, 5: 3}
"""Facts of a story at least; qa4 has always two."""
ATTEMPTS = 1000
"""Stories that are drawn before one with a question must have come."""
NEW_TOKENS = 20


@dataclass(frozen=True)
class _Asked:
    question: str
    lead: str
    """What the answer begins with, by the form of the prompt."""
    answer: str
    fact: int
    """The last one that the answer follows from."""


class BabilongGenerator(FillerTask):
    """Makes documents of the task that a subclass's `task` says, with up to `facts` facts."""

    has_depth = False
    needs_filler = "background text"
    sample_length = 1 << 14
    task: int

    def __init__(self, tokenizer: Encoder, facts: int, filler: Filler | None) -> None:
        fewest = FEWEST.get(self.task, 2)
        if facts < fewest:
            raise ValueError(f"facts = {facts}: must be at least {fewest}")
        super().__init__(tokenizer, 1, filler)
        self._facts = facts

    def document(self, length: int, depth: float, seed: int) -> SyntheticDocument:
        """See `base.Generator`; `depth` is not used, the facts stand anywhere."""
        rng = np.random.default_rng(seed)
        for _ in range(ATTEMPTS):
            facts, asked = self._story(rng)
            if asked:
                break
        else:
            raise ValueError(f"{self._facts} facts are too few for a question of qa{self.task}")
        asked = [asked[i] for i in rng.permutation(len(asked))]
        draft = Draft(
            PROMPTS[self.task].before,
            facts,
            sorted(rng.uniform(size=len(facts))),
            [Ask(f"{AFTER}{one.question}\nAnswer:{one.lead}", f" {one.answer}", one.fact) for one in asked],
        )
        name = f"babilong_qa{self.task}"
        made = self.assemble(draft, length=length, seed=seed, key=f"{name}-{length}-{seed}")
        first = asked[0]
        last = sum(len(self._tokenizer.encode(text)) for text in (draft.asks[0].question, draft.asks[0].answer))
        written = OnlyLabel(
            len(made.tokens) - last,
            tuple(self._tokenizer.encode(AFTER + first.question)),
            NEW_TOKENS,
            first.answer,
            PLACES if self.task < 5 else (*GIVERS, *THINGS),
            first.question,
        )
        return replace(made, written=written)

    def _story(self, rng: np.random.Generator) -> tuple[list[str], list[_Asked]]:
        """Facts, and what can be asked about them."""
        if self.task == 4:
            return _relations(rng)
        count = int(rng.integers(FEWEST[self.task], self._facts + 1))
        return _gifts(count, rng) if self.task == 5 else _moves(self.task, count, rng)


def _one(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def _there(rng: np.random.Generator) -> str:
    return _one(("", " there"), rng)


def _moves(task: int, count: int, rng: np.random.Generator) -> tuple[list[str], list[_Asked]]:
    story = Story()
    while len(story.facts) < count:
        person = _one(PERSONS, rng)
        here = story.place.get(person)
        if task > 1 and here is not None and rng.uniform() < 0.5:
            held = [thing for thing, holder in story.holder.items() if holder == person]
            free = [
                thing
                for thing in THINGS
                if story.holder.get(thing) is None and (thing not in story.visits or story.visits[thing][-1][0] == here)
            ]
            if held and rng.uniform() < 0.4:
                story.drop(person, _one(held, rng), _one(DROP, rng), _there(rng))
                continue
            if free:
                story.take(person, _one(free, rng), _one(TAKE, rng), _there(rng))
                continue
        story.go(person, _one([place for place in PLACES if place != here], rng), _one(GO, rng))
    if task == 1:
        return story.facts, [
            _Asked(f"Where is {who}?", f" The most recent location of {who} is", place, story.last_move[who])
            for who, place in story.place.items()
        ]
    asked = []
    for thing, visits in story.visits.items():
        place, fact = visits[-1]
        if task == 2:
            asked.append(_Asked(f"Where is the {thing}?", f" The {thing} is in the", place, fact))
        elif len(visits) > 1:
            question = f"Where was the {thing} before the {place}?"
            asked.append(_Asked(question, f" Before the {place} the {thing} was in the", visits[-2][0], fact))
    return story.facts, asked


def _relations(rng: np.random.Generator) -> tuple[list[str], list[_Asked]]:
    """Two relations with a place in common, and questions about both, in either direction."""
    first, common, last = (PLACES[i] for i in rng.permutation(len(PLACES))[:3])
    ways = [DIRECTIONS[i] for i in rng.permutation(len(DIRECTIONS))[:2]]
    if rng.uniform() < 0.5:
        ways[1] = ways[0]  # one after the other: two relations of one kind
        pairs = [(first, common), (common, last)]
    else:
        pairs = [(first, common), (last, common)]
    relations = [(*pair, way) for pair, way in zip(pairs, ways, strict=True)]
    relations = [relations[i] for i in rng.permutation(2)]
    facts = [f" The {one} is {way} of the {other}." for one, other, way in relations]
    asked = []
    for fact, (one, other, way) in enumerate(relations):
        asked.append(_Asked(f"What is {way} of the {other}?", "", one, fact))
        asked.append(_Asked(f"What is the {one} {way} of?", "", other, fact))
    return facts, asked


def _gifts(count: int, rng: np.random.Generator) -> tuple[list[str], list[_Asked]]:
    """Persons move, take, drop and give things; the last gift is asked for."""
    place = {person: _one(PLACES, rng) for person in GIVERS}
    lies = {thing: _one(PLACES, rng) for thing in THINGS}
    holder: dict[str, str] = {}
    facts: list[str] = []
    gift: tuple[str, str, str, int] | None = None
    while len(facts) < count:
        person = _one(GIVERS, rng)
        held = [thing for thing in THINGS if holder.get(thing) == person]
        free = [thing for thing in THINGS if thing not in holder and lies[thing] == place[person]]
        near = [other for other in GIVERS if other != person and place[other] == place[person]]
        if held and near and rng.uniform() < 0.6:
            thing, other = _one(held, rng), _one(near, rng)
            facts.append(f" {person} {_one(GIVE, rng)} the {thing} to {other}.")
            holder[thing] = other
            gift = person, thing, other, len(facts) - 1
        elif free and rng.uniform() < 0.7:
            thing = _one(free, rng)
            facts.append(f" {person} {_one(TAKE, rng)} the {thing} there.")
            holder[thing] = person
        elif held and rng.uniform() < 0.3:
            thing = _one(held, rng)
            facts.append(f" {person} {_one(DROP, rng)} the {thing}{_there(rng)}.")
            del holder[thing]
            lies[thing] = place[person]
        else:
            place[person] = _one([other for other in PLACES if other != place[person]], rng)
            facts.append(f" {person} {_one(GO, rng)} the {place[person]}.")
    if gift is None:
        return facts, []
    giver, thing, receiver, fact = gift
    return facts, [
        _Asked(f"What did {giver} give to {receiver}?", "", thing, fact),
        _Asked(f"Who gave the {thing} to {receiver}?", "", giver, fact),
        _Asked(f"Who did {giver} give the {thing} to?", "", receiver, fact),
        _Asked(f"Who gave the {thing}?", "", giver, fact),
        _Asked(f"Who received the {thing}?", "", receiver, fact),
    ]


class _Qa1(BabilongGenerator):
    task = 1

    def __init__(self, tokenizer: Encoder, *, facts: int = 10, filler: Filler | None = None) -> None:
        super().__init__(tokenizer, facts, filler)


class _Qa2(BabilongGenerator):
    task = 2

    def __init__(self, tokenizer: Encoder, *, facts: int = 20, filler: Filler | None = None) -> None:
        super().__init__(tokenizer, facts, filler)


class _Qa3(BabilongGenerator):
    task = 3

    def __init__(self, tokenizer: Encoder, *, facts: int = 40, filler: Filler | None = None) -> None:
        super().__init__(tokenizer, facts, filler)


class _Qa4(BabilongGenerator):
    task = 4

    def __init__(self, tokenizer: Encoder, *, filler: Filler | None = None) -> None:
        super().__init__(tokenizer, 2, filler)


class _Qa5(BabilongGenerator):
    task = 5

    def __init__(self, tokenizer: Encoder, *, facts: int = 20, filler: Filler | None = None) -> None:
        super().__init__(tokenizer, facts, filler)


BABILONG = {f"babilong_qa{generator.task}": generator for generator in (_Qa1, _Qa2, _Qa3, _Qa4, _Qa5)}
"""Generators by their names."""
