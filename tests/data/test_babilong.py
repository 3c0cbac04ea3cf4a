"""BABILong's tasks: the prompt, lengths, and answers that a reader of the facts alone derives."""

from __future__ import annotations

import re

import pytest

from data.synthetic import build_generator
from data.synthetic.babilong_prompts import PROMPTS
from data.synthetic.scoring import OnlyLabel
from data.tokenizer.tokenizer import byte_tokenizer

NOISE = [f"Rain fell for {n} days upon the roofs of that town." for n in range(40)]
GO = "(?:moved|went|went back|travelled|journeyed) to"
TAKE, DROP, GIVE = "(?:got|took|grabbed|picked up)", "(?:dropped|discarded|left|put down)", "(?:gave|passed|handed)"


def read_moves(facts):
    """Where everybody is, and the places of every thing in order: read again from the words."""
    place, held, visits = {}, {}, {}
    for fact in facts:
        if found := re.fullmatch(rf"(\w+) {GO} the (\w+)\.", fact):
            person, where = found.groups()
            place[person] = where
            for thing in held.get(person, set()):
                visits[thing].append(where)
        elif found := re.fullmatch(rf"(\w+) {TAKE} the (\w+)(?: there)?\.", fact):
            person, thing = found.groups()
            assert not any(thing in others for others in held.values())
            held.setdefault(person, set()).add(thing)
            here = visits.setdefault(thing, [place[person]])
            assert here[-1] == place[person]
        else:
            person, thing = re.fullmatch(rf"(\w+) {DROP} the (\w+)(?: there)?\.", fact).groups()
            held[person].remove(thing)
    return place, visits


def solve_moves(facts, question):
    place, visits = read_moves(facts)
    if found := re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question):
        thing, last = found.groups()
        assert visits[thing][-1] == last
        return visits[thing][-2]
    if found := re.fullmatch(r"Where is the (\w+)\?", question):
        return visits[found[1]][-1]
    return place[re.fullmatch(r"Where is (\w+)\?", question)[1]]


def solve_relations(facts, question):
    known = [re.fullmatch(r"The (\w+) is (\w+) of the (\w+)\.", fact).groups() for fact in facts]
    if found := re.fullmatch(r"What is (\w+) of the (\w+)\?", question):
        (answer,) = {one for one, way, other in known if (way, other) == found.groups()}
    else:
        one, way = re.fullmatch(r"What is the (\w+) (\w+) of\?", question).groups()
        (answer,) = {other for first, towards, other in known if (first, towards) == (one, way)}
    return answer


def solve_gifts(facts, question):
    gifts = [found.groups() for fact in facts if (found := re.fullmatch(rf"(\w+) {GIVE} the (\w+) to (\w+)\.", fact))]
    forms = [
        (r"What did (?P<giver>\w+) give to (?P<receiver>\w+)\?", 1),
        (r"Who gave the (?P<thing>\w+) to (?P<receiver>\w+)\?", 0),
        (r"Who did (?P<giver>\w+) give the (?P<thing>\w+) to\?", 2),
        (r"Who gave the (?P<thing>\w+)\?", 0),
        (r"Who received the (?P<thing>\w+)\?", 2),
    ]
    found, wanted = next((match, wanted) for form, wanted in forms if (match := re.fullmatch(form, question)))
    asked = found.groupdict()
    fits = [
        gift
        for gift in gifts
        if all(
            asked.get(name, value) == value for name, value in zip(("giver", "thing", "receiver"), gift, strict=True)
        )
    ]
    return fits[-1][wanted]


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("noise") / "noise.txt"
    path.write_text(" ".join(NOISE))
    return str(path)


@pytest.mark.parametrize("task", [1, 2, 3, 4, 5])
def test_a_reader_of_the_facts_finds_the_answer(noise, task):
    tokenizer = byte_tokenizer()
    generator = build_generator(f"babilong_qa{task}", tokenizer, {}, source=noise)
    questions = set()
    for seed in range(60):
        document = generator.document(7000, 0.5, seed)
        assert len(document.tokens) == 7000 and document == generator.document(7000, 0.5, seed)
        text = tokenizer.decode(document.tokens)
        prompt = tokenizer.decode([*document.tokens[: document.written.kept], *document.written.question])
        before, context, question = re.fullmatch(
            r"(.*\n<context>\n)(.*)\n</context>\nQuestion: (.*)", prompt, re.DOTALL
        ).groups()
        assert before == PROMPTS[task].before
        sentences = re.split(r"(?<=\.) ", context.strip())
        facts = [sentence for sentence in sentences if not sentence.startswith("Rain")]
        facts = facts[:-1] if facts and not facts[-1].endswith(".") else facts  # the last sentence may be cut
        solve = solve_relations if task == 4 else solve_gifts if task == 5 else solve_moves
        answer = solve(facts, question)
        assert text.startswith(prompt + "\nAnswer:") and text.endswith(f" {answer}")
        [(start, stop)] = document.answers
        assert tokenizer.decode(document.tokens[start:stop]).strip() == answer
        assert document.written.score(text[len(prompt) :]) == 1
        questions.add(re.sub(r"[A-Z]\w+(?= )|the \w+", "_", question))
    assert len(questions) >= {1: 1, 2: 1, 3: 1, 4: 2, 5: 4}[task]


def test_scores_are_babilongs():
    label = OnlyLabel(0, (), 20, "kitchen", ("kitchen", "garden", "office"), "Where was the apple before the garden?")
    assert label.score("\nAnswer: Before the garden the apple was in the kitchen. The office") == 1
    assert label.score("kitchen or office") == 0
    assert label.score("the garden") == 0
    assert label.score("The Kitchen<example> office") == 1


def test_the_prompt_is_babilongs():
    before = PROMPTS[4].before
    assert before == (
        "I will give you context with the facts about different people, their location and actions, hidden in some "
        "random text and a question. You need to answer the question based only on the information from the facts.\n"
        "<example>\nThe hallway is south of the kitchen. The bedroom is north of the kitchen. What is the kitchen "
        "south of?\nAnswer: bedroom\n</example>\n<example>\nThe garden is west of the bedroom. The bedroom is west of "
        "the kitchen. What is west of the bedroom?\nAnswer: garden\n</example>\n"
        "Your answer should contain only one word - location. Do not write anything else after that.\n<context>\n"
    )
