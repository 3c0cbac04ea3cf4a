"""What a run says while it trains: on the screen from its first step, in metrics.jsonl and in TensorBoard."""

from __future__ import annotations

import gzip
import json
import re
import socket
from dataclasses import asdict

import pytest
import torch.distributed as dist
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from data.prepared.shards import PreparedSet
from pipeline.config.load import load_config
from pipeline.config.validate import validate
from pipeline.parallel.topology import initialize, shutdown
from pipeline.reporting.dashboard import LAYERS, PLOTS, flatten, layout, tag
from pipeline.reporting.metrics import read_metrics
from pipeline.training import monitor
from pipeline.training.trainer import Trainer
from tests.distributed.cases import TINY
from tests.prepared import write_set

STEPS, INTERVAL = 5, 2


def train(folder, name, *own):
    """Train in this process on the documents in `folder`: the run's folder, its configuration, and what it printed."""
    sets = [f"data.sets=[{{path: {folder}/set}}]", f"run_dir={folder}/{name}"]
    steps = [f"train.steps={STEPS}", f"metrics.interval={INTERVAL}", "metrics.memory_interval=2"]
    config = load_config(None, [*TINY, *sets, *steps, "data.skip_bad_documents=true", *own])
    validate(config, 1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patched:
        lines = []
        patched.setenv("LOCAL_RANK", "0")
        patched.setattr("pipeline.reporting.console._print_line", lambda console, text, style=None: lines.append(text))
        trainer = Trainer(config, initialize(tensor=1, pipeline=1, timeout_s=60))
        trainer.start("latest" if (folder / name).exists() else None)
        trainer.train()
        trainer.close()
    shutdown()
    return folder / name, config, lines


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one process."""
    folder = tmp_path_factory.mktemp("monitor")
    source = PreparedSet(write_set(folder / "set", [300] * 8))
    with open(folder / "set" / "train-000000.tar", "r+b") as file:
        for document in range(7):  # tokens that the vocabulary does not have
            file.seek(int(source._index.offset[document]) + 500)
            file.write(b"\xff\xff")
    own = ["name=a run [named]", "metrics.tensorboard=true", "model.memory.write_gate=hard"]
    return train(folder, "run", *own)


def test_the_first_step_is_told_and_no_time_left_is_unknown(run):
    _, _, lines = run
    lines = [line for line in lines if line.startswith("step ")]
    assert [int(re.match(r"step (\d+)/5  ", line)[1]) for line in lines] == [1, 2, 4, 5]
    assert re.fullmatch(
        r"step 1/5  loss \d\.\d{4}  lr \S+  grad \S+  took \S+ s  eta \S+ at this pace \(the first step is slow\)",
        lines[0],
    )
    for line in lines:
        assert re.search(r"  eta \d+(s|m\d\ds)\b", line), line


def test_times_add_up(run):
    folder, _, _ = run
    records = [record for record in read_metrics(folder / "metrics.jsonl") if "speed/step_s" in record]
    assert [record["step"] for record in records] == [2, 4, 5]
    for record, before, steps in zip(records, [{"progress/tokens": 0}, *records], (2, 2, 1), strict=False):
        parts = [record[f"speed/{phase}_s"] for phase in ("data", "forward_backward", "optimizer")]
        assert 0 < sum(parts) <= record["speed/step_s"]
        tokens = (record["progress/tokens"] - before["progress/tokens"]) / steps
        assert record["speed/tokens_per_s"] * record["speed/step_s"] == pytest.approx(tokens)


def test_documents_that_are_left_out_are_counted(run):
    folder, _, _ = run
    counts = [
        record["data/skipped_documents"] for record in read_metrics(folder / "metrics.jsonl") if "loss/train" in record
    ]
    assert counts == sorted(counts) and counts[-1] >= 4


def test_tensorboard_begins_with_what_is_looked_at_first(run):
    """Loss, then tokens per second; the layers' cards are in one group, the last."""
    folder, _, _ = run
    tags = sorted(events(folder).Tags()["scalars"])
    assert tags[0] == "1_loss/train"
    groups = list(dict.fromkeys(name.partition("/")[0] for name in tags))
    assert groups[:2] == ["1_loss", "2_speed"] and groups[-1] == "layers"
    assert "2_speed/tokens_per_s" in tags and "5_optimizer/gradient_norm" in tags
    assert [name for name in tags if name.startswith("layers/")] == [
        f"layers/{quantity}/{layer:02d}" for quantity in sorted(LAYERS) for layer in range(4)
    ]
    assert {name.removeprefix("4_memory/") for name in tags if name.startswith("4_memory/")} == set(LAYERS)
    assert set(events(folder).Tags()["histograms"]) == {f"4_memory/{gate}_gate_histogram" for gate in ("mix", "write")}
    written = {tag(name) for record in read_metrics(folder / "metrics.jsonl") for name in record}
    assert set(tags) <= written


def test_layers_are_told_each_and_together(run):
    folder, _, _ = run
    (record,) = [r for r in read_metrics(folder / "metrics.jsonl") if r["step"] == 4 and "norm_M/layer_00" in r]
    layers = [record[f"norm_M/layer_{layer:02d}"] for layer in range(4)]
    assert record["memory/norm_M"] == pytest.approx(sum(layers) / 4) and len(set(layers)) == 4


def test_tensorboard_has_the_configuration(run):
    folder, config, _ = run
    found = events(folder)
    text = found.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert yaml.safe_load(text) == asdict(config)
    settings = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    session = plugin_data_pb2.HParamsPluginData.FromString(settings).session_start_info
    shown = {name: getattr(value, value.WhichOneof("kind")) for name, value in session.hparams.items()}
    assert shown == flatten(asdict(config))
    assert shown["model.memory.write_gate"] == "hard" and shown["train.lanes"] == 4
    assert shown["model.vocab_size"] == "None" and shown["metrics.tensorboard"] == "True"


def test_custom_scalars_put_first_what_is_looked_at_first(run):
    """Every plot of the layout finds tags; tokens per second are no seconds."""
    folder, _, _ = run
    found = events(folder)
    content = found.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(content)
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert list(charts)[:2] == ["loss", "tokens per second"]
    only_with_ranks = {"seconds per step that a rank itself works"}
    assert {plot for plots in PLOTS.values() for plot in plots} - only_with_ranks == set(charts)
    shown = {
        title: [
            name for name in found.Tags()["scalars"] if any(re.match(expression, name) for expression in expressions)
        ]
        for title, expressions in charts.items()
    }
    assert all(shown.values()), shown
    assert shown["tokens per second"] == ["2_speed/tokens_per_s"]
    assert len(shown["seconds per step"]) == 4
    assert len(shown["loss by segment of the document"]) == 6  # documents of 19 segments
    assert len(shown["mix_gate"]) == 4


def test_a_plot_is_laid_out_when_there_is_something_to_draw():
    assert layout(["9_system/process_bytes"]) == {}
    names = ("text/loss_on", "text/loss_off", "task_on/recall pairs 4", "text/loss_by_segment_on/2-3", "seconds")
    tags = [tag(f"evaluation/{name}") for name in names]
    assert tags[:2] == ["3_evaluation/text/loss_on", "3_evaluation/text/loss_off"]
    assert tags[3:] == ["6_loss_by_segment/text_on/2-3", "7_time/evaluation_seconds"]
    assert layout(sorted(tags)) == {
        "evaluation": {
            "task_on": ["Multiline", ["^3_evaluation/task_on(/|$)"]],
            "text": ["Multiline", ["^3_evaluation/text(/|$)"]],
            "text_on, by segment": ["Multiline", ["^6_loss_by_segment/text_on(/|$)"]],
        }
    }


def events(folder):
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}).Reload()


def test_a_cpu_has_no_device_memory_and_no_data_sheet(run):
    folder, _, _ = run
    names = {name for record in read_metrics(folder / "metrics.jsonl") for name in record}
    assert {name for name in names if name.startswith("system/")} == {"system/process_bytes"}
    assert "speed/mfu" in names and "speed/mfu_data_sheet" not in names
    assert not any(name.startswith("ranks/") for name in names)  # there is one


@pytest.mark.parametrize("known", [True, False])
def test_device_memory_and_data_sheet_of_an_accelerator(tmp_path, monkeypatch, capsys, known):
    """Pretended: the numbers of its driver."""
    name = "NVIDIA H100 80GB HBM3" if known else "NVIDIA H900"
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(monitor, "device_name", lambda device: name)
    monkeypatch.setattr(monitor, "device_memory_peaks", lambda device: {"allocated": 5 * 2**30, "reserved": 7 * 2**30})
    own = [f"data.sets=[{{path: {write_set(tmp_path / 'set', [300] * 8)}}}]", f"run_dir={tmp_path}/run"]
    own += ["train.steps=2", "optimizer.warmup_steps=1", "metrics.interval=1", "metrics.tensorboard=false"]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    trainer = Trainer(load_config(None, [*TINY, *own]), initialize(tensor=1, pipeline=1, timeout_s=60))
    trainer.start(None)
    peak = trainer.monitor.peak_flops
    trainer.train()
    trainer.close()
    shutdown()
    last = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "speed/mfu" in record][-1]
    assert last["system/device_allocated_bytes"] == 5 * 2**30
    assert last["system/device_reserved_bytes"] == 7 * 2**30
    out = " ".join(capsys.readouterr().out.split())
    if known:
        assert last["speed/mfu_data_sheet"] * 67e12 == pytest.approx(last["speed/mfu"] * peak)
        assert f"67 TFLOP/s, all devices, dense fp32 (H100: {name})" in out
    else:
        assert "speed/mfu_data_sheet" not in last
        assert f"unknown: not every device (here: {name}) is in docs/devices.md" in out


def test_console_log_has_every_line_over_all_starts(run):
    folder, config, lines = run
    written = (folder / "console.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d( |$)", line) for line in written)
    texts = [line[21:] for line in written]
    assert set(lines) - {config.name} <= set(texts)  # the name's line goes the way that is watched here
    assert any(text.startswith("tokens per step ") for text in texts)  # the table before the first step

    own = ["name=a run [named]", "metrics.tensorboard=true", "model.memory.write_gate=hard", f"train.steps={STEPS + 1}"]
    train(folder.parent, "run", *own)
    resumed = (folder / "console.log").read_text().splitlines()
    assert resumed[: len(written)] == written
    assert any("resumed at step" in line for line in resumed[len(written) :])
    starts = [record["start"] for record in read_metrics(folder / "metrics.jsonl") if "start" in record]
    assert [start["steps"] for start in starts] == [STEPS, STEPS + 1]
    assert starts[0]["hosts"] == [socket.gethostname()] and starts[0]["memory"]["write_gate"] == "hard"
    assert [record["end"] for record in read_metrics(folder / "metrics.jsonl") if "end" in record] == ["finished"] * 2


def test_a_profiled_run_has_the_same_numbers_and_a_trace(run):
    """Steps 3 and 4 in the trace, step 2 to warm up: none of them counts for the speed."""
    folder, _, _ = run
    own = ["model.memory.write_gate=hard", "metrics.profile={start: 3, steps: 2}"]
    profiled, _, lines = train(folder.parent, "profiled", *own)
    losses = {
        run: [r["loss/train"] for r in read_metrics(run / "metrics.jsonl") if "loss/train" in r][:3]
        for run in (folder, profiled)
    }
    assert losses[folder] == losses[profiled]
    speeds = [r.get("speed/step_s") for r in read_metrics(profiled / "metrics.jsonl") if "loss/train" in r]
    assert [speed is None for speed in speeds] == [False, True, False]
    (path,) = (profiled / "profile").iterdir()
    assert path.name == "steps000003-000004.rank00000.pt.trace.json.gz"
    assert any(line.startswith(f"profiled steps 3 to 4: {profiled}/profile") for line in lines)
    with gzip.open(path, "rt") as file:
        spans = [event["name"] for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    assert {"step 3", "step 4", "data", "forward_backward", "optimizer"} <= set(spans)
    assert "step 2" not in spans and "step 5" not in spans
    assert any(name.startswith("backward, microbatch 0, chunk 0") for name in spans)
    assert "aten::mm" in spans
