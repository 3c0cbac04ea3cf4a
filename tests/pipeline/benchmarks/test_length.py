"""Where full attention stops: by what the last length took."""

from __future__ import annotations

from pipeline.benchmarks.alternating import spread
from pipeline.benchmarks.length import FULL, TrainingCost, TrainingMemory, lengths_within

GIB = 2**30


def cost(tokens: int) -> TrainingCost:
    """A second and a GiB per thousand tokens, and the square of it in time."""
    thousands = tokens / 1000
    memory = TrainingMemory(GIB, int(GIB * (1 + thousands)), None)
    return TrainingCost(FULL, tokens, spread([thousands**2 / tokens]), None, memory)


def test_it_stops_before_a_length_that_takes_too_long():
    costs, why = lengths_within([1000, 2000, 4000, 8000], cost, limit_s=17, limit_bytes=100 * GIB)
    assert [c.tokens for c in costs] == [1000, 2000, 4000]
    assert why == "8,000 tokens would take about 64 s a time (limit 17 s)"


def test_it_stops_before_a_length_that_takes_too_much_memory():
    costs, why = lengths_within([1000, 2000, 4000], cost, limit_s=1e6, limit_bytes=3 * GIB)
    assert [c.tokens for c in costs] == [1000, 2000]
    assert why == "4,000 tokens would take about 4.0 GiB (limit 3.0 GiB)"


def test_without_reason_it_does_not_stop():
    costs, why = lengths_within([1000, 2000], cost, limit_s=1e6, limit_bytes=1e6 * GIB)
    assert len(costs) == 2 and why is None
