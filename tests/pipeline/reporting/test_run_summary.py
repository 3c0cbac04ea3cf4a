"""`infini inspect RUN`: a dozen numbers that matter, in people's units."""

from __future__ import annotations

import json
import re

import pytest

from launch.cli import main
from pipeline.config.load import load_config, save_config
from tests.pipeline.reporting.test_diagnosis import STEPS

SETTINGS = ["name=a run [named]", "train.steps=1600", "train.lanes=8", "train.segments_per_window=8"]
SETTINGS += ["model.segment_length=256"]


def write_run(folder, *, first_version=False, **changes):
    layer = "memory_layer_{layer:02d}/{quantity}" if first_version else "{quantity}/layer_{layer:02d}"
    folder.mkdir()
    save_config(load_config(None, [*SETTINGS, f"run_dir={folder}"]), folder / "config.yaml")
    with open(folder / "metrics.jsonl", "w") as file:
        for number, step in enumerate(STEPS):
            record = {
                "step": step,
                "time": 1.7e9 + 3600 * number,
                "loss/train": 2.302585,
                "loss/answer": 0.5,
                "progress/tokens": 16384 * step,
                "progress/skipped_steps": 2,
                "optimizer/learning_rate": 1e-3,
                "optimizer/gradient_norm": 0.51,
                "speed/tokens_per_s": 8192.0,
                "speed/mfu": 0.31,
                "speed/step_s": 0.01 if first_version else 2.0,
                "memory/process_bytes" if first_version else "system/process_bytes": 3 * 2**30,
            }
            for quantity, values in (("share_of_output", (0.1, 0.3)), ("read_variation", (0.01, 0.01))):
                record |= {layer.format(layer=i, quantity=quantity): value for i, value in enumerate(values)}
            file.write(json.dumps(record | changes) + "\n")
    return folder


def inspect(capsys, folder):
    code = main(["inspect", str(folder)])
    return code, re.sub(" +", " ", capsys.readouterr().out)


@pytest.mark.parametrize("first_version", [False, True])
def test_numbers_that_matter(tmp_path, capsys, first_version):
    code, out = inspect(capsys, write_run(tmp_path / "run", first_version=first_version))
    assert code == 0
    for line in (
        "a run [named], by its last metrics",
        "step 800 of 1,600 (50 %)",
        "tokens 13.1 M (13,107,200)",
        "loss 2.3026 nats per token (perplexity 10)",
        "loss of answers 0.5000 nats per token (perplexity 1.65)",
        "learning rate 1.00e-03",
        "steps skipped 2",
        "tokens per second 8,192, MFU 31 %",
        "seconds per step 2",
        "time left at this pace 26m40s",  # 800 steps of 16,384 tokens
        "memory's part of the output 20 % (10 to 30 % over 2 layers)",
        "largest process 3.00 GiB",
    ):
        assert any(found.strip() == line for found in out.splitlines()), (line, out)
    assert "memory: reads are near constant" in out
    assert f"all 16 numbers are in {tmp_path}/run/metrics.jsonl" in out


def test_a_loss_that_is_no_number_is_not_hidden_by_the_one_before(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(
            '{"step": 801, "time": 1e300, "loss/train": null, "progress/tokens": null, "nonfinite": ["loss/train"]}\n'
        )
        file.write("not a record\n")
    code, out = inspect(capsys, folder)
    assert code == 0
    assert "loss nan nats per token" in out and "step 801 of 1,600" in out
    assert "1 lines are no records and were left out" in out


def test_a_run_that_has_not_begun(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    code, out = inspect(capsys, folder)
    assert code == 0 and "no metrics yet" in out


def test_a_broken_configuration_is_damage_and_hides_nothing_else(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").write_text("train: {stepz: 3}\n")
    code, out = inspect(capsys, folder)
    assert code == 1
    assert "step 800\n" in out and "tokens per second 8,192" in out
    assert "DAMAGED" in out and "config.yaml" in out and "stepz" in out
