"""A run at W&B: the numbers of `metrics.jsonl` under their names, one run over all starts."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from pipeline.config.load import ConfigError, load_config
from pipeline.config.schema import WandbConfig
from pipeline.config.validate import validate
from pipeline.reporting.metrics import MetricsWriter, read_metrics
from pipeline.reporting.wandb_run import WandbRun, run_id

SETTINGS = ["data.sets=[{path: nowhere}]", "train.steps=100", "metrics.wandb.project=reading"]


def test_the_id_stays_with_the_folder(tmp_path):
    first = run_id(tmp_path)
    assert run_id(tmp_path) == first and len(first) == 8
    (tmp_path / "other").mkdir()
    assert run_id(tmp_path / "other") != first
    (tmp_path / "wandb_run_id").write_text("../../etc")
    with pytest.raises(ValueError, match="wandb_run_id holds no run id"):
        run_id(tmp_path)


def test_a_project_without_the_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"metrics.wandb.project = reading: .*pip install 'infini-pretrain\[wandb\]'"):
        validate(load_config(None, SETTINGS))
    validate(load_config(None, SETTINGS), data_exists=False)


def test_what_is_written_offline_is_one_run(tmp_path):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed (pip install 'infini-pretrain[wandb]')")
    config = WandbConfig(project="reading", mode="offline")
    for start, loss in ((None, 2.5), (1, 2.25)):
        writer = MetricsWriter(
            tmp_path, tensorboard=False, resume_step=start, sinks=[lambda: WandbRun(config, tmp_path, "a run")]
        )
        writer.settings(0, {"train": {"steps": 3}}, "train: {steps: 3}")
        writer.scalars(1 if start is None else 2, {"loss/train": loss, "mix_gate/layer_00": 0.5})
        writer.histogram(2, "memory/mix_gate_histogram", np.linspace(0, 1, 50))
        writer.text(2, "run", "- layout: tensor 1")
        writer.close()
    wandb.teardown()  # as the end of a process does: W&B's own process has written all of it then
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert {folder.name.rpartition("-")[2] for folder in runs} == {run_id(tmp_path)} and len(runs) in (1, 2)
    logged = [record for folder in runs for record in history(next(folder.glob("*.wandb")))]
    curve = [(json.loads(r["step"]), json.loads(r["loss/train"])) for r in logged if "loss/train" in r]
    assert curve == [
        (r["step"], r["loss/train"]) for r in read_metrics(tmp_path / "metrics.jsonl") if "loss/train" in r
    ]
    assert curve == [(1, 2.5), (2, 2.25)]
    assert any(name.startswith("memory/mix_gate_histogram") for record in logged for name in record)


def history(path):
    """What `run.log` has put into a `.wandb` file, which is a log of LevelDB's kind behind 7 bytes of W&B's: blocks of
    32 KiB, in them pieces with a checksum, a length and a type (1 whole, 2 first, 3 middle, 4 last)."""
    from wandb.proto import wandb_internal_pb2

    contents, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(contents):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", contents, place)
        record += contents[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            found = wandb_internal_pb2.Record.FromString(record)
            if found.WhichOneof("record_type") == "history":
                yield {item.key or "/".join(item.nested_key): item.value_json for item in found.history.item}
            record = b""
