"""A tokenizer that begins a text with a token of its own begins every document so: prepared, asked about, generated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from data.preparation.options import PrepareOptions
from data.preparation.prepare import prepare
from data.prepared.shards import PreparedSet
from data.tokenizer.tokenizer import Tokenizer, load_tokenizer, train_bpe
from launch import cli
from pipeline.config.task_spec import Task
from pipeline.evaluation.passkey import Row, passkey_cells
from pipeline.evaluation.tasks import task_cells
from pipeline.inference.generate import Generator

TEXT = "the cat sat on the mat and looked at the hat, "
BEGIN = 280


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of a Hugging Face model that puts <|bos|> first."""
    folder = tmp_path_factory.mktemp("model")
    backend = Backend.from_str(train_bpe([TEXT * 9], 280)._definition.decode())
    backend.add_special_tokens(["<|bos|>"])
    backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", BEGIN)])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|bos|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return load_tokenizer(model)


def documents(path: Path, split: str = "train") -> list[list[int]]:
    prepared = PreparedSet(path, split)
    return [prepared.read(i).tolist() for i in range(len(prepared))]


def test_a_document_begins_as_transformers_begins_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    command = ["prepare", str(tmp_path / "a.txt"), "--tokenizer", str(model), "--processes", "1"]
    command += ["--valid-fraction", "0", "--out"]
    assert cli.main([*command, str(tmp_path / "set")]) == 0
    assert "documents begin with 280" in capsys.readouterr().out
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    assert documents(tmp_path / "set") == [[*theirs(TEXT).input_ids, theirs.eos_token_id]]
    assert cli.main(["inspect", str(tmp_path / "set")]) == 0
    assert "begin tokens 280" in capsys.readouterr().out

    assert cli.main([*command, str(tmp_path / "set"), "--begin-token", "none"]) == 2
    assert "begin a document are [280] there and none here" in capsys.readouterr().err
    assert cli.main([*command, str(tmp_path / "plain"), "--begin-token", "none"]) == 0
    assert documents(tmp_path / "plain") == [[*theirs(TEXT).input_ids[1:], theirs.eos_token_id]]
    # What a set was made with goes on: its tokenizer brings its begin token, or that there is none.
    for name, begin_ids in (("set", (BEGIN,)), ("plain", ())):
        again = prepare(
            [str(tmp_path / "a.txt")], tmp_path / f"{name}-2", PrepareOptions(tokenizer=str(tmp_path / name))
        )
        assert again.manifest.tokenizer == PreparedSet(tmp_path / name).manifest.tokenizer
        assert again.manifest.tokenizer.begin_ids == begin_ids


def test_a_begin_token_is_no_text(model: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("", "\n", TEXT * 9)))
    options = PrepareOptions(tokenizer=str(model), valid_fraction=0.0, min_tokens=3)
    source = prepare([str(tmp_path / "a.jsonl")], tmp_path / "set", options).manifest.sources[0]
    assert (source.documents, source.too_short + source.empty) == (1, 2)
    parts = documents(prepare_cut(tmp_path, replace(options, max_tokens=40)))
    assert len(parts) > 1
    assert all(len(part) <= 40 and part[0] == BEGIN and part[-1] == tokenizer.eos_id for part in parts)
    assert sum((part[1:-1] for part in parts), []) == tokenizer.encode(TEXT * 9)
    with pytest.raises(ValueError, match="--max-tokens 6: valid are 7 and more, since this tokenizer begins"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "short", replace(options, max_tokens=6))


def prepare_cut(folder: Path, options: PrepareOptions) -> Path:
    prepare([str(folder / "a.jsonl")], folder / "cut", options)
    return folder / "cut"


def test_synthetic_documents_keep_their_length_and_their_spans(
    model: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(TEXT * 99)
    options = PrepareOptions(tokenizer=str(model), valid_fraction=0.0)
    prepare([str(tmp_path / "a.txt")], tmp_path / "text", options)
    for name, spec in (("own", "passkey:3,length=900"), ("filler", f"passkey:3,length=900,filler={tmp_path / 'text'}")):
        prepare([spec], tmp_path / name, options)
        prepared = PreparedSet(tmp_path / name)
        for i in range(len(prepared)):
            tokens = prepared.read(i).tolist()
            assert len(tokens) == 900
            assert [at for at, token in enumerate(tokens) if token == BEGIN] == [0]
            [(start, stop)] = prepared.answers(i)
            assert stop == 899
            key = tokenizer.decode(tokens[start:stop]).strip()
            assert len(key) == 5 and key.isdigit()
            [question] = prepared.questions(i)
            assert BEGIN not in question.tokens
            assert f"{key} is the pass key." in tokenizer.decode(tokens[: question.after])
            assert not tokenizer.decode(tokens[: question.after - 2]).endswith("pass key.")


def test_evaluation_begins_its_documents_so(tokenizer: Tokenizer) -> None:
    segments, length = 24, 64
    [passkey] = passkey_cells([Row(segments, (0.5,), 1, (0,))], tokenizer, length)
    [needles] = task_cells(Task.parse(f"needles:1,length={segments * length + 1}"), tokenizer, length, 0)
    for cell in (passkey, needles):
        document = cell.make(0)
        tokens = document.read(0, document.length).tolist()
        assert document.length == segments * length + 1
        assert [at for at, token in enumerate(tokens) if token == BEGIN] == [0]
        start, stop = document.answers[0]
        assert tokenizer.decode(tokens[start:stop]).strip().isdigit()
    assert passkey.beginning.read(0, 1).tolist() == [BEGIN]


class _Reader:
    """Takes down what a generator's model is given to read."""

    def __init__(self) -> None:
        self.texts: list[list[int]] = []

    def start(self, lanes: int) -> _Reader:
        self.lanes = lanes
        return self

    def select(self, lanes: list[int]) -> _Reader:
        return self

    def read(self, state: _Reader, texts: list, on_read: object) -> None:
        self.texts = [np.concatenate(list(text)).tolist() for text in texts]
        self.segment = self.texts


def test_generation_begins_a_document_so_and_goes_on_without(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(TEXT)
    generator = object.__new__(Generator)
    generator.tokenizer, generator.model = tokenizer, _Reader()
    text = tokenizer.encode(TEXT)
    prompts = [TEXT, tmp_path / "book.txt", [5, 6]]
    read = generator.read(prompts)
    assert generator.model.texts == [[BEGIN, *text], [BEGIN, *text], [5, 6]]
    generator.read(prompts, after=read)
    assert generator.model.texts == [text, text, [5, 6]]
