"""Training a tokenizer on text without a break: bounded, and said."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from data.tokenizer.tokenizer import train_bpe
from data.tokenizer.unbroken import LONGEST_RUN, MOST_CHARACTERS, RunCutter
from launch import cli

ORDINARY = "The cat, don't you know, is 12 years old; \u4e2d\u6587\u5b57\u3002 na\u00efve\n\n" * 40


def test_ordinary_text_is_not_cut() -> None:
    cutter = RunCutter()
    assert list(cutter.cut(ORDINARY)) == [ORDINARY]
    assert cutter.note is None


@pytest.mark.parametrize("unit", ["a", "\u4e2d", "_=", " ", "\n\t"])
def test_runs_are_cut_where_they_are_long_and_nothing_is_lost(unit: str) -> None:
    run = unit * (1000 // len(unit))
    text = f"x1{run}2y" * 3
    cutter = RunCutter()
    pieces = list(cutter.cut(text))
    assert "".join(pieces) == text
    assert len(pieces) == 3 * 4 + 1
    assert max(map(len, pieces)) <= LONGEST_RUN + 4
    assert (cutter.runs, cutter.characters, cutter.left_out) == (3, 3000, 0)
    assert "3 runs of more than 256 characters" in cutter.note


def test_what_is_too_much_is_left_out_and_counted() -> None:
    cutter = RunCutter()
    run = "ab" * MOST_CHARACTERS
    text = f"{run} {run}1the rest"
    pieces = list(cutter.cut(text))
    assert sum(map(len, pieces)) == len(text) - cutter.left_out
    assert cutter.left_out == 3 * MOST_CHARACTERS - LONGEST_RUN
    assert pieces[-1] == "1the rest"


def test_a_tokenizer_is_trained_on_an_unbroken_run_in_seconds_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=50_000))
    (tmp_path / "dna.txt").write_text(letters)
    command = ["prepare", str(tmp_path / "dna.txt"), "--tokenizer", "train:300", "--out", str(tmp_path / "set")]
    started = time.perf_counter()
    assert cli.main([*command, "--processes", "1", "--valid-fraction", "0"]) == 0
    assert time.perf_counter() - started < 60
    assert "1 runs of more than 256 characters without a break, 50,000 characters" in capsys.readouterr().err


def test_what_goes_wrong_while_training_comes_out() -> None:
    def texts():
        yield ORDINARY
        raise ValueError("the disk is gone")

    with pytest.raises(ValueError, match="the disk is gone"):
        train_bpe(texts(), 300)
    beats: list[int] = []
    assert train_bpe([ORDINARY], 300, beat=lambda: beats.append(1)).vocab_size == 300
    assert beats
