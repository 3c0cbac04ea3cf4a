"""Synthetic documents: the paper's text to the letter, lengths, depths, and answers that a reader finds to be true."""

from __future__ import annotations

import re
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.prepared.shards import PreparedSet
from data.synthetic import FILLER, PasskeyGenerator, build_generator
from data.synthetic.text_filler import TextFiller
from data.synthetic.vocabulary import CODED_WORDS, NOUNS, coded_word
from data.tokenizer.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from tests.prepared import write_set

TEXT = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there. The grass is green. The sky is blue. The sun is yellow. Here we go. "
    "There and back again. The pass key is {key}. Remember it. {key} is the pass key. The grass is green. The sky is "
    "blue. The sun is yellow. Here we go. There and back again. What is the pass key? The pass key is {key}"
)


@pytest.fixture(scope="module", params=["byte", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return byte_tokenizer() if request.param == "byte" else train_bpe([TEXT * 20], 400)


def test_the_text_is_the_papers() -> None:
    tokenizer = byte_tokenizer()
    document = PasskeyGenerator(tokenizer).document(len(TEXT.format(key="12345")), 0.5, seed=7)
    [(start, stop)] = document.answers
    key = tokenizer.decode(document.tokens[start:stop])
    assert len(key) == 5
    assert key.isdigit()
    assert tokenizer.decode(document.tokens) == TEXT.format(key=key)


@settings(deadline=None, max_examples=60)
@given(length=st.integers(500, 6000), depth=st.floats(0, 1), seed=st.integers(0, 2**62))
def test_length_depth_and_answer(tokenizer: Tokenizer, length: int, depth: float, seed: int) -> None:
    generator = PasskeyGenerator(tokenizer)
    document = generator.document(length, depth, seed)
    text = tokenizer.decode(document.tokens)
    assert len(document.tokens) == length
    [(start, stop)] = document.answers
    assert stop == len(document.tokens)
    key = tokenizer.decode(document.tokens[start:stop])
    assert text.endswith(f"What is the pass key? The pass key is {key}")
    assert text.count(key) == 3
    before, after = text.split(f" The pass key is {key}. Remember it. {key} is the pass key.")
    fillers = text.count(FILLER)
    assert before.count(FILLER) == round(depth * fillers)
    # What whole fillers leave of the length stands behind the needle: the end of one.
    piece, filler, rest = after.partition(FILLER) if FILLER in after else ("", "", after)
    assert FILLER.endswith(piece) and piece != FILLER
    assert (filler + rest).count(FILLER) == fillers - before.count(FILLER)
    assert document == generator.document(length, depth, seed)


def test_joined_parts_are_the_whole_texts_tokens(tokenizer: Tokenizer) -> None:
    document = PasskeyGenerator(tokenizer).document(3000, 0.3, seed=1)
    assert tokenizer.encode(tokenizer.decode(document.tokens)) == document.tokens


def test_questions_stand_everywhere_in_a_segment(tokenizer: Tokenizer) -> None:
    """With whole fillers only, documents of any length would have theirs in a few places (see `SentenceFiller`)."""
    generator, places = PasskeyGenerator(tokenizer), set()
    for length in range(2000, 2064):
        [(start, _)] = generator.document(length, 0.3, seed=1).answers
        places.add(start % 64)
    assert len(places) == 64


def test_keys_differ_between_seeds() -> None:
    tokenizer = byte_tokenizer()
    generator = PasskeyGenerator(tokenizer)
    keys = {tokenizer.decode(generator.document(600, 0.5, seed).tokens[-5:]) for seed in range(200)}
    assert len(keys) > 195
    assert {key[0] for key in keys} == set("0123456789")


def test_what_cannot_be_made_is_refused(tokenizer: Tokenizer) -> None:
    generator = PasskeyGenerator(tokenizer)
    shortest = next(length for length in range(1, 1000) if _fits(generator, length))
    assert len(generator.document(shortest, 0.5, 0).tokens) == shortest
    with pytest.raises(ValueError, match=f"at least {shortest} tokens"):
        generator.document(shortest - 1, 0.5, 0)
    with pytest.raises(ValueError, match="depth"):
        generator.document(1000, 1.5, 0)


def _fits(generator: PasskeyGenerator, length: int) -> bool:
    try:
        generator.document(length, 0.5, 0)
    except ValueError:
        return False
    return True


def test_a_million_tokens_take_no_time(tokenizer: Tokenizer) -> None:
    generator = PasskeyGenerator(tokenizer)
    started = time.perf_counter()
    assert len(generator.document(1 << 20, 0.5, 3).tokens) > (1 << 20) - 200
    assert time.perf_counter() - started < 2.0


# The other tasks


def _generator(name: str, tokenizer: Tokenizer, filler: str | None = None, **options: int):
    return build_generator(name, tokenizer, options, source=filler)


TASK_OPTIONS = [
    ("passkey", {"keys": 4}),
    ("passkey", {"keys": 8, "questions": 3}),
    ("needles", {"keys": 4}),
    ("needles", {"keys": 3, "values": 2, "queries": 2}),
    ("tracking", {"chains": 2, "hops": 3, "questions": 2}),
    ("words", {}),
    ("facts", {"task": 1}),
    ("facts", {"task": 2, "facts": 12, "questions": 2}),
    ("facts", {"task": 3, "facts": 16}),
    ("recall", {"pairs": 12, "questions": 4}),
    ("recall", {"pairs": 12, "questions": 12, "digits": 1}),
]


@pytest.mark.parametrize("task, options", TASK_OPTIONS)
def test_documents_are_a_function_of_their_arguments(tokenizer: Tokenizer, task: str, options: dict) -> None:
    generator = _generator(task, tokenizer, **options)
    for length in (3000, 5000):
        document = generator.document(length, 0.4, seed=11)
        assert length - 200 < len(document.tokens) <= length
        assert document == generator.document(length, 0.4, seed=11)
        assert document.tokens != generator.document(length, 0.4, seed=12).tokens
        assert len(document.answers) == options.get("questions", 1)
        assert document.answers[-1][1] == len(document.tokens)
        text = tokenizer.decode(document.tokens)
        ends = []
        for question, (start, stop) in zip(document.questions, document.answers, strict=False):
            question.check(len(document.tokens))
            first = start - question.answer[0]
            # What stands at the end is the question that probes ask, with its answer.
            assert document.tokens[first:stop] == list(question.tokens)
            assert tokenizer.decode(document.tokens[start:stop]).strip()
            ends.append(first)
        assert all(question.after <= ends[0] for question in document.questions)
        assert "{" not in text and "  " not in text
    with pytest.raises(ValueError, match="at least|too short"):
        generator.document(40, 0.4, seed=11)


def _answer(tokenizer: Tokenizer, question) -> tuple[str, str]:
    start, stop = question.answer
    return tokenizer.decode(question.tokens[:start]).strip(), tokenizer.decode(question.tokens[start:stop]).strip()


def test_named_keys_are_where_and_what_is_asked(tokenizer: Tokenizer) -> None:
    generator = _generator("passkey", tokenizer, keys=4)
    for seed in range(20):
        document = generator.document(6000, 0.3, seed)
        text = tokenizer.decode(document.tokens)
        assert len(document.questions) == 4
        for question in document.questions:
            asked, key = _answer(tokenizer, question)
            word = re.fullmatch(r"What is the pass key of (\w+)\? The pass key of \1 is", asked)[1]
            fact = f" The pass key of {word} is {key}. Remember it. {key} is the pass key of {word}."
            assert text.count(fact) == 1
            assert tokenizer.decode(document.tokens[: question.after]).endswith(fact)
        first, key = _answer(tokenizer, document.questions[0])
        fillers = text.count(FILLER)
        before = tokenizer.decode(document.tokens[: document.questions[0].after]).count(FILLER)
        assert before == round(0.3 * fillers)
        assert text.endswith(f"{first} {key}")


def test_needles_answer_with_all_values_in_order(tokenizer: Tokenizer) -> None:
    document = _generator("needles", tokenizer, keys=4, values=3, queries=2).document(4000, 0.5, 3)
    text = tokenizer.decode(document.tokens)
    context = text[: text.index(" What are all")]
    found = re.findall(r"One of the special magic numbers for (\w+) is: (\d{5})\.", context)
    assert len(found) == 12 and len(set(found)) == 12
    assert len(document.questions) == 2
    for question in document.questions:
        asked, answer = _answer(tokenizer, question)
        words = re.search(r"for (\w+), (\w+) mentioned", asked).groups()
        assert answer.split(", ") == [number for word in words for name, number in found if name == word]
        read = tokenizer.decode(document.tokens[: question.after])
        assert all(number in read for number in answer.split(", "))
    single = tokenizer.decode(_generator("needles", tokenizer, keys=2).document(2000, 0.5, 3).tokens)
    assert " What is the special magic number for " in single


def test_tracking_answers_with_the_chain(tokenizer: Tokenizer) -> None:
    for seed in range(10):
        document = _generator("tracking", tokenizer, chains=3, hops=4).document(4000, 0.0, seed)
        text = tokenizer.decode(document.tokens)
        values: dict[str, str] = {}
        for name, source in re.findall(r"VAR ([A-Z]{3}) = (?:VAR )?(\w+)\.", text):
            values[name] = values.get(source, source)
        assert len(values) == 15
        for question in document.questions:
            asked, answer = _answer(tokenizer, question)
            value = re.search(r"the value (\d{5}) in", asked)[1]
            assert answer.split() == [name for name in values if values[name] == value]


def test_frequent_words_are_the_most_frequent(tokenizer: Tokenizer) -> None:
    for seed in range(5):
        document = _generator("words", tokenizer).document(1500, 0.0, seed)
        (question,) = document.questions
        context = tokenizer.decode(document.tokens[: question.after]).split("coded words.")[1].split()
        counts = Counter(context).most_common(4)
        assert _answer(tokenizer, question)[1].split() == [word for word, _ in counts[:3]]
        assert len({count for _, count in counts}) == 4


def _told(text: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Places of persons, and of things one after the other, as a reader understands the facts."""
    place: dict[str, str] = {}
    holder: dict[str, str] = {}
    visits: dict[str, list[str]] = {}
    persons = "Mary|John|Sandra|Daniel"
    for person, verb, what in re.findall(rf" ({persons}) ([a-z ]+?) the (\w+)\.", text):
        if verb.endswith(" to"):
            place[person] = what
        elif verb in ("put down", "dropped", "left"):
            assert holder.pop(what) == person
        else:
            assert what not in holder
            assert visits.get(what, [place[person]])[-1] == place[person]  # it was there
            holder[what] = person
            visits.setdefault(what, []).append(place[person])
        for thing, who in holder.items():
            if visits[thing][-1] != place[who]:
                visits[thing].append(place[who])
    return place, {thing: [p for i, p in enumerate(v) if i == 0 or p != v[i - 1]] for thing, v in visits.items()}


@pytest.mark.parametrize("task, facts", [(1, 6), (2, 10), (3, 14)])
def test_chains_of_facts_have_true_answers(task: int, facts: int) -> None:
    tokenizer = byte_tokenizer()
    generator = _generator("facts", tokenizer, task=task, facts=facts)
    for seed in range(40):
        document = generator.document(3000, 0.0, seed)
        for question in document.questions:
            asked, answer = _answer(tokenizer, question)
            thing = re.search(r"(?:is|was) (?:the )?(\w+)(?: before the (\w+))?\?", asked)
            # Nothing that follows changes the answer, and what was read suffices.
            for text in (document.tokens, document.tokens[: question.after]):
                place, visits = _told(tokenizer.decode(text))
                if task == 1:
                    assert place[thing[1]] == answer
                elif task == 2:
                    assert visits[thing[1]][-1] == answer
                else:
                    assert visits[thing[1]][-2:] == [answer, thing[2]]


@pytest.mark.parametrize("digits", [1, 2, 5])
def test_recall_pairs_are_many_and_different(tokenizer: Tokenizer, digits: int) -> None:
    document = _generator("recall", tokenizer, pairs=300, questions=5, digits=digits).document(9000, 0.0, 1)
    text = tokenizer.decode(document.tokens)
    pairs = dict(re.findall(rf" (\w{{4}}): ([1-9]\d{{{digits - 1}}})\.", text))
    assert len(pairs) == 300 and len(document.questions) == 300 and len(document.answers) == 5
    for question in document.questions:
        asked, answer = _answer(tokenizer, question)
        assert pairs[re.fullmatch(r"What is the number of (\w+)\? \1:", asked)[1]] == answer
        assert f": {answer}." in tokenizer.decode(document.tokens[question.after - 8 : question.after])


def test_real_text_as_filler(tmp_path) -> None:
    tokenizer = byte_tokenizer()
    source = PreparedSet(write_set(tmp_path / "set", [400, 900, 300]))
    whole = np.concatenate([source.read(i, 0, int(source.lengths[i]) - 1) for i in range(3)]).tolist()
    twice = whole + whole
    filler = TextFiller(source)
    starts = set()
    for seed in range(30):
        tokens = filler.tokens(2000, seed, last_fact=500)
        assert len(tokens) == 2000
        start = next(i for i in range(len(whole)) if twice[i : i + 50] == tokens[:50])
        assert tokens == (whole * 3)[start : start + 2000]
        starts.add(start)
    assert len(starts) > 20
    generator = _generator("passkey", tokenizer, filler=str(tmp_path / "set"), keys=2)
    document = generator.document(1500, 0.25, 3)
    assert len(document.tokens) == 1500
    assert "grass" not in tokenizer.decode(document.tokens)
    other = train_bpe([TEXT], 300)
    with pytest.raises(ValueError, match="another tokenizer"):
        _generator("passkey", other, filler=str(tmp_path / "set"))


def test_coded_words_are_all_different() -> None:
    assert len({coded_word(i) for i in range(CODED_WORDS)}) == CODED_WORDS
    assert len(set(NOUNS)) == len(NOUNS) > 100


@pytest.mark.parametrize(
    "task, options, message",
    [
        ("passkey", {"keys": 1000}, "keys = 1000"),
        ("passkey", {"keys": 2, "questions": 3}, "not be more than the keys"),
        ("needles", {"keys": 2, "queries": 3}, "not be more than the keys"),
        ("tracking", {"questions": 2}, "not be more than the chains"),
        ("facts", {"task": 4}, "must be one of 1, 2, 3"),
        ("facts", {"task": 3, "facts": 4, "questions": 2}, "task 3 has at most"),
        ("recall", {"pairs": 4, "questions": 5}, "not be more than the pairs"),
        ("recall", {"digits": 19}, "must be between 1 and 18"),
    ],
)
def test_options_that_do_not_fit_are_refused(task: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _generator(task, byte_tokenizer(), **options)
