"""The loss of each set of a mixture in a run's metrics: the same on every layout, and their mean is the whole loss."""

from __future__ import annotations

import json

import pytest

from tests.distributed.runs import Run
from tests.prepared import write_set

pytestmark = pytest.mark.distributed

LAYOUTS = [
    (1, []),
    (2, ["parallel.pipeline=2", "bptt.chunks_per_window=2", "bptt.recompute=window"]),
    (2, ["parallel.context=2", "bptt.chunks_per_window=2"]),
]
"""Processes, and settings; the first one is what the others are compared with."""


@pytest.mark.parametrize("packing", ["false", "true"])
def test_losses_by_set_and_by_segment_on_every_layout(pools, tmp_path, packing):
    paths = [
        write_set(tmp_path / name, lengths, answers=False)
        for name, lengths in (("short", [17, 9, 30, 64, 21]), ("long", [500, 250]))
    ]
    sets = f"data.sets=[{{path: {paths[0]}, weight: 2.0}}, {{path: {paths[1]}}}]"
    settings = [sets, f"data.packing={packing}", "train.steps=4", "metrics.interval=1"]
    found = []
    for number, (nproc, layout) in enumerate(LAYOUTS):
        run = Run(tmp_path / f"run_{number}", paths[0], *settings, *layout, nproc=nproc)
        run.train_in(pools)
        lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
        found.append([line for line in lines if "loss/train" in line])
    expected, *others = found
    assert len(expected) == 4 and {"loss_by_set/short", "loss_by_set/long"} <= set().union(*expected)
    tokens = {"short": 0.0, "long": 0.0}
    for line in expected:
        assert (line["data/padded_share"] == 0) is (packing == "true")
        # What each set has given in this step, of all that it has given.
        seen = {name: line[f"data/share/{name}"] * line["progress/tokens"] for name in tokens}
        weights = {name: seen[name] - tokens[name] for name in tokens}
        parts = [line[f"loss_by_set/{name}"] * weight for name, weight in weights.items() if round(weight)]
        assert sum(parts) / sum(weights.values()) == pytest.approx(line["loss/train"], rel=1e-6)
        tokens = seen
    for lines in others:
        for line, one in zip(lines, expected, strict=True):
            names = {name for name in one if name.startswith(("loss", "data/share"))}
            assert {name: line[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-5)
