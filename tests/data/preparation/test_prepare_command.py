"""The command line of `infini prepare`."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import data.preparation.prepare
from data.preparation.options import PrepareOptions
from data.prepared.shards import PreparedSet
from data.synthetic import TASKS
from launch import cli
from launch.commands import progress


def test_the_stated_defaults_are_the_real_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PrepareOptions] = []

    def fake(sources: object, out: object, options: PrepareOptions, **_: object) -> None:
        seen.append(options)
        raise ValueError("stop here")

    monkeypatch.setattr("data.preparation.prepare.prepare", fake)
    assert cli.main(["prepare", "x.txt", "--out", str(tmp_path)]) == 2
    assert seen == [PrepareOptions()]


def test_the_help_names_every_task_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["prepare", "--help"])
    shown = capsys.readouterr().out
    for task, generator in TASKS.items():
        lines = shown.partition(f"\n    {task} ")[2].partition("\n    ")[0]
        for option in inspect.signature(generator).parameters.keys() - {"tokenizer"}:
            assert option in lines, f"{option} of {task}"


def test_prepare_and_prepare_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prepare", "passkey:8,length=512..1K", "python:argparse", "--out", str(tmp_path / "set")]
    command += ["--processes", "1", "--shard-size", "8K", "--valid-fraction", "0.2", "--seed", "5"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert f"prepared {tmp_path / 'set'} in" in shown
    assert "passkey:8,length=512..1K: 8 documents" in shown
    prepared = PreparedSet(tmp_path / "set")
    assert prepared.manifest.options["shard_bytes"] == 8192
    assert prepared.manifest.options["seed"] == 5
    assert f"train: {len(prepared)} documents, {prepared.lengths.sum():,} tokens" in shown
    assert cli.main(command) == 0
    assert "complete already" in capsys.readouterr().out
    assert cli.main([*command, "--min-tokens", "100"]) == 2
    assert "already holds a different set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.txt"], "source gone.txt does not exist"),
        (["python:argparse", "--shard-size", "big"], "--shard-size: 'big' is not a size"),
        (["python:argparse", "--tokenizer-sample", "1.5M"], "--tokenizer-sample: '1.5M' is not a size"),
        (["python:argparse", "--processes", "0"], "--processes 0"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["prepare", *arguments, "--out", str(tmp_path / "set")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("infini: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "set").exists()


def test_the_summary_tells_what_is_held_out_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    books = tmp_path / "books"
    books.mkdir()
    for number, length in enumerate((900, 950, 1000, 1050, 1100, 1150)):
        (books / f"[bold]{number}.txt").write_text("a" * (length - 1))
    (books / "map.png").touch()
    (books / "bad.txt").write_bytes(b"\xff\x1b[2J")
    (books / "empty.txt").touch()
    command = ["prepare", str(books), "--out", str(tmp_path / "set"), "--processes", "1"]
    assert cli.main(command) == 2
    assert "[bold]" not in capsys.readouterr().out
    assert cli.main([*command, "--skip-bad"]) == 0
    shown, noted = capsys.readouterr()
    assert f"note: {books}: passed over 1 .png (map.png) (see --text-pattern)\n" in noted
    assert "(left out: 1 documents empty, 1 bad files, 1 files passed over)" in shown
    assert f"    left out: {books}/bad.txt is not UTF-8 text: byte 0 is 0xff\n" in shown
    (valid,) = [line for line in shown.splitlines() if line.startswith("  valid: ")]
    tokens = int(valid.split()[3].replace(",", ""))
    assert valid.startswith("  valid: 1 documents")
    assert f"  held out: 16.7% of the documents, {tokens / 6150:.1%} of the tokens (--valid-fraction 0.05 " in shown
    assert cli.main([*command, "--skip-bad"]) == 0
    assert "bad.txt is not UTF-8" in capsys.readouterr().out


def test_training_a_tokenizer_says_what_it_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("some words " * 50)
    told: list[tuple[str, int, int]] = []
    options = PrepareOptions(tokenizer="train:300")
    build = data.preparation.prepare.prepare
    build([str(tmp_path / "a.txt")], tmp_path / "set", options, report=lambda *now: told.append(now[:3]))
    reading, training = "reading a sample for the tokenizer", "training the tokenizer on the sample"
    assert told[:3] == [
        (
            reading,
            0,
            550,
        ),
        (reading, 550, 550),
        (training, 0, 0),
    ]
    with progress.progress() as report:
        report(training, 0, 0, 0)
        report(training, 0, 0, 0)
    assert capsys.readouterr().err == f"{training} ...\n"


def test_a_bar_that_cannot_tell_how_far_it_is_ends_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.progress import Progress

    shown: list[Progress] = []
    add = Progress.add_task
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setattr(Progress, "add_task", lambda self, *a, **k: (shown.append(self), add(self, *a, **k))[1])
    with progress.progress() as report:
        report("training", 0, 0, 0)
        assert shown[0].tasks[0].total is None and not shown[0].finished
        report("encoding", 5, 5, 1)
        assert shown[0].finished


def test_progress_lines_tell_the_rest(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("launch.commands.progress.time.perf_counter", lambda: now)
    with progress.progress() as report:
        report("encoding", 0, 40_000_000, 0)
        now = 120.0
        report("encoding", 10_000_000, 40_000_000, 3_000_000)
    assert "encoding  10.0/40.0 MB  3,000,000 tokens  60 s left" in capsys.readouterr().err
