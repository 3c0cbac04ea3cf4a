"""Nodes that are lost and nodes that come: the run goes on with those that are there, and is the one nobody disturbed.

A launcher with its rank is a node.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from data.lanes.loader import build_loader
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.config.load import load_config
from pipeline.reporting.metrics import read_metrics
from tests.distributed import cases
from tests.distributed.pool import _free_port
from tests.distributed.runs import ROOT, Run, wait_for
from tests.prepared import write_set

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

STEPS = ("train.steps=2000", "checkpoint.interval=5", "metrics.interval=1", "train.precision=fp64")
"""A run that is stopped before its end. How many steps it takes depends on the machine: the rounding of float32, which
differs with the number of ranks, would grow with them."""


class ElasticRun(Run):
    """A run whose nodes are started one by one."""

    def __init__(self, folder: Path, data: Path, nodes: str, *overrides: str) -> None:
        super().__init__(folder, data, *overrides)
        self.nodes, self.batches = nodes, folder.with_suffix(".batches")
        self.launchers: list[psutil.Popen] = []
        self.endpoint = f"127.0.0.1:{_free_port()}"
        folder.with_suffix(".yaml").write_text("{}\n")

    def start_node(self) -> psutil.Popen:
        own = {"NNODES": self.nodes, "RDZV_ENDPOINT": self.endpoint, "NPROC": "1", "OMP_NUM_THREADS": "1"}
        own |= {"PYTHON": sys.executable, "MODULE": "tests.distributed.elastic_rank"}
        own |= {"STEP_S": "0.2", "BATCHES": str(self.batches)}
        inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "INFINI_DEBUG")}
        command = ["bash", str(ROOT / "launch" / "torchrun.sh"), "train", str(self.folder.with_suffix(".yaml"))]
        with open(self.output, "a") as output:
            launcher = psutil.Popen(
                [*command, *self.overrides], env=inherited | own, stdout=output, stderr=subprocess.STDOUT
            )
        self.launchers.append(launcher)
        return launcher

    def is_there(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", int(self.endpoint.rpartition(":")[2]))) == 0

    def lose(self, launcher: psutil.Popen) -> None:
        """The node is gone, with all that ran on it."""
        for process in [launcher, *launcher.children(recursive=True)]:
            process.kill()
        launcher.wait()

    def await_text(self, text: str) -> None:
        def there() -> bool:
            assert any(launcher.poll() is None for launcher in self.launchers), self.text()[-3000:]
            return text in self.text()

        wait_for(there, f"{text!r} in {self.output}")

    def close(self) -> None:
        for launcher in self.launchers:
            if launcher.poll() is None:
                self.lose(launcher)


@pytest.fixture
def data(tmp_path):
    return write_set(tmp_path / "set", [37, 500, 130, 64, 250, 90, 17, 400])


@pytest.fixture
def run(tmp_path, data):
    run = ElasticRun(tmp_path / "run", data, "1:2", *STEPS)
    yield run
    run.close()


def batches_read(run: ElasticRun) -> dict[int, dict[int, str]]:
    """Hash of what each lane read in each step. A step that was taken again has read the same."""
    found: dict[int, dict[int, str]] = {}
    for line in run.batches.read_text().splitlines():
        step, lane, digest = line.split()
        assert found.setdefault(int(step), {}).setdefault(int(lane), digest) == digest
    return found


def batches_of_one_process(run: ElasticRun, steps: int) -> dict[int, dict[int, str]]:
    config = load_config(None, run.overrides)
    loader = build_loader(
        config.data,
        lanes=config.train.lanes,
        first_lane=0,
        last_lane=config.train.lanes,
        segments_per_window=config.train.segments_per_window,
        segment_length=config.model.segment_length,
        seed=config.train.seed,
    )
    try:
        windows = [loader.next_batch() for _ in range(steps)]
    finally:
        loader.close()
    return {
        step: dict(zip(window.lane_ids.tolist(), map(str, window.digests), strict=True))
        for step, window in enumerate(windows, 1)
    }


def test_a_node_is_lost_and_another_one_comes(run, pools, tmp_path, data):
    """Two data-parallel ranks, one, two again: every step reads what it would have read, to the same loss."""
    first = run.start_node()
    wait_for(run.is_there, "the place to meet, which is the first node's")
    second = run.start_node()
    run.await_text("step 8/")  # three after the checkpoint, two before the next
    run.lose(second)
    run.await_text("recovered (attempt 1, without ")
    third = run.start_node()
    run.await_text("recovered (attempt 2, with ")
    (run.folder / "stop").touch()
    assert [first.wait(240), third.wait(240)] == [85, 85], run.text()[-3000:]

    metrics = read_metrics(run.folder / "metrics.jsonl")
    lost, joined = [line for line in metrics if "recovery/seconds" in line]
    assert [line["recovery/attempt"] for line in (lost, joined)] == [1, 2]
    assert [line["recovery/data_parallel_size"] for line in (lost, joined)] == [1, 2]
    tokens = {line["step"]: line["progress/tokens"] for line in metrics if "progress/tokens" in line}
    start = lost["step"] - 1
    reached = start + lost["recovery/steps_recomputed"]
    assert lost["recovery/tokens_recomputed"] == tokens[reached] - tokens[start]
    assert 0 < lost["recovery/steps_recomputed"] <= 10
    assert joined["recovery/steps_recomputed"] == 0  # they have saved before
    assert 0 < joined["recovery/seconds"] < 240 and 0 < lost["recovery/seconds"] < 240

    losses = run.losses()
    steps = max(losses)
    assert batches_read(run) == batches_of_one_process(run, steps)
    calm = pools.run(
        2, cases.train_steps, folder=str(tmp_path / "calm"), data=str(data), overrides=list(STEPS), steps=steps
    )[0]
    assert [losses[step] for step in sorted(losses)] == pytest.approx(calm["losses"], rel=1e-9)
    assert CheckpointReader(run.checkpoints / f"step_{steps:08d}").summary.layout.data == 2
