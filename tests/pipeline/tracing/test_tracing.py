"""Nothing in a step meets a tensor of another device, and the host waits only where there is a reason given.

Everything runs in one process of its own, since a pretended device stays for good.
"""

from __future__ import annotations

import pytest

from pipeline.accounting.planner import LAUNCHES
from tests.distributed.pool import CaseFailed
from tests.pipeline.tracing import cases

STEPS = {
    "plain": (1, 0, "model.memory.rule=none train.precision=bf16"),
    "linear": (1, 0, "model.memory.rule=linear model.memory.write_gate=sigmoid bptt.recompute=selective"),
    "delta": (2, 1, "model.memory.write_gate=hard bptt.recompute=layer parallel.zero_stage=2 +statistics"),
    "delta, tensor": (2, 1, "parallel.tensor=2 parallel.sequence_parallel=true train.precision=bf16 +statistics"),
    "delta, first stage": (2, 0, "parallel.pipeline=2 train.probes_per_window=2 bptt.recompute=window"),
    "delta, last stage": (2, 1, "parallel.pipeline=2 train.probes_per_window=2 train.precision=bf16 +statistics"),
    "deltanet": (1, 0, "model.memory.rule=deltanet model.memory.mix_gate=token model.qk_norm=true +statistics"),
    "deltanet, both": (
        4,
        2,
        "model.memory.rule=deltanet model.memory.short_convolution=true parallel.tensor=2 parallel.pipeline=2 "
        "parallel.sequence_parallel=true bptt.recompute=selective train.precision=bf16",
    ),
    "gated_deltanet": (1, 0, "model.memory.rule=gated_deltanet train.precision=bf16 bptt.recompute=selective"),
    "delta_product": (1, 0, "model.memory.rule=delta_product train.precision=bf16 bptt.recompute=selective"),
    "gdn2": (1, 0, "model.memory.rule=gdn2 train.precision=bf16 bptt.recompute=selective"),
    "gated_deltanet, window": (
        1,
        0,
        "model.memory.rule=gated_deltanet model.memory.write_gate=sigmoid bptt.recompute=window +statistics",
    ),
    "sliding": (1, 0, "model.local_context=sliding train.probes_per_window=2 train.precision=bf16 +statistics"),
    "sliding, plain": (2, 1, "model.memory.rule=none model.local_context=sliding parallel.tensor=2"),
    "biases, zero 3": (2, 0, "model.qkv_bias=true model.memory.mix_gate=token parallel.zero_stage=3"),
    "context": (
        4,
        1,
        "parallel.context=4 model.memory.rule=gated_deltanet model.local_context=sliding bptt.chunks_per_window=1 "
        "train.probes_per_window=4 train.precision=bf16 bptt.recompute=layer +statistics",
    ),
    "detached": (1, 0, "bptt.gradient=detached bptt.recompute_logits=true train.write_gate_penalty=0.1"),
}


@pytest.fixture(scope="module")
def steps(tracing_process):
    return {
        name: tracing_process(cases.step, world=world, rank=rank, settings=row)
        for name, (world, rank, row) in STEPS.items()
    }


@pytest.mark.parametrize("name", STEPS)
def test_the_host_waits_only_where_a_reason_is_given(steps, name):
    assert steps[name]["unlisted"] == []
    # Nothing of a layer, the decoder or the schedule's operations: what is read is read once a step.
    inside = [read for read in steps[name]["reads"] if read.startswith(("model/", "data/"))]
    assert inside == []


def test_launches_are_told_apart(steps):
    assert steps["linear"]["in_layers"]["recomputation"] > 0
    assert steps["plain"]["in_layers"]["recomputation"] == 0
    for name, trace in steps.items():
        least = 0.9 if name == "detached" else 1.1  # nothing goes back through the memory's reads
        assert trace["in_layers"]["backward"] > least * trace["in_layers"]["forward"]
    # A layer runs again as a whole, or its attention alone.
    assert steps["delta"]["in_layers"]["recomputation"] == pytest.approx(
        steps["delta"]["in_layers"]["forward"], rel=0.25
    )


def test_collectives_are_told_by_their_group(steps):
    both = steps["deltanet, both"]["collectives"]
    assert {group for group, _ in both} >= {"tensor", "pipeline, forward", "pipeline, backward", "all"}
    # Microbatches x chunks: [16 / 2 tokens, 2 segments, 32 numbers of 2 bytes] to this stage, as much gradient back.
    size = 2 * 2 * (8 * 2 * 32 * 2)
    assert both["pipeline, forward", "recv"].bytes == size == both["pipeline, backward", "send"].bytes
    assert ("data", "reduce_scatter_base") in steps["biases, zero 3"]["collectives"]


def test_peaks_are_made_of_named_parts(steps):
    for trace in steps.values():
        assert sum(trace["at_peak"].values()) == trace["peak"]
        assert {"parameters", "optimizer"} <= trace["at_peak"].keys()
    assert "memory state" not in steps["plain"]["at_peak"]


@pytest.mark.parametrize("sabotage", ["item", "cpu"])
def test_a_value_that_a_layer_reads_is_seen(tracing_process, sabotage):
    found = tracing_process(cases.step, world=1, rank=0, settings="", sabotage=sabotage)
    assert len(found["unlisted"]) == 1 and found["unlisted"][0].startswith("tests/pipeline/tracing/cases.py:")


def test_a_shape_that_depends_on_values_is_an_error(tracing_process):
    with pytest.raises(CaseFailed, match=r"HostReadError: .*depends on values.*cases\.py:\d+ \(_asks_for_places\)"):
        tracing_process(cases.step, world=1, rank=0, settings="", sabotage="mask")


def test_tensors_of_two_devices_are_an_error(tracing_process):
    with pytest.raises(
        CaseFailed, match=r"MixedDevicesError: aten.mul.Tensor gets tensors of cpu and pretended:0.*cases"
    ):
        tracing_process(cases.step, world=1, rank=0, settings="", sabotage="device")


@pytest.mark.parametrize("settings", ["", "parallel.zero_stage=3 model.local_context=sliding train.precision=bf16"])
def test_a_checkpoint_is_copied_to_the_host(tracing_process, settings):
    places, unlisted = tracing_process(cases.snapshot, settings=settings)
    assert unlisted == []
    assert "pipeline/checkpoint/run_state.py own_tensors" in places


RULES = ["none", "delta", "deltanet", "gated_deltanet", "delta_product", "gdn2", "linear"]


EVALUATIONS = {
    "plain": (1, 0, "model.memory.rule=none train.precision=bf16"),
    "delta": (1, 0, "model.memory.rule=delta train.precision=bf16"),
    "deltanet, stages": (4, 3, "model.memory.rule=deltanet parallel.pipeline=2"),
    "gated_deltanet, tensor": (2, 1, "model.memory.rule=gated_deltanet parallel.tensor=2 train.precision=bf16"),
    "linear, zero 3": (2, 1, "model.memory.rule=linear parallel.zero_stage=3 train.precision=bf16"),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation(tracing_process, name):
    """The host waits once for what a batch loses (a copy for each way), and once for its answers; one copy of the model
    shares its answers out to two batches."""
    world, rank, settings = EVALUATIONS[name]
    found = tracing_process(cases.evaluation, world=world, rank=rank, settings=settings)
    assert found["unlisted"] == []
    ways = 1 if name == "plain" else 3
    assert found["reads"] == {
        "pipeline/evaluation/heldout.py segment_losses": ways,
        "pipeline/evaluation/answers.py count_right": 2 * ways if world == 1 or "tensor" in name else ways,
    }
    assert found["documents"] == 64 and found["windows"] > 3 * ways


@pytest.mark.parametrize(
    "rule", [*(f"rule={name}" for name in RULES), "rule=delta model.local_context=sliding model.memory.mix_gate=token"]
)
def test_generation(tracing_process, rule):
    found = tracing_process(cases.generation, settings=f"model.memory.{rule} train.precision=bf16")
    assert found["unlisted"] == found["reading"] == []
    assert found["reads_per_token"] == 1  # of all lanes together: the host must see whether a text has ended


def test_recorded_steps_and_drawn_tokens_cost_one_read(tracing_process):
    found = tracing_process(cases.generation, settings="model.memory.rule=delta", temperature=1.0, records=True)
    assert found["unlisted"] == [] and found["reads_per_token"] == 1


def test_a_plan_starts_as_many_kernels_as_a_layer(steps):
    """`LAUNCHES` is by rule and rounded: gates, normed queries and keys and more segments have some more."""
    for name in ("plain", "linear", "gated_deltanet", "delta_product", "gdn2"):
        rule = "none" if name == "plain" else name
        traced = steps[name]["in_layers"]
        forward, backward = LAUNCHES[rule]
        assert traced["forward"] == pytest.approx(forward, rel=0.25), name
        assert traced["backward"] == pytest.approx(backward, rel=0.25), name


CONTEXT = [
    f"{variant} train.segments_per_window={segments}"
    for variant in (
        "model.memory.rule=linear bptt.recompute=selective",
        "model.memory.rule=delta bptt.recompute=window",
        "model.memory.rule=gated_deltanet bptt.recompute=layer train.precision=bf16",
        "model.memory.rule=deltanet model.local_context=sliding train.precision=bf16",
    )
    for segments in (4, 64)
]


def test_what_context_ranks_exchange_is_planned_to_the_byte_and_does_not_grow_with_the_window(tracing_process):
    found = tracing_process(cases.context_traffic, context=2, settings=CONTEXT)
    for setting, (traced, planned) in found.items():
        assert traced == planned, setting
    for short, long in zip(CONTEXT[::2], CONTEXT[1::2], strict=True):
        assert found[short] == found[long], short
    assert all(traced > 0 for traced, _ in found.values())
