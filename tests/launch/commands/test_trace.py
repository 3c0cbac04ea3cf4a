"""`infini trace` and `infini plan --trace`: a step without a device, said in words and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pipeline.tracing.cases import SMALL, command

DEMO = str(Path(__file__).parents[3] / "configs" / "demo.yaml")
SETTINGS = [x for x in SMALL if not x.startswith("data.")]


def test_trace(tracing_process, tmp_path):
    file = tmp_path / "trace.json"
    arguments = [DEMO, *SETTINGS, "parallel.pipeline=2", "--world-size", "2", "--rank", "1", "--json", str(file)]
    arguments.append("--evaluation")
    code, out = tracing_process(command, arguments=["trace", *arguments])
    assert code == 0
    assert "rank 1 of 2" in out and "stage 1 of 2, 1 layers; by the plan the largest ranks are those of stage" in out
    assert "2 of 2 microbatches x 2 chunks" in out
    assert "(_measure), 1 x: once a step" in out and "NOT LISTED" not in out
    found = json.loads(file.read_text())
    launches = found["launches_per_layer_and_chunk"]
    parts = [launches[name] for name in ("forward", "recomputation", "backward")]
    assert launches["all"] == pytest.approx(sum(parts)) and launches["all"] > 100
    assert sum(found["at_peak_bytes"].values()) == found["peak_bytes"]
    assert all(read["reason"] for read in found["host_reads"])
    evaluation = found["evaluation"]
    assert "an evaluation between two steps: a batch of 64 documents" in out and "(count_right), 6 x: evaluation" in out
    assert all(read["reason"] for read in evaluation["host_reads"]) and evaluation["peak_bytes"] > 0
    assert {"group": "pipeline, forward", "kind": "recv", "calls": 4, "bytes": 4 * 2 * 16 * 32 * 4} in found[
        "collectives"
    ]


def test_plan_beside_trace(tracing_process):
    code, out = tracing_process(command, arguments=["plan", DEMO, *SETTINGS, "--world-size", "1", "--trace"])
    assert code == 0
    assert "rank 0, the largest by the estimate: the estimate beside a traced step (2 of 2 microbatches)" in out
    assert "estimate traced difference weights" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--world-size", "2", "--rank", "2"], "--rank 2 does not exist: 2 processes have the ranks 0 to 1"),
        (["--world-size", "3", "parallel.tensor=2"], "parallel.tensor"),
        (["--world-size", "1", "--microbatches", "3"], "--microbatches 3 is more than the 2 that a step has"),
    ],
)
def test_what_cannot_be_traced_is_said(capsys, arguments, message):
    from launch.cli import main

    assert main(["trace", DEMO, *SETTINGS, *arguments]) == 2
    assert message in capsys.readouterr().err
