"""What a run says while it trains: on the screen from its first step, in metrics.jsonl and in TensorBoard."""

from __future__ import annotations

import re
from dataclasses import asdict

import pytest
import torch.distributed as dist
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from data.prepared.shards import PreparedSet
from pipeline.config.load import load_config
from pipeline.parallel.topology import initialize, shutdown
from pipeline.reporting.dashboard import LAYERS, LAYOUT, flatten
from pipeline.reporting.metrics import read_metrics
from pipeline.training import monitor
from pipeline.training.trainer import Trainer
from tests.distributed.cases import TINY
from tests.prepared import write_set

STEPS, INTERVAL = 5, 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one process: its folder, its configuration and what it printed."""
    folder = tmp_path_factory.mktemp("monitor")
    source = PreparedSet(write_set(folder / "set", [300] * 8))
    with open(folder / "set" / "train-000000.tar", "r+b") as file:
        for document in range(7):  # tokens that the vocabulary does not have
            file.seek(int(source._index.offset[document]) + 500)
            file.write(b"\xff\xff")
    own = [f"data.sets=[{{path: {folder}/set}}]", f"run_dir={folder}/run", "name=a run [named]"]
    own += [f"train.steps={STEPS}", f"metrics.interval={INTERVAL}", "metrics.memory_interval=2"]
    own += ["data.skip_bad_documents=true", "metrics.tensorboard=true", "model.memory.write_gate=hard"]
    config = load_config(None, [*TINY, *own])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patched:
        lines = []
        patched.setenv("LOCAL_RANK", "0")
        patched.setattr("pipeline.reporting.console._print_line", lambda console, text, style=None: lines.append(text))
        trainer = Trainer(config, initialize(tensor=1, pipeline=1, timeout_s=60))
        trainer.start(None)
        trainer.train()
        trainer.close()
    shutdown()
    return folder / "run", config, [line for line in lines if line.startswith("step ")]


def test_the_first_step_is_told_and_no_time_left_is_unknown(run):
    _, _, lines = run
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


def test_names_of_tensorboard_are_by_quantity(run):
    folder, _, _ = run
    tags = events(folder).Tags()["scalars"]
    groups = {tag.partition("/")[0] for tag in tags}
    assert groups == {
        *(
            "loss",
            "loss_by_segment",
            "optimizer",
            "progress",
            "speed",
            "system",
            "data",
            "checkpoint",
            "memory",
            "gradient_norm",
        ),
        *LAYERS,
    }
    assert [tag for tag in tags if tag.startswith("memory/")] == ["memory/write_gate"]
    for quantity in LAYERS:
        own = [tag for tag in tags if tag.startswith(f"{quantity}/")]
        assert own == [f"{quantity}/layer_{layer:02d}" for layer in range(4)]
    assert set(events(folder).Tags()["histograms"]) == {
        f"{gate}_gate_histogram/layer_{layer:02d}" for gate in ("mix", "write") for layer in range(4)
    }
    written = {name for record in read_metrics(folder / "metrics.jsonl") for name in record}
    assert set(tags) <= written


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
    content = found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(content)
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert list(charts)[:2] == ["loss", "tokens per second"]
    assert sum(map(len, LAYOUT.values())) == len(charts)
    shown = {
        title: [tag for tag in found.Tags()["scalars"] if any(re.match(expression, tag) for expression in expressions)]
        for title, expressions in charts.items()
    }
    assert all(shown.values()), shown
    assert shown["tokens per second"] == ["speed/tokens_per_s"]
    assert len(shown["seconds per step"]) == 4 and "speed/tokens_per_s" not in shown["seconds per step"]
    assert len(shown["mix_gate"]) == 4


def events(folder):
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}).Reload()


def test_a_cpu_has_no_device_memory_and_no_data_sheet(run):
    folder, _, _ = run
    names = {name for record in read_metrics(folder / "metrics.jsonl") for name in record}
    assert {name for name in names if name.startswith("system/")} == {"system/process_bytes"}
    assert "speed/mfu" in names and "speed/mfu_data_sheet" not in names


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
