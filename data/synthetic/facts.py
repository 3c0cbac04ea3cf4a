"""Chains of facts hidden in text, in the manner of bAbI's tasks 1 to 3 and BABILong (arXiv 2406.10149).

    qa1     " Mary went to the kitchen." ...
            " Question: Where is Mary? Answer:"                            " kitchen"
    qa2     also " Mary picked up the apple." and " Mary put down the apple."
            " Question: Where is the apple? Answer:"                       its holder's place, or where it was put down
    qa3     the same facts
            " Question: Where was the apple before the kitchen? Answer:"   where it was before its last change of place

with the introduction 'I will tell you facts that are hidden in text. Remember who is where and what they carry.' The
facts stand in the order in which they happen. Verbs of going and taking vary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from data.synthetic.base import Ask, Draft, Encoder, Filler, FillerTask, SyntheticDocument

INTRODUCTION = "I will tell you facts that are hidden in text. Remember who is where and what they carry."
PERSONS = ("Mary", "John", "Sandra", "Daniel")
PLACES = ("kitchen", "bathroom", "bedroom", "garden", "hallway", "office")
THINGS = ("apple", "football", "milk")
GO = ("went to", "moved to", "travelled to", "walked to")
TAKE = ("picked up", "took", "grabbed")
DROP = ("put down", "dropped", "left")
TASKS = (1, 2, 3)
ATTEMPTS = 100
"""Stories that are drawn before one with enough questions must have come."""


@dataclass
class Story:
    """What has happened so far."""

    facts: list[str] = field(default_factory=list)
    place: dict[str, str] = field(default_factory=dict)
    """Of persons."""
    holder: dict[str, str | None] = field(default_factory=dict)
    """Of things that were taken at least once."""
    visits: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    """Places of a thing in order, each with the fact that brought it there."""
    last_move: dict[str, int] = field(default_factory=dict)

    def go(self, person: str, place: str, verb: str) -> None:
        self.facts.append(f" {person} {verb} the {place}.")
        self.place[person] = place
        self.last_move[person] = len(self.facts) - 1
        for thing, holder in self.holder.items():
            if holder == person:
                self.visits[thing].append((place, len(self.facts) - 1))

    def take(self, person: str, thing: str, verb: str, where: str = "") -> None:
        self.facts.append(f" {person} {verb} the {thing}{where}.")
        if thing not in self.visits:  # from now on it is known where the thing is
            self.visits[thing] = [(self.place[person], len(self.facts) - 1)]
        self.holder[thing] = person

    def drop(self, person: str, thing: str, verb: str, where: str = "") -> None:
        self.facts.append(f" {person} {verb} the {thing}{where}.")
        self.holder[thing] = None


class FactsGenerator(FillerTask):
    """Makes documents of task `task` (1, 2 or 3) with `facts` facts.

    Args:
        questions: asked at the end of a document, each about another person or thing.
    """

    has_depth = False

    def __init__(
        self,
        tokenizer: Encoder,
        *,
        task: int = 1,
        facts: int = 8,
        questions: int = 1,
        filler: Filler | None = None,
    ) -> None:
        if task not in TASKS:
            raise ValueError(f"task = {task}: must be one of {', '.join(map(str, TASKS))}")
        most = len(PERSONS) if task == 1 else len(THINGS)
        if questions > min(most, facts // task):
            raise ValueError(
                f"questions = {questions}: task {task} has at most {most}, one for every {task} of the {facts} facts"
            )
        super().__init__(tokenizer, questions, filler)
        self._task, self._facts = task, facts

    def document(self, length: int, depth: float, seed: int) -> SyntheticDocument:
        """See `base.Generator`; `depth` is not used, the facts stand anywhere."""
        rng = np.random.default_rng(seed)
        for _ in range(ATTEMPTS):
            story = self._tell(rng)
            asks = self._asks(story)
            if len(asks) >= self._questions:
                break
        else:
            raise ValueError(f"{self._facts} facts are too few for {self._questions} questions of task {self._task}")
        asks = [asks[i] for i in rng.permutation(len(asks))]
        draft = Draft(INTRODUCTION, story.facts, sorted(rng.uniform(size=len(story.facts))), asks)
        return self.assemble(draft, length=length, seed=seed, key=f"facts-{self._task}-{length}-{seed}")

    def _tell(self, rng: np.random.Generator) -> Story:
        story = Story()

        def one(choices) -> str:
            return choices[int(rng.integers(len(choices)))]

        while len(story.facts) < self._facts:
            person = one(PERSONS)
            if self._task > 1 and person in story.place and rng.uniform() < 0.5:
                here = story.place[person]
                held = [thing for thing, holder in story.holder.items() if holder == person]
                free = [
                    thing
                    for thing in THINGS
                    if story.holder.get(thing) is None and story.visits.get(thing, [(here, 0)])[-1][0] == here
                ]
                if free and (not held or rng.uniform() < 0.7):
                    story.take(person, one(free), one(TAKE))
                    continue
                if held:
                    story.drop(person, one(held), one(DROP))
                    continue
            story.go(person, one([place for place in PLACES if place != story.place.get(person)]), one(GO))
        return story

    def _asks(self, story: Story) -> list[Ask]:
        if self._task == 1:
            return [
                Ask(f" Question: Where is {person}? Answer:", f" {place}", story.last_move[person])
                for person, place in story.place.items()
            ]
        asks = []
        for thing, visits in story.visits.items():
            place, fact = visits[-1]
            if self._task == 2:
                asks.append(Ask(f" Question: Where is the {thing}? Answer:", f" {place}", fact))
            elif len(visits) > 1:
                before = visits[-2][0]
                asks.append(Ask(f" Question: Where was the {thing} before the {place}? Answer:", f" {before}", fact))
        return asks
