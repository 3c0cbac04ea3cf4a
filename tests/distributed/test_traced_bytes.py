"""The bytes that a trace counts are the bytes of tensors that live in processes which exist."""

from __future__ import annotations

import pytest

from tests.pipeline.tracing import cases

LAYOUTS = {
    "one process": (1, "bptt.recompute=selective train.precision=bf16"),
    "one process, deltanet": (1, "model.memory.rule=deltanet model.memory.write_gate=sigmoid model.qk_norm=true"),
    "data, layer": (2, "bptt.recompute=layer model.memory.rule=linear"),
    "tensor, sequence parallel": (2, "parallel.tensor=2 parallel.sequence_parallel=true train.precision=bf16"),
    "pipeline, window, probes": (2, "parallel.pipeline=2 bptt.recompute=window train.probes_per_window=2"),
    "context": (2, "parallel.context=2 model.memory.rule=gated_deltanet train.segments_per_window=8"),
    "tensor x pipeline": (
        4,
        "parallel.tensor=2 parallel.pipeline=2 model.memory.rule=gated_deltanet bptt.recompute=selective",
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_traced_peaks_are_those_of_real_processes(pools, tracing_process, name):
    world, settings = LAYOUTS[name]
    measured = dict(pools.run(world, cases.measured_bytes, settings=settings))
    for rank in {0, world - 1}:
        traced = tracing_process(cases.traced_bytes, world=world, rank=rank, settings=settings)
        print(f"{name}, rank {rank}: traced {sum(traced.values()):,}, measured {measured[rank]:,}, {traced}")
        assert sum(traced.values()) == pytest.approx(measured[rank], rel=0.05)


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_plan_is_what_a_step_needs(pools, tracing_process, name):
    """The whole step, reduction and update included: planned, traced and measured."""
    world, settings = LAYOUTS[name]
    measured = dict(pools.run(world, cases.measured_step, settings=settings))
    for rank in {0, world - 1}:
        planned, traced = tracing_process(cases.planned_and_traced_step, world=world, rank=rank, settings=settings)
        print(f"{name}, rank {rank}: planned {planned:,}, traced {traced:,}, measured {measured[rank]:,}")
        assert traced == pytest.approx(measured[rank], rel=0.01)
        assert planned == pytest.approx(measured[rank], rel=0.1)
