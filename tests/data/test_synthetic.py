"""The passkey document: the paper's text to the letter, its length, depth and answer."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.synthetic import FILLER, PasskeyGenerator
from data.tokenizer import Tokenizer, byte_tokenizer, train_bpe

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
    assert length - len(tokenizer.encode(FILLER)) < len(document.tokens) <= length
    [(start, stop)] = document.answers
    assert stop == len(document.tokens)
    key = tokenizer.decode(document.tokens[start:stop])
    assert text.endswith(f"What is the pass key? The pass key is {key}")
    assert text.count(key) == 3
    before, after = text.split(f" The pass key is {key}. Remember it. {key} is the pass key.")
    fillers = text.count(FILLER)
    assert before.count(FILLER) == round(depth * fillers)
    assert after.count(FILLER) == fillers - before.count(FILLER)
    assert document == generator.document(length, depth, seed)


def test_joined_parts_are_the_whole_texts_tokens(tokenizer: Tokenizer) -> None:
    document = PasskeyGenerator(tokenizer).document(3000, 0.3, seed=1)
    assert tokenizer.encode(tokenizer.decode(document.tokens)) == document.tokens


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
