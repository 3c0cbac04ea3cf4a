"""A job that goes on without a node that it has lost."""

from __future__ import annotations

import psutil
import pytest

from pipeline.reporting.metrics import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]


def test_with_min_nodes_a_lost_node_costs_no_requeue(job, calm):
    """Launcher and rank of a node are gone at once, as with the node."""
    elastic = job()
    elastic.submit("--no-kill", MIN_NODES="1")
    elastic.await_checkpoint()
    (rank,) = elastic.ranks_on("n2")
    for process in (rank.parent(), rank):
        process.kill()
    assert elastic.await_end() == ("COMPLETED", "0:0"), elastic.text()[-3000:]
    assert elastic.facts()["Restarts"] == "0"
    (recovery,) = [line for line in read_metrics(elastic.folder / "metrics.jsonl") if "recovery/attempt" in line]
    assert (recovery["recovery/attempt"], recovery["recovery/data_parallel_size"]) == (1, 1)
    losses, expected = elastic.losses(), calm.losses()
    assert losses.keys() == expected.keys()
    # One rank sums in another order than two: float32's rounding grows, to 2e-6 in 200 steps.
    for steps, rel in ((50, 1e-6), (200, 1e-5)):
        assert [losses[step] for step in range(1, steps + 1)] == pytest.approx(
            [expected[step] for step in range(1, steps + 1)], rel=rel
        )
    assert not psutil.pid_exists(rank.pid)
