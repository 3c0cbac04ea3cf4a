"""Tokenizers: round trips, stable training, and end tokens that no text can forge."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from data.tokenizer.tokenizer import EOS_TOKEN, Tokenizer, byte_tokenizer, load_tokenizer, split_text, train_bpe

SOURCE_CODE = Path(argparse.__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([SOURCE_CODE[:60_000]], 512)


@settings(deadline=None, max_examples=50)
@given(text=st.text())
def test_every_text_survives_a_round_trip(bpe: Tokenizer, text: str) -> None:
    for tokenizer in (bpe, byte_tokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode([*ids, tokenizer.eos_id]) == text
        assert tokenizer.eos_id not in ids


def test_a_quoted_end_token_is_text(bpe: Tokenizer) -> None:
    ids = bpe.encode(f"a {EOS_TOKEN} b")
    assert bpe.eos_id not in ids
    assert bpe.decode(ids) == f"a {EOS_TOKEN} b"


def test_digits_are_tokens_of_their_own(bpe: Tokenizer) -> None:
    assert [bpe.decode([token]) for token in bpe.encode("1990")] == ["1", "9", "9", "0"]


def test_training_is_reproducible_and_compresses(bpe: Tokenizer) -> None:
    again = train_bpe([SOURCE_CODE[:60_000]], 512)
    assert again.hash == bpe.hash
    assert train_bpe([SOURCE_CODE[:50_000]], 512).hash != bpe.hash
    assert bpe.vocab_size == 512
    assert len(bpe.encode(SOURCE_CODE)) < 0.6 * len(SOURCE_CODE)


def test_a_long_text_is_encoded_as_if_whole(bpe: Tokenizer) -> None:
    text = SOURCE_CODE * 3
    assert len(list(split_text(text))) > 2
    assert "".join(split_text(text)) == text
    assert bpe.encode(text) == bpe._encode_piece(text)
    assert max(map(len, split_text(text, 1000))) < 1500


@settings(deadline=None, max_examples=200)
@given(
    words=st.lists(
        st.sampled_from(
            [" ", "    ", "\n", "\n       ", "a", "Wort", "é", "中", "7", "²", "½", "_", "(", "'s", ".", "\r"]
        )
    )
)
def test_pieces_encode_apart_wherever_they_are_cut(bpe: Tokenizer, words: list[str]) -> None:
    text = "".join(words)
    pieces = list(split_text(text, 1))
    assert "".join(pieces) == text
    assert [token for piece in pieces for token in bpe._encode_piece(piece)] == bpe._encode_piece(text)


def test_a_tokenizer_that_prefixes_a_space_is_not_cut() -> None:
    backend = Backend(models.BPE(vocab={"▁": 0, "a": 1, "</s>": 2, "\n": 3}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer("hf", 2, backend.to_str().encode())
    text = "a\n" * 50_000
    assert len(list(split_text(text))) > 1
    assert tokenizer.encode(text) == tokenizer._encode_piece(text)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_saved_and_pickled_it_is_the_same(bpe: Tokenizer, kind: str, tmp_path: Path) -> None:
    tokenizer = bpe if kind == "bpe" else byte_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    for copy in (
        load_tokenizer(tmp_path),
        load_tokenizer(tmp_path / "tokenizer"),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert (copy.kind, copy.hash, copy.info) == (kind, tokenizer.hash, tokenizer.info)
        assert copy.encode("def f(x): return 12") == tokenizer.encode("def f(x): return 12")


@pytest.mark.parametrize("declared", ["<stop>", {"content": "<stop>"}])
def test_a_hugging_face_folder_names_its_end_token(bpe: Tokenizer, declared: object, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    (tmp_path / "info.json").unlink()
    assert load_tokenizer(tmp_path).eos_id == bpe.eos_id  # a well-known name
    assert load_tokenizer(tmp_path).hash == bpe.hash
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    definition["added_tokens"].append({**definition["added_tokens"][0], "id": 600, "content": "<stop>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": declared}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.kind == "hf"
    assert tokenizer.decode([tokenizer.eos_id]) == ""
    assert tokenizer.eos_id == tokenizer.vocab_size - 1
    assert tokenizer.hash != bpe.hash


def test_what_cannot_be_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_tokenizer(tmp_path)
    backend = Backend(models.BPE(vocab={"a": 0}, merges=[]))
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    with pytest.raises(ValueError, match="no end token"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<gone>"}')
    with pytest.raises(ValueError, match="<gone>"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="257"):
        train_bpe(["text"], 100)


@pytest.mark.parametrize("block", [1, 1000, 70_000, 10**7])
def test_a_text_in_blocks_is_encoded_as_if_whole(bpe: Tokenizer, block: int) -> None:
    text = ("def gamma(n):\n    return 'delta' + 1234\n\n" * 4000)[: block * 3000]
    blocks = [text[start : start + block] for start in range(0, len(text), block)]
    for tokenizer in (bpe, byte_tokenizer()):
        arrays = list(tokenizer.encode_stream(blocks))
        assert np.concatenate(arrays).tolist() == tokenizer.encode(text)
        if block == 70_000:
            assert len(arrays) > 1
