"""Tokenizers of somebody else's: what they begin and end a text with, and what a damaged or hostile one does."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from data.tokenizer.special_tokens import end_token
from data.tokenizer.tokenizer import Tokenizer, load_tokenizer, tokenizer_of_files, train_bpe

TEXT = "the cat sat on the mat and looked at the hat, "


@pytest.fixture(scope="module")
def definition() -> dict[str, Any]:
    """Of a tokenizer with 280 tokens, <|endoftext|> first, and two more special ones: 280 and 281."""
    backend = Backend.from_str(train_bpe([TEXT * 9], 280)._definition.decode())
    backend.add_special_tokens(["<|bos|>", "<|eot|>"])
    return json.loads(backend.to_str())


def write(folder: Path, definition: dict[str, Any], **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def with_template(definition: dict[str, Any], template: str) -> dict[str, Any]:
    backend = Backend.from_str(json.dumps(definition))
    special = [(token, backend.token_to_id(token)) for token in ("<|bos|>", "<|eot|>", "<|endoftext|>")]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return json.loads(backend.to_str())


@pytest.mark.parametrize(
    ("template", "begin_ids"),
    [
        (None, ()),
        ("$A", ()),
        ("<|bos|> $A", (280,)),
        ("<|bos|> <|eot|> $A", (280, 281)),
        ("<|bos|> $A <|endoftext|>", (280,)),  # the end token is what we write, too
    ],
)
def test_the_post_processor_says_how_a_document_begins(
    definition: dict[str, Any], template: str | None, begin_ids: tuple[int, ...], tmp_path: Path
) -> None:
    own = with_template(definition, template) if template else definition
    # add_bos_token has no say beside a tokenizer.json, as in transformers
    folder = write(tmp_path / "t", own, tokenizer_config={"eos_token": "<|endoftext|>", "add_bos_token": not begin_ids})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.begin_ids == begin_ids
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ended = [] if template and template.endswith("<|endoftext|>") else [theirs.eos_token_id]
    assert [*begin_ids, *tokenizer.encode(TEXT), tokenizer.eos_id] == theirs(TEXT).input_ids + ended
    assert tokenizer.decode([*begin_ids, *tokenizer.encode(TEXT), tokenizer.eos_id]) == TEXT
    tokenizer.save(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert (saved.begin_ids, saved.hash) == (begin_ids, tokenizer.hash)
    assert (tokenizer.hash == tokenizer.without_begin().hash) == (not begin_ids)
    assert saved.without_begin().begin_ids == ()


@pytest.mark.parametrize("template", ["$A <|eot|>", "<|bos|> $A <|eot|>", "$A <|endoftext|> <|endoftext|>"])
def test_what_comes_behind_a_text_is_the_end_token_or_refused(
    definition: dict[str, Any], template: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "t", with_template(definition, template))
    with pytest.raises(ValueError, match=rf"the tokenizer in {folder} makes .* post_processor"):
        load_tokenizer(folder)


def test_the_hash_of_a_tokenizer_without_begin_tokens_is_the_old_one(definition: dict[str, Any]) -> None:
    import hashlib

    contents = json.dumps(definition).encode()
    tokenizer = Tokenizer("hf", 0, contents)
    assert tokenizer.hash == hashlib.sha256(json.dumps([282, 0]).encode() + contents).hexdigest()


EOT, ENDOFTEXT = {"content": "<|eot|>"}, "<|endoftext|>"
OWN: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
NEW = OWN | {"added_tokens_decoder": {"281": {"content": "<|eot|>", "special": True}}}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config": OWN | {"eos_token": "<|eot|>"}}, 281),
        ({"tokenizer_config": OWN | {"eos_token": ENDOFTEXT}, "special_tokens_map": {"eos_token": "<|eot|>"}}, 281),
        ({"tokenizer_config": OWN | {"eos_token": ENDOFTEXT}, "special_tokens_map": {"eos_token": EOT}}, 281),
        ({"tokenizer_config": NEW | {"eos_token": ENDOFTEXT}, "special_tokens_map": {"eos_token": "<|eot|>"}}, 0),
        ({"tokenizer_config": OWN, "special_tokens_map": {"eos_token": "<|eot|>"}, "config": {"eos_token_id": 0}}, 281),
    ],
)
def test_the_end_token_is_the_one_of_transformers(
    definition: dict[str, Any], files: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    folder = write(tmp_path / "t", definition, **files)
    assert load_tokenizer(folder).eos_id == expected
    if "config" not in files:
        assert transformers.AutoTokenizer.from_pretrained(folder).eos_token_id == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config": {}, "config": {"eos_token_id": 281}}, 281),
        ({"config": {"eos_token_id": [281, 0]}, "generation_config": {"eos_token_id": 0}}, 0),
        ({"config": {"eos_token_id": None}, "generation_config": {"eos_token_id": [281]}}, 281),
        ({}, 0),
    ],
)
def test_where_the_tokenizer_names_no_end_token_the_model_does(
    definition: dict[str, Any], files: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    assert load_tokenizer(write(tmp_path / "t", definition, **files)).eos_id == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"eos_token": "<gone>"}}, r"tokenizer_config\.json: the end token '<gone>' is no token"),
        ({"tokenizer_config": {"eos_token": 3}}, r"tokenizer_config\.json: the end token 3 is no token"),
        ({"tokenizer_config": {"eos_token": {"content": ["x"]}}}, r"tokenizer_config\.json: the end token \['x'\]"),
        ({"tokenizer_config": []}, r"tokenizer_config\.json: Expected object"),
        ({"special_tokens_map": {"eos_token": "<gone>"}}, r"special_tokens_map\.json: the end token"),
        ({"config": {"eos_token_id": 999}}, r"config\.json: eos_token_id 999 is no token"),
        ({"config": {"eos_token_id": -1}}, r"config\.json: eos_token_id -1 is no token"),
        ({"config": {"eos_token_id": True}}, r"config\.json: eos_token_id True is no token"),
        ({"config": {"eos_token_id": [281, 0]}}, r"names no eos_token, and config\.json several, \[281, 0\]"),
    ],
)
def test_an_end_token_that_is_none_is_refused_by_file(
    definition: dict[str, Any], files: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "t", definition, **files)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)


def test_files_that_lie_nowhere_yet_are_named_by_their_origin(definition: dict[str, Any]) -> None:
    contents = json.dumps(definition).encode()
    assert tokenizer_of_files({"tokenizer.json": contents}, "the model").vocab_size == 282
    with pytest.raises(ValueError, match="the tokenizer.json in the model is damaged"):
        tokenizer_of_files({"tokenizer.json": contents[:-2]}, "the model")
    with pytest.raises(ValueError, match=r"the model/config\.json"):
        end_token(Backend.from_str(contents.decode()), {"config.json": b"["}, "the model")


def changed(definition: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return definition | changes


def replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


TABLE = (0).to_bytes(4, "little") + b"a" * 3000 + b"\0b\0"
BOMBS = {
    "one replacement": {"normalizer": replace("a", "b" * 2000)},
    "a chain": {"normalizer": sequence(*[replace("a", "a" * 10)] * 10)},
    "nested": {"normalizer": sequence(sequence(replace("a", "a" * 40)), sequence(replace("a", "a" * 40)))},
    "between characters": {
        "normalizer": sequence(*[{"type": "Replace", "pattern": {"Regex": "x*"}, "content": "y"}] * 12)
    },
    "before a text": {"normalizer": {"type": "Prepend", "prepend": "b" * 2000}},
    "a table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(TABLE).decode()}},
    "backwards": {"decoder": {"type": "Sequence", "decoders": [replace("a", "b" * 2000)]}},
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_tokenizer_that_makes_megabytes_of_a_character_is_refused(
    definition: dict[str, Any], name: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "t", changed(definition, **BOMBS[name]))
    started = time.perf_counter()
    with pytest.raises(ValueError, match=rf"{folder}: its (normalizer|decoder) may make .* characters of one"):
        load_tokenizer(folder)
    assert time.perf_counter() - started < 20


def test_usual_normalizers_are_no_bombs(definition: dict[str, Any], tmp_path: Path) -> None:
    usual = [
        {"type": "NFKC"},
        normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
        normalizers.Sequence([normalizers.Replace(Regex(" {2,}"), " ")] * 20 + [normalizers.NFKD()]),
        normalizers.Sequence([normalizers.Replace("``", '"'), normalizers.NFKD(), normalizers.Lowercase()]),
    ]
    for number, normalizer in enumerate(usual):
        own = dict(definition)
        own["normalizer"] = normalizer if isinstance(normalizer, dict) else json.loads(normalizer.__getstate__())
        assert load_tokenizer(write(tmp_path / str(number), own)).vocab_size == 282


def test_what_the_library_raises_names_the_folder(definition: dict[str, Any], tmp_path: Path) -> None:
    single = [{"SpecialToken": {"id": "gone", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    panics = changed(
        definition,
        post_processor={"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}},
    )
    damaged = [
        panics,
        changed(definition, model=None),
        changed(definition, model={"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}),
        changed(definition, model={"type": "BPE", "vocab": {"a": -1}, "merges": []}),
        changed(definition, added_tokens=3),
        changed(definition, normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": "x"}),
    ]
    for number, own in enumerate(damaged):
        folder = write(tmp_path / str(number), own)
        with pytest.raises(ValueError, match=rf"the tokenizer in {folder} is damaged"):
            load_tokenizer(folder)
    for contents in ("[" * 100_000, "[]", '{"a": 1, "a": 2}', "\xff"):
        (folder / "tokenizer.json").write_text(contents, encoding="latin-1")
        with pytest.raises(ValueError, match=str(folder)):
            load_tokenizer(folder)


def test_a_regular_expression_that_runs_away_ends_as_an_error(tmp_path: Path) -> None:
    backend = Backend(models.BPE(vocab={"a": 0, "</s>": 1}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+b"), "isolated")
    tokenizer = load_tokenizer(write(tmp_path / "t", json.loads(backend.to_str())))
    with pytest.raises(ValueError, match=rf"the tokenizer in {tmp_path / 't'} .*retry-limit"):
        tokenizer.encode("a" * 64)


@pytest.mark.parametrize("largest", [200_000, 1 << 31])
def test_ids_far_beyond_the_vocabulary_are_refused(largest: int, tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "</s>": 1, "b": largest}, "merges": []}
    folder = write(tmp_path / "t", {"version": "1.0", "added_tokens": [], "model": model})
    with pytest.raises(ValueError, match=rf"{folder} has 3 tokens with ids up to {largest:,}; valid are ids up to"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_id": -1}, r"eos_id: .*>= 0"),
        ({"eos_id": 282}, "eos_id 282 is outside of the vocabulary of 282"),
        ({"vocab_size": 1e308}, "vocab_size: Expected int"),
        ({"vocab_size": 300}, "says vocab_size 300, but tokenizer.json beside it has 282"),
        ({"kind": "pickle"}, "kind: Invalid enum value"),
        ({"begin_ids": [282]}, "begin_ids 282 is outside of the vocabulary of 282"),
        ({"begin_ids": None}, "begin_ids: Expected array"),
    ],
)
def test_the_info_beside_a_tokenizer_is_checked(
    definition: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    Tokenizer("hf", 0, json.dumps(definition).encode()).save(tmp_path / "t")
    info = json.loads((tmp_path / "t" / "info.json").read_text())
    (tmp_path / "t" / "info.json").write_text(json.dumps(info | change))
    with pytest.raises(ValueError, match=rf"{tmp_path}/t/info\.json.*{message}"):
        load_tokenizer(tmp_path / "t")
