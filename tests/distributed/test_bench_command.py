"""`infini bench NAME --quick`: note, numbers and pictures are there and say the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data.files import FileError
from launch import cli
from pipeline.benchmarks.record import Record, read_record

pytestmark = pytest.mark.distributed


def bench(name: str, folder: Path, *options: str) -> str:
    """Run a benchmark at its smallest size; returns the note. Called in a process of a pool."""
    assert cli.main(["bench", name, "--quick", "--out", str(folder), *options]) == 0
    (note,) = folder.glob("*.md")
    return note.read_text(encoding="utf-8")


def numbers(record: Record, name: str, **of) -> list[float]:
    """All values of a name whose `of` holds what is given."""
    return [m.value for m in record.measurements if m.name == name and of.items() <= m.of.items()]


def the_record(folder: Path) -> Record:
    (path,) = folder.glob("*.json")
    record = read_record(path)
    for picture in record.pictures:
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert len({(m.name, *sorted(m.of.items())) for m in record.measurements}) == len(record.measurements)
    assert all(m.low is None or m.low <= m.value <= m.high for m in record.measurements)
    return record


def test_step(pools, tmp_path):
    """Rules, plain and transformers at once; peers that are not installed are named."""
    note = pools.run(1, bench, name="step", folder=tmp_path)[0]
    record = the_record(tmp_path)
    assert record.benchmark == "step" and record.settings["tokens"] == 64  # what --quick made of it
    assert len(record.pictures) == 1 and record.pictures[0] in note
    models = {m.of["model"] for m in record.measurements if m.name == "tokens_per_second"}
    assert {"plain", "linear", "delta", "deltanet", "gated_deltanet", "transformers"} <= models
    for package in ("infini-transformer-pytorch", "recurrent-memory-transformer-pytorch"):
        assert package in models or f"Not installed, so not measured: {package}" in note or f", {package}" in note
    plain, llama = (numbers(record, "parameters", model=name) for name in ("plain", "transformers"))
    assert plain == llama  # the same sizes to the last parameter
    assert numbers(record, "times_as_fast", model="plain", against="plain") == [1]
    assert 0 < numbers(record, "share_of_peak", model="delta")[0] < 2


def test_what_does_not_fit_is_refused_by_name(tmp_path, capsys):
    for options, message in (
        (["--tokens", "100"], "--tokens 100 must be a multiple of --segment-lengths 256"),
        (["--heads", "7"], "--hidden 512 must be a multiple of --heads 7"),
        (["--device", "cuda"], "--device cuda: torch sees no CUDA device here"),
    ):
        assert cli.main(["bench", "step", "--out", str(tmp_path), *options]) == 2
        assert message in capsys.readouterr().err


def test_a_record_of_another_form_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"schema": "infini-bench/7", "benchmark": "step"}', encoding="utf-8")
    with pytest.raises(FileError, match="infini-bench/7"):
        read_record(path)


def test_length(tmp_path):
    """Its own processes are forked, so it runs from the command line as a user would."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "bench", "length", "--quick", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    record = the_record(tmp_path)
    for model in ("delta", "sliding window", "full attention"):
        assert len(numbers(record, "token_time", part="train", model=model)) == 2
    assert 0.95 < numbers(record, "peak_ratio", model="delta", tokens=1024)[0] < 1.05
    assert len(numbers(record, "times_reference", model="delta")) == 2
    # What is kept of a document: the same whatever its length with a memory, in step with it with full attention.
    states = {model: numbers(record, "state", model=model) for model in ("delta", "sliding window", "full attention")}
    assert states["delta"][0] == states["delta"][1]
    assert states["sliding window"][0] == states["sliding window"][1]
    assert states["full attention"] == [2 * 32 * 4 * 256, 2 * 32 * 4 * 1024]
    # M, z and what one segment's tokens have left in the cache.
    assert states["delta"][0] == 4 * (2 * (16 * 16 + 16) + 16 * 2 * (4 * 16 + 1))
