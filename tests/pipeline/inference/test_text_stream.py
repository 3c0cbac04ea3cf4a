"""Text of tokens that come one by one: characters are never cut, stop strings are found wherever they lie."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizer.tokenizer import byte_tokenizer, train_bpe
from pipeline.inference.text_stream import TextStream

TEXT = "Grüße an alle: 10 € für 漢字 und 🙂🙂, naïve\n"


def tokenizers():
    return [byte_tokenizer(), train_bpe([TEXT * 3, "the pass key is 9054."], 300)]


def stream(tokenizer, ids, stop=()):
    """(pieces, stream) for tokens fed until a stop string or the end."""
    found, pieces = TextStream(tokenizer, stop), []
    for token in ids:
        pieces.append(found.push(token))
        if found.stopped:
            break
    pieces.append(found.finish())
    assert "".join(pieces) == found.text
    return pieces, found


@pytest.mark.parametrize("tokenizer", tokenizers(), ids=["byte", "bpe"])
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer):
    pieces, _ = stream(tokenizer, tokenizer.encode(TEXT))
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 10  # they come as they are made


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 256), max_size=30))
def test_any_bytes_give_what_decoding_them_together_gives(ids):
    tokenizer = byte_tokenizer()
    assert stream(tokenizer, ids)[1].text == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=30))
def test_any_tokens_give_what_decoding_them_together_gives(noise):
    tokenizer = BPE
    ids = [b % tokenizer.vocab_size for b in noise]
    assert stream(tokenizer, ids)[1].text == tokenizer.decode(ids)


BPE = tokenizers()[1]


@pytest.mark.parametrize("tokenizer", tokenizers(), ids=["byte", "bpe"])
@pytest.mark.parametrize("stop", [["€"], ["10 €"], ["字 und 🙂", "zzz"], ["漢", "für"], ["G"]])
def test_a_stop_string_ends_the_text_before_it(tokenizer, stop):
    pieces, found = stream(tokenizer, tokenizer.encode(TEXT), stop)
    assert found.stopped
    assert found.text == TEXT[: min(TEXT.find(s) for s in stop if s in TEXT)]


@pytest.mark.parametrize("tokenizer", tokenizers(), ids=["byte", "bpe"])
def test_what_only_begins_like_a_stop_string_is_text(tokenizer):
    _, found = stream(tokenizer, tokenizer.encode("the pass key is the pass"), ["the pass key was", "pass!"])
    assert not found.stopped and found.text == "the pass key is the pass"


def test_nothing_that_may_begin_a_stop_string_is_shown_early():
    tokenizer = byte_tokenizer()
    found, shown = TextStream(tokenizer, ["\n\nQ"]), ""
    for token in tokenizer.encode("A\n\nB\n\nQ"):
        shown += found.push(token)
        assert not shown.endswith("\n\n")
    assert found.stopped and shown == "A\n\nB"
