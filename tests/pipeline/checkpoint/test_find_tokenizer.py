"""A model is read with the tokenizer that it was trained with, whatever the size of another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data.files import sealed
from data.tokenizer.tokenizer import Tokenizer, byte_tokenizer
from pipeline.checkpoint.find_tokenizer import check_run_folder, find_tokenizer
from pipeline.checkpoint.folder import SUMMARY, find_checkpoint
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.config.load import ConfigError
from pipeline.config.schema import Config
from pipeline.evaluation import evaluate

FIXTURE = Path(__file__).parents[2] / "fixtures" / "first_version"
OTHER = Tokenizer("byte", eos_id=0)
"""As large as the one of bytes, and another one."""


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of the first version, which did not record its tokenizer."""
    shutil.copytree(FIXTURE / "run", tmp_path / "run")
    return tmp_path / "run"


def record(run: Path, tokenizer: Tokenizer) -> CheckpointReader:
    path = find_checkpoint(run) / SUMMARY
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | {"tokenizer_sha256": tokenizer.hash})))
    return CheckpointReader(path.parent)


def test_another_tokenizer_of_equal_size_is_refused_with_both_places(run, tmp_path):
    reader, notes = record(run, byte_tokenizer()), []
    assert OTHER.vocab_size == byte_tokenizer().vocab_size == reader.summary.vocab_size
    byte_tokenizer().save(run / "tokenizer")
    folder, found = find_tokenizer(reader, Config(), None, notes)
    assert (folder, found.hash, notes) == (run / "tokenizer", byte_tokenizer().hash, [])
    OTHER.save(tmp_path / "other")
    with pytest.raises(ConfigError) as error:
        find_tokenizer(reader, Config(), tmp_path / "other", notes)
    for part in (str(tmp_path / "other"), str(reader.folder), OTHER.hash[:12], byte_tokenizer().hash[:12]):
        assert part in str(error.value)
    shutil.rmtree(run / "tokenizer")
    OTHER.save(run / "tokenizer")
    with pytest.raises(ConfigError, match=f"tokenizer of {run} .* is not the one that {reader.folder}"):
        find_tokenizer(reader, Config(), None, notes)


def test_a_checkpoint_that_does_not_say_is_taken_with_a_note(run, tmp_path):
    reader, notes = CheckpointReader(find_checkpoint(run)), []
    byte_tokenizer().save(run / "tokenizer")
    find_tokenizer(reader, Config(), None, notes)
    assert len(notes) == 1 and "does not say which tokenizer" in notes[0] and str(run) in notes[0]
    config = reader.config
    config.data.sets[0].path = str(tmp_path / "set")
    OTHER.save(tmp_path / "set" / "tokenizer")
    with pytest.raises(ConfigError, match=f"{run} and {tmp_path / 'set'} hold different tokenizers"):
        find_tokenizer(reader, config, None, notes)


def test_a_run_folder_with_another_tokenizer_does_not_train(tmp_path):
    check_run_folder(tmp_path, OTHER.hash, "a set")  # no tokenizer there
    byte_tokenizer().save(tmp_path / "tokenizer")
    check_run_folder(tmp_path, byte_tokenizer().hash, "a set")
    with pytest.raises(ConfigError, match=f"{tmp_path / 'tokenizer'} .* is not the one that a set was prepared with"):
        check_run_folder(tmp_path, OTHER.hash, "a set")


def test_an_evaluation_compares_its_sets(run):
    shutil.copytree(FIXTURE / "set", run.parent / "set")
    given = [str(run.parent / "set")]
    reader, notes = record(run, byte_tokenizer()), []
    assert len(evaluate._held_out_sets(Config(), given, reader, notes)) == 1
    assert evaluate._tokenizer(Config(), given, reader).hash == byte_tokenizer().hash
    assert notes == []
    reader = record(run, OTHER)
    wrong = f"tokenizer of {given[0]} .* is not the one that {reader.folder}"
    with pytest.raises(ConfigError, match=wrong):
        evaluate._held_out_sets(Config(), given, reader, notes)
    with pytest.raises(ConfigError, match=wrong):
        evaluate._tokenizer(Config(), given, reader)
