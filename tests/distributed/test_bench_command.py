"""`infini bench NAME --quick`: note, numbers and pictures are there and say the same."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import median
from unittest import mock

import pytest

from data.files import FileError
from launch import cli
from launch.commands import bench_context as bench_context_command
from launch.commands import bench_scaling
from launch.commands.bench_note import Note
from pipeline.benchmarks import context, data_rates, measuring, scaling
from pipeline.benchmarks.contestants import Sizes
from pipeline.benchmarks.overhead import Overhead
from pipeline.benchmarks.record import Record, read_record
from pipeline.config.validate import validate

pytestmark = pytest.mark.distributed


def bench(name: str, folder: Path, options: Sequence[str] = ()) -> str:
    """Run a benchmark at its smallest size; returns the note. Called in a process of a pool, which has loaded all
    libraries and joined its group: what would be measured in a process of its own is measured here."""
    measuring.in_fresh_process = lambda function, *arguments: function(*arguments)
    data_rates.worker_pool = ThreadPool
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
    """Rules, plain and transformers at once, and with other products; peers that are not installed are named."""
    note = pools.run(1, bench, name="step", folder=tmp_path, options=["--onednn"])[0]
    record = the_record(tmp_path)
    assert record.benchmark == "step" and record.settings["tokens"] == 64  # what --quick made of it
    assert len(record.pictures) == 1 and record.pictures[0] in note
    models = {m.of["model"] for m in record.measurements if m.name == "tokens_per_second"}
    assert {"plain", "linear", "delta", "deltanet", "gated_deltanet", "transformers", "delta onednn"} <= models
    assert len(numbers(record, "peak")) == 2
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


def test_data_on_two_threads(tmp_path):
    """Its own processes are forked: a tokenizer that has been trained in the one they come from hangs them."""
    sizes = "--megabytes 1 --vocab 300 --processes 2 --times 2 --windows 4 --lanes 2 --rounds 1".split()
    command = [sys.executable, "-m", "launch.cli", "bench", "data", *sizes, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(numbers(the_record(tmp_path), "tokens_per_second", part="prepare", processes=2)) == 3


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


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("capacity", ["--dim", "8"], {"right_answers"}),
        ("checkpoint", ["--repeats", "1"], {"stall_time", "write_time", "plain_write_time", "checkpoint"}),
        ("generate", ["--lengths", "256", "--new-tokens", "2"], {"new_token_time", "peak", "memory_file"}),
    ],
)
def test_older_ones_leave_numbers_and_a_picture(pools, tmp_path, name, options, expected):
    pools.run(1, bench, name=name, folder=tmp_path, options=options)
    record = the_record(tmp_path)
    assert expected <= {m.name for m in record.measurements}
    assert record.pictures and all(m.unit for m in record.measurements)


def test_data(pools, tmp_path):
    note = pools.run(1, bench, name="data", folder=tmp_path)[0]
    record = the_record(tmp_path)
    ours, theirs = (
        numbers(record, "tokens_per_second", part="prepare", kind=kind) for kind in ("infini prepare", "tokenizers")
    )
    assert numbers(record, "times_tokenizers", kind="infini prepare") == [ours[0] / theirs[0]]
    assert numbers(record, "times_tokenizers", kind="tokenizers") == [1]
    assert len(numbers(record, "times_webdataset")) == 3
    assert len(numbers(record, "grown", part="prepare")) == 6 and len(numbers(record, "joined_per_second")) == 1
    assert "1.0 MB of text" in note


def test_both_sides_of_data_handle_the_same_tokens(pools, tmp_path):
    """A rate is of tokens: prepare writes, plain tokenizers encode and webdataset reads the same ones."""
    made, encoded, read, documents, megatrons, joined = pools.run(1, tokens_of_data, folder=tmp_path)[0]
    assert made == encoded + documents == read == megatrons == joined  # each document ends with the end token


def tokens_of_data(folder: Path) -> tuple[int, ...]:
    data_rates.worker_pool = ThreadPool  # ranks of the pools may not have children
    text = data_rates.write_text(folder / "text.jsonl", 200_000)
    data_rates.prepare([str(text.path)], folder / "set", data_rates.options("train:300"))
    made = data_rates.run_prepare(text, folder / "out", str(folder / "set"), 1)
    encoded = data_rates.run_tokenizers(text, str(folder / "set"), 1)
    read = data_rates.run_webdataset(folder / "out")
    megatrons = data_rates.run_megatron(text, folder / "megatron", str(folder / "set"), 1)
    data_rates.prepare_in_parts(text, folder / "joined", str(folder / "set"), 2)
    joined = data_rates.run_join(folder / "joined", 1)
    return made.tokens, encoded.tokens, read.tokens, text.documents, megatrons.tokens, joined.tokens


def test_overhead(pools, tmp_path):
    note = pools.run(1, bench, name="overhead", folder=tmp_path)[0]
    record = the_record(tmp_path)
    shares = {m.of["cost"]: m.value for m in record.measurements if m.name == "share"}
    assert shares.keys() == {"data", "metrics", "saves"}
    for cost, share in shares.items():
        held = share <= numbers(record, "bound", cost=cost)[0]
        (row,) = (line for line in note.splitlines() if line.startswith(f"| {cost} ") and "%" in line)
        assert ("yes" in row) == held and ("NO" in row) != held


def test_shares_by_hand():
    found = Overhead(tokens=8, metrics_interval=2, memory_interval=10, step_s=[1.0, 3.0], data_s=[0.1, 0.1])
    found.metrics_s, found.statistics_s, found.save_s = [0.0, 0.2], [1.0, 5.0, 2.0], [0.6, 6.0, 0.3]
    assert found.data_share == pytest.approx(0.05)
    assert found.metrics_share == pytest.approx(0.05 + 2.0 / 10 / 2.0)  # per step of two seconds
    assert found.save_share == pytest.approx(0.01)


def test_scaling(pools, tmp_path):
    """The layouts on real processes, and what the note makes of them."""
    sizes = Sizes(2, 16, 2, 24, 64, tokens=64, lanes=2, segment_length=16)
    shared = {"sizes": list(sizes), "rule": "delta", "settings": ["bptt.recompute=window"], "steps": 2}
    alone = pools.run(1, scaling.measure, layouts=["single"], **shared)[0]
    several = pools.run(2, scaling.measure, layouts=["data", "tensor", "pipeline"], **shared)[0]
    path = tmp_path / "results.json"
    scaling.write_results(path, [*alone, *several])
    times = {(one.layout, one.processes): [one] for one in scaling.read_results(path)}
    assert times == {(one.layout, one.processes): [one] for one in [*alone, *several]}
    path.unlink()
    assert [one.layout for one in several if one.communication_s] == ["data", "tensor"]
    pipeline = times["pipeline", 2][0]
    assert 0 < pipeline.bubble_share < 1 and pipeline.simulated_s > 0 and pipeline.ran_s > 0

    args = argparse.Namespace(layers=2, hidden=16, heads=2, rule="delta", lanes=2, tokens=64, rounds=1, steps=2)
    note = Note("scaling", tmp_path)
    bench_scaling.report(args, note, sizes.tokens * sizes.lanes, times)
    note.write({})
    record = the_record(tmp_path)
    for layout in ("data", "tensor", "pipeline"):
        speedup = median(times["single", 1][0].step_s) / median(times[layout, 2][0].step_s)
        assert numbers(record, "speedup", layout=layout) == [pytest.approx(speedup)]
        assert len(numbers(record, "bound_layout", layout=layout)) == 1
    alone_s, data = median(times["single", 1][0].step_s), times["data", 2][0]
    assert numbers(record, "bound_layout", layout="data") == [
        pytest.approx(alone_s / (alone_s / 2 + data.communication_s))
    ]


def test_all_layouts_of_scaling_do_the_same_work():
    sizes = Sizes(4, 32, 4, 88, 64, tokens=64, lanes=4, segment_length=16)
    configs = [scaling.config_of(layout, 2, sizes, "delta", []) for layout in ("single", "data", "tensor", "pipeline")]
    for config in configs:
        validate(config, 1 if config is configs[0] else 2, data_exists=False)
        assert config.model == configs[0].model
        assert (config.train.lanes, config.train.segments_per_window) == (4, 4)


def bench_context(**settings) -> list[context.ContextRun]:
    """Called in a process of a pool, whose heap stays as it is."""
    with mock.patch.object(context, "give_memory_back"):
        return context.measure(**settings)


def test_context(pools, tmp_path):
    """A document on one process and on four: a quarter of the memory, the same gradient where it begins, bytes that
    stay. With fewer ranks than three nothing would go through the part of one between."""
    sizes = Sizes(2, 16, 2, 24, 64, tokens=0, lanes=1, segment_length=16)
    shared = {"tokens": [1024, 64], "sizes": list(sizes), "rule": "delta", "settings": []}
    path = tmp_path / "results.json"
    runs = {}
    for processes in (1, 4):
        context.write_results(path, pools.run(processes, bench_context, **shared)[0])
        runs |= {(run.processes, run.tokens): run for run in context.read_results(path)}
    path.unlink()
    args = argparse.Namespace(**sizes._asdict() | {"tokens": 1024, "rule": "delta", "processes": 4})
    note = Note("context", tmp_path)
    bench_context_command.report(args, note, runs)
    note.write({})
    record = the_record(tmp_path)
    for tokens in (64, 1024):
        of = {"processes": 4, "tokens": tokens}
        assert 1e-9 < numbers(record, "first_gradient_norm", **of)[0]
        assert numbers(record, "first_gradient_difference", **of)[0] < 1e-12
        assert numbers(record, "loss_difference", **of)[0] < 1e-12
        # Pairs and normalisers of two heads of 8, to three others: forward, once more and backward.
        assert numbers(record, "sent", **of) == [3 * 3 * 8 * 2 * (2 * 8 * 8 + 8)]
    assert 0.2 < numbers(record, "share_of_one", processes=4, tokens=1024)[0] < 0.3
    assert record.pictures
