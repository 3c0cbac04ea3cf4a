"""A rank that is slower than the others is named, with its host; transfers and waiting are nobody's own time."""

from __future__ import annotations

import socket
import time

import pytest
import torch.distributed as dist

from pipeline.reporting.metrics import read_metrics
from tests.distributed.cases import finish, make_trainer
from tests.prepared import write_set

pytestmark = pytest.mark.distributed

DELAY_S = 0.1


def train_with_a_slow_rank(folder: str, data: str, overrides: list[str], slow: int) -> None:
    trainer = make_trainer(folder, data, overrides)
    trainer.start(None)
    if dist.get_rank() == slow:
        execute = trainer.stage.forward

        def late(*arguments, **options):
            time.sleep(DELAY_S)
            return execute(*arguments, **options)

        trainer.stage.forward = late
    while trainer.progress.step < 4:
        trainer.train_step()
    finish(trainer)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_set(tmp_path_factory.mktemp("stragglers") / "set", [300] * 8))


def trained(pools, folder, data, *overrides):
    own = ["metrics.interval=2", *overrides]
    pools.run(2, train_with_a_slow_rank, folder=str(folder), data=data, overrides=own, slow=1)
    records = read_metrics(folder / "metrics.jsonl")
    return records, [record["ranks/own_s"] for record in records if "ranks/own_s" in record]


def test_a_slow_copy_of_the_model(pools, data, tmp_path):
    """It sleeps in its forward passes; the other one waits for it as long, which does not count."""
    records, own_s = trained(pools, tmp_path / "run", data)
    for first, second in own_s:
        assert second > DELAY_S and second - first > DELAY_S / 2
    told = [record for record in records if "ranks/slowest" in record]
    assert [record["ranks/slowest"] for record in told] == [1, 1]
    for record, times in zip(told, own_s, strict=True):
        assert [record["ranks/median_s"], record["ranks/slowest_s"]] == pytest.approx(times, rel=1e-3)
        assert record["ranks/slowdown"] == pytest.approx(times[1] / times[0], rel=1e-3)
    lines = (tmp_path / "run" / "console.log").read_text().splitlines()
    assert sum(f"RANK 1 ON {socket.gethostname()} IS SLOW: " in line for line in lines) == 1
    (start,) = [record["start"] for record in records if "start" in record]
    assert start["hosts"] == [socket.gethostname()] * 2


def test_a_slow_stage_has_other_work(pools, data, tmp_path):
    """The stage before it waits in its transfers: that is not its own time either, but the two are not compared."""
    records, own_s = trained(pools, tmp_path / "run", data, "parallel.pipeline=2")
    passes = 4  # lanes, one at a time
    assert all(second > passes * DELAY_S > first for first, second in own_s) and len(own_s) == 2
    assert not any("ranks/slowest" in record for record in records)
