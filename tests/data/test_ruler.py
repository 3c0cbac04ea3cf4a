"""RULER's tasks: the template to the letter, lengths, and answers that a reader finds in the text alone."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from data.synthetic import TASKS, Spec, build_generator
from data.synthetic.essay_filler import EssayFiller
from data.synthetic.ruler_niah import FORMS
from data.synthetic.scoring import MatchAll, MatchPart
from data.tokenizer.tokenizer import Tokenizer, byte_tokenizer, train_bpe

SENTENCES = [
    f"Chapter {n} tells of the {w}." for n, w in enumerate(["mill", "fox", "rope", "moon", "barn", "well"] * 5)
]
LINE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@pytest.fixture(scope="module", params=["byte", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return byte_tokenizer() if request.param == "byte" else train_bpe([" ".join(SENTENCES) + LINE * 5], 400)


@pytest.fixture(scope="module")
def essays(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("essays") / "essays.txt"
    path.write_text("\n\n".join(SENTENCES))
    return str(path)


def made(task: str, tokenizer: Tokenizer, essays: str, length: int, seed: int, depth: float = 0.4):
    filler = essays if hasattr(TASKS[task], "needs_filler") else None
    generator = build_generator(task, tokenizer, {}, source=filler)
    document = generator.document(length, depth, seed)
    assert document == generator.document(length, depth, seed)
    prompt = tokenizer.decode([*document.tokens[: document.written.kept], *document.written.question])
    text = tokenizer.decode(document.tokens)
    assert text.startswith(prompt)
    [(start, stop)] = document.answers
    assert stop == len(document.tokens) <= length
    assert text.endswith(tokenizer.decode(document.tokens[start:stop]))
    return document, prompt, text[len(prompt) :]


@pytest.mark.parametrize("task", FORMS)
@pytest.mark.parametrize("seed", [1, 2])
def test_needles(tokenizer, essays, task, seed):
    form = FORMS[task]
    document, prompt, answer = made(task, tokenizer, essays, 4000, seed)
    several = form.values * form.queries > 1
    kind = form.value if several else form.value[:-1]
    some, are, all_of = ("Some", "are", "are all") if several else ("A", "is", "is")
    found = re.fullmatch(
        rf"{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. I will quiz "
        rf"you about the {kind} afterwards.\n(?P<context>.*)\nWhat {all_of} the special magic {kind} for (?P<asked>.*) "
        rf"mentioned in the provided text\? The special magic {kind} for (?P=asked) mentioned in the provided text "
        rf"{are}",
        prompt,
        re.DOTALL,
    )
    needles = re.findall(rf"One of the special magic {form.value} for (\S+) is: (\S+)\.", found["context"])
    asked = re.split(r", (?:and )?", found["asked"])
    assert len(asked) == form.queries
    values = [value for key in asked for name, value in needles if name == key]
    assert sorted(answer.strip().split(", ")) == sorted(values) == sorted(document.written.references)
    assert len(values) == form.queries * form.values
    assert all(re.fullmatch(r"[1-9]\d{6}" if form.value == "numbers" else r"[0-9a-f-]{36}", value) for value in values)
    if form.haystack == "needle":
        assert len(needles) > 20 and len(document.tokens) > 3800
        assert not re.sub(r"One of the special magic \w+ for \S+ is: \S+\.\n?", "", found["context"])
        place = [name for name, _ in needles].index(asked[0])
        assert place == round(0.4 * (len(needles) - 1))
    else:
        assert len(needles) == form.keys * form.values and len(document.tokens) == 4000
        rest = re.sub(
            rf"{' ' if form.haystack == 'essay' else ''}One of the special magic .*?: \S+\.\n?", "", found["context"]
        )
        pieces = set(rest.split("\n") if form.haystack == "repeat" else re.split(r"(?<=\.) ", rest.strip()))
        known = {LINE} if form.haystack == "repeat" else set(SENTENCES)
        assert len(pieces - known) <= 1  # what whole ones leave of the length


def test_the_depth_is_the_needles(essays):
    """Between whole sentences, at the share of them that is asked for."""
    tokenizer = byte_tokenizer()
    for depth in (0.0, 0.25, 0.8, 1.0):
        _, prompt, _ = made("niah_single_2", tokenizer, essays, 3000, 3, depth)
        before, _, after = prompt.partition("\n")[2].partition(" One of the special magic")
        sentences = [text.count("Chapter ") for text in (before, after.rpartition("\nWhat")[0])]
        assert before.endswith(".") or not before
        assert abs(sentences[0] - depth * sum(sentences)) <= 1.5


def test_variable_tracking(tokenizer, essays):
    document, prompt, answer = made("vt", tokenizer, essays, 4000, 5)
    assert len(document.tokens) == 4000
    example, text = prompt.split("\n\n\n\n")
    for part, letters in ((example, 3), (text, 5)):
        assert part.startswith(
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        )
        value = re.search(
            r"\nQuestion: Find all variables that are assigned the value (\d+) in the text above\.", part
        )[1]
        known = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", part))

        def root(name, known=known):
            return root(known[name]) if name in known else name

        names = [name for name in known if root(name) == value]
        ending = (
            f" Answer: According to the chain(s) of variable assignment in the text above, {len(names)} variables are "
            f"assgined the value {value}, they are:"
        )
        assert len(names) == 5 and all(len(name) == letters for name in names)
        assert (part if part is text else part[: part.rindex(":") + 1]).endswith(ending)
        given = answer if part is text else part[part.rindex(":") + 1 :]
        assert given.split() == names
    assert LINE in text


def test_common_words(essays):
    tokenizer = byte_tokenizer()
    for length, counts in ((4000, {6, 1}), (9000, {30, 3})):
        document, prompt, answer = made("cwe", tokenizer, essays, length, 7)
        assert len(document.tokens) > length - 100
        lists = re.findall(
            r"often\.\n(1\. .*)\nQuestion: What are the 10 most common words in the above list\? "
            r"Answer: The top 10 words that appear most often in the list are:",
            prompt,
        )
        assert len(lists) == 2
        items = re.findall(r"(\d+)\. (\S+)", lists[1])
        assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
        times = Counter(word for _, word in items)
        assert set(times.values()) == counts
        common = {word for word, count in times.items() if count == max(counts)}
        assert common == set(re.findall(r"\d+\. (\S+)", answer)) == set(document.written.references)


def test_frequent_words(tokenizer, essays):
    document, prompt, answer = made("fwe", tokenizer, essays, 4000, 9)
    assert len(document.tokens) > 3900
    body = re.fullmatch(
        r"Read the following coded text and track the frequency of each coded word\. Find the three most frequently "
        r"appeared coded words\. (.*)\nQuestion: Do not provide any explanation\. Please ignore the dots '\.\.\.\.'\. "
        r"What are the three most frequently appeared words in the above coded text\? Answer: According to the coded "
        r"text above, the three most frequently appeared words are:",
        prompt,
    )[1]
    (dots, most), *others = Counter(body.split()).most_common(5)
    assert dots == "..." and answer.split() == [word for word, _ in others[:3]]
    assert others[0][1] == pytest.approx(most / 4, rel=0.1)
    assert others[2][1] > others[3][1]


INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
PLACES = {"Mill": ["in Hull", "near York"], "Fox": ["on a roof"], "Moon": ["in a well", "over Kent", "by a barn"]}


def questions_file(folder: Path, task: str) -> str:
    """Texts of several lengths, a line break and a letter of three bytes in some; ten are nobody's."""
    if task == "qa_1":
        articles = []
        for name, places in PLACES.items():
            paragraphs = []
            for n, place in enumerate(places):
                text = f"{name} {n} stood {place}.\nThe year was 19{n}0 \u2013 {'or later ' * n}"
                answers = [{"text": place}, {"text": place[3:]}, {"text": place}]
                right = {"question": f"Where did {name} {n} stand?", "answers": answers}
                none = {"question": "Who?", "answers": [], "is_impossible": True}
                paragraphs.append({"context": text, "qas": [right, none]})
            articles.append({"title": name, "paragraphs": paragraphs})
        articles += [{"paragraphs": [{"context": f"Nothing {n} of it.", "qas": []} for n in range(10)]}]
        content = {"version": "v2.0", "data": articles}
    else:
        nobody = [[f"Rest {n}", ["Nothing", f" {n}."]] for n in range(10)]
        content = [
            {
                "_id": name,
                "question": f"Where is {name}?",
                "answer": places[0],
                "context": [[name, [f"{name} is there.", f" It is {place}."]] for place in places] + [nobody[i]],
            }
            for i, (name, places) in enumerate(PLACES.items())
        ] + [{"question": "Is it?", "answer": "yes", "context": nobody[3:]}]
    path = folder / f"{task}.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_questions_about_documents(tokenizer, tmp_path, task):
    """Every document of the file at most once, the question's own always; others of its article first."""
    path = questions_file(tmp_path, task)
    content = json.loads(Path(path).read_text())
    asked = {}  # question: references, own texts, texts of the same article
    if task == "qa_1":
        for article in content["data"]:
            texts = {paragraph["context"] for paragraph in article["paragraphs"]}
            for paragraph in article["paragraphs"]:
                for one in paragraph["qas"]:
                    if one["answers"]:
                        references = {answer["text"] for answer in one["answers"]}
                        asked[one["question"]] = references, {paragraph["context"]}, texts
        known = {paragraph["context"] for article in content["data"] for paragraph in article["paragraphs"]}
    else:
        for one in content:
            texts = {title + "\n" + "".join(sentences) for title, sentences in one["context"]}
            asked[one["question"]] = {one["answer"]}, texts, texts
        known = {text for _, texts, _ in asked.values() for text in texts}
    generator = build_generator(task, tokenizer, {}, source=path)
    seen, orders = Counter(), set()
    for seed in range(30):
        length = (700, 900, 5000)[seed % 3]
        document = generator.document(length, 0.5, seed)
        assert document == generator.document(length, 0.5, seed) and len(document.tokens) <= length
        prompt = tokenizer.decode([*document.tokens[: document.written.kept], *document.written.question])
        found = re.fullmatch(
            rf"{INSTRUCTION}\n\nThe following are given documents\.\n\n(?P<context>.*)\n\n{INSTRUCTION}\n\n"
            r"Question: (?P<question>[^\n]*) Answer:",
            prompt,
            re.DOTALL,
        )
        pieces = re.split(r"(?:^|\n\n)Document (\d+):\n", found["context"])[1:]
        texts = pieces[1::2]
        assert [int(number) for number in pieces[::2]] == list(range(1, len(texts) + 1))
        references, own, near = asked[found["question"]]
        assert len(set(texts)) == len(texts) and own <= set(texts) <= known
        assert set(texts) <= near or near <= set(texts)
        assert set(document.written.references) == references and document.written.new_tokens == 32
        [(start, stop)] = document.answers
        assert stop == len(document.tokens)
        assert tokenizer.decode(document.tokens[start:stop]).strip() in references
        [probe] = document.questions
        before = tokenizer.decode(document.tokens[: probe.after])
        assert all(text in before for text in own) and any(before.endswith(text) for text in own)
        seen[found["question"]] += 1
        orders.add(tuple(texts))
        if length == 5000:
            assert set(texts) == known
    assert set(seen) == set(asked) and len(orders) == 30


def test_a_file_of_questions_must_be_one(tmp_path):
    squad = questions_file(tmp_path, "qa_1")
    with pytest.raises(ValueError, match=r"qa_1\.json: Expected `?array"):
        build_generator("qa_2", byte_tokenizer(), {}, source=squad)
    with pytest.raises(ValueError, match="questions: there is no file qa.json"):
        build_generator("qa_2", byte_tokenizer(), {}, source="qa.json")
    with pytest.raises(ValueError, match="questions is missing: qa_2 needs a JSON file of HotpotQA's"):
        Spec.parse("qa_2:5,length=4K")
    with pytest.raises(ValueError, match="unknown option 'filler'"):
        Spec.parse("qa_1:5,length=4K,filler=text")
    with pytest.raises(ValueError, match=r"a qa_1 document has at least \d+ tokens with this tokenizer, not 100"):
        build_generator("qa_1", byte_tokenizer(), {}, source=squad).document(100, 0.5, 1)


def test_scores_are_the_papers():
    match = MatchAll(0, (), 128, ("1234567", "Fox"))
    assert match.score(" 1234567, and the FOX.") == 1
    assert match.score("\x07fox") == 0.5
    assert match.score("7654321") == 0
    part = MatchPart(0, (), 32, ("in Hull", "York"))
    assert part.score("It was near YORK") == part.score("York, not in hull") == 1
    assert part.score("Hull") == 0


def test_a_text_begins_anywhere_and_comes_again():
    text = "One two. Three four! 'Five six?' Seven."
    filler = EssayFiller(lambda piece: list(piece.encode()), text)
    whole = " " + text
    starts = set()
    for seed in range(20):
        found = bytes(filler.tokens(3 * len(whole), seed, 0)).decode()
        assert found in whole * 5
        starts.add(found[:4])
        for depth in (0, 0.5, 1):
            place = filler.place(depth, 100, seed)
            assert 0 <= place <= 100 and (place == 0 or found[place] == " " and found[place - 1] in ".!'")
    assert len(starts) == 4


def test_essays_must_be_given():
    with pytest.raises(ValueError, match="niah_single_2 needs essays"):
        Spec.parse("niah_single_2:5,length=4K")
