"""Exact gradients: chunks over pipeline stages against one autograd graph over the whole window, in float64."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from model.sharding import unshard
from tests.distributed import bptt_cases

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-12
RULES = {
    "linear": ["model.memory.rule=linear"],
    "delta": ["model.memory.rule=delta", "model.memory.write_gate=hard"],
    "deltanet": ["model.memory.rule=deltanet", "model.memory.write_gate=sigmoid"],
    "gated_deltanet": [
        "model.memory.rule=gated_deltanet",
        "model.memory.write_gate=hard",
        "model.memory.mix_gate=token",
    ],
    "gdn2": ["model.memory.rule=gdn2", "model.memory.write_gate=hard"],
    "sliding-convolution": [
        "model.memory.rule=delta",
        "model.local_context=sliding",
        "model.memory.short_convolution=true",
    ],
}


def whole(ranks: list[dict]) -> dict[str, torch.Tensor]:
    """Gradients, memory and losses of the whole model from those of the ranks."""
    sizes = [max(rank["place"][axis] for rank in ranks) + 1 for axis in range(4)]
    found: dict[str, torch.Tensor] = {}
    at = {rank["place"]: rank for rank in ranks}
    lanes: dict[tuple, dict[int, torch.Tensor]] = {}
    for data, context, stage in itertools.product(*map(range, sizes[:3])):
        group = [at[data, context, stage, tensor] for tensor in range(sizes[3])]
        for name, (_, partition, summed) in group[0]["gradients"].items():
            parts = [member["gradients"][name][0] for member in group]
            if partition.dim is not None:
                gradient = unshard(parts, partition)
            elif summed:
                gradient = sum(parts)
            else:
                gradient = parts[0]
                assert all(torch.equal(gradient, part) for part in parts), name
            # Sums over data and context parallelism, and over the two copies of a tied embedding.
            found[name] = found[name] + gradient if name in found else gradient
        for layer, field in group[0]["memory"]:
            carried = torch.cat([member["memory"][layer, field] for member in group], dim=1)
            own = lanes.setdefault(("memory", layer, field), {}).setdefault(data, carried)
            # Context ranks carry the same; but what stands before the next window's first token only the first one.
            assert torch.equal(own, carried) or field not in "Mz", f"{field} of layer {layer} on context rank {context}"
        if group[0]["loss"] is not None:
            losses = lanes.setdefault(("loss",), {})
            losses[data] = losses[data] + group[0]["loss"] if data in losses else group[0]["loss"]
    return found | {" ".join(map(str, key)): torch.cat(list(parts.values())) for key, parts in lanes.items()}


@pytest.fixture(scope="module")
def reference(pools):
    @functools.cache
    def reference(settings: tuple[str, ...]):
        return whole(pools.run(1, bptt_cases.one_graph, overrides=list(settings)))

    return reference


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0, f"{name} is zero: nothing is compared"
        difference = ((found[name] - value).norm() / value.norm()).item()
        assert difference <= TOLERANCE, f"{name} differs by {difference:.1e}"


RECOMPUTE = ["none", "selective", "layer", "window"]


def _with_stages() -> list:
    """On one stage everything. On two, and on four, whose middle ones both get and pass on, each rule and each way to
    recompute, in other pairs; the rest of those is slow."""
    pairs = {
        2: list(zip(RULES, itertools.cycle([*RECOMPUTE[1:], RECOMPUTE[0]]))),
        4: list(zip(RULES, itertools.cycle(RECOMPUTE))),
    }
    found = []
    for stages, rule, recompute in itertools.product([1, 2, 4], RULES, RECOMPUTE):
        is_slow = stages > 1 and (rule, recompute) not in pairs[stages]
        found.append(pytest.param(stages, rule, recompute, marks=[pytest.mark.slow] * is_slow))
    return found


@pytest.mark.parametrize(("stages", "rule", "recompute"), _with_stages())
def test_chunks_and_stages_give_the_gradients_of_one_graph(pools, reference, stages, rule, recompute):
    expected = reference(tuple(RULES[rule]))
    overrides = [*RULES[rule], f"parallel.pipeline={stages}", f"bptt.recompute={recompute}"]
    chunk_counts = [1, 2, 4, 8]
    per_rank = pools.run(stages, bptt_cases.by_schedule, overrides=overrides, chunk_counts=chunk_counts)
    for ranks in zip(*per_rank, strict=True):
        assert_same(whole(list(ranks)), expected)


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, ["train.lanes_per_microbatch=1"]),
        (1, ["train.lanes_per_microbatch=2", "model.tie_embeddings=false"]),
        (2, ["parallel.tensor=2"]),
        (2, ["parallel.tensor=2", "parallel.sequence_parallel=true", "bptt.recompute=window"]),
        (2, ["parallel.tensor=2", "parallel.sequence_parallel=true", "bptt.recompute=layer"]),
        (2, []),
        (2, ["parallel.pipeline=2", "parallel.layers_per_stage=[1,3]", "model.tie_embeddings=false"]),
        (2, ["parallel.pipeline=2", "train.lanes_per_microbatch=2", "bptt.recompute=window"]),
        (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence_parallel=true"]),
        (4, ["parallel.pipeline=2", "model.memory.skip_empty=false"]),
        (1, ["train.probes_per_window=4", "bptt.recompute=window"]),
        (2, ["parallel.pipeline=2", "model.memory.layers=[2]", "bptt.recompute=window"]),
        (2, ["parallel.tensor=2", "parallel.sequence_parallel=true", "model.memory.layers=[1,3]"]),
        (2, ["train.probes_per_window=8", "parallel.pipeline=2", "bptt.recompute=layer"]),
        (4, ["train.probes_per_window=4", "parallel.tensor=2", "parallel.sequence_parallel=true"]),
    ],
)
def test_other_layouts_give_the_gradients_of_one_graph(pools, reference, world, overrides):
    settings = [*RULES["delta"], *overrides]
    expected = reference((*RULES["delta"], *(s for s in overrides if s.startswith(("model.", "train.probes")))))
    per_rank = pools.run(world, bptt_cases.by_schedule, overrides=settings, chunk_counts=[1, 4])
    for ranks in zip(*per_rank, strict=True):
        assert_same(whole(list(ranks)), expected)


CONTEXT = ["parallel.context=2"]


@pytest.mark.parametrize(
    ("world", "rule", "overrides"),
    [
        *(pytest.param(2, rule, CONTEXT, marks=pytest.mark.slow) for rule in RULES),
        (4, "linear", ["parallel.context=4"]),
        (4, "sliding-convolution", ["parallel.context=4", "bptt.recompute=selective"]),
        (2, "deltanet", [*CONTEXT, "bptt.recompute=window"]),
        (2, "gated_deltanet", [*CONTEXT, "bptt.recompute=layer", "train.lanes_per_microbatch=1"]),
        (2, "delta", [*CONTEXT, "train.probes_per_window=8", "bptt.recompute=window"]),
        (4, "gated_deltanet", [*CONTEXT, "parallel.tensor=2", "parallel.sequence_parallel=true"]),
        (4, "sliding-convolution", [*CONTEXT, "parallel.tensor=2"]),
        (4, "delta", [*CONTEXT, "parallel.pipeline=2", "model.tie_embeddings=false"]),
        (4, "sliding-convolution", [*CONTEXT, "parallel.pipeline=2", "bptt.recompute=window"]),
        (4, "linear", [*CONTEXT, "train.probes_per_window=8"]),  # and two blocks of lanes
    ],
)
def test_parts_of_chunks_give_the_gradients_of_one_graph(pools, reference, world, rule, overrides):
    """The segments of every chunk over 2 and 4 context ranks."""
    expected = reference((*RULES[rule], *(s for s in overrides if s.startswith(("model.", "train.probes")))))
    counts = [1, 2] if "parallel.context=4" in overrides else [1, 4]
    per_rank = pools.run(world, bptt_cases.by_schedule, overrides=[*RULES[rule], *overrides], chunk_counts=counts)
    for ranks in zip(*per_rank, strict=True):
        assert_same(whole(list(ranks)), expected)


PACKED = ["data.packing=true"]


@pytest.mark.parametrize(
    ("world", "rule", "overrides"),
    [
        (1, "gated_deltanet", ["bptt.recompute=selective", "train.probes_per_window=4"]),
        (1, "sliding-convolution", ["bptt.recompute=layer"]),
        (2, "delta", ["parallel.pipeline=2", "bptt.recompute=window"]),
        (2, "sliding-convolution", ["parallel.tensor=2"]),
        (2, "gated_deltanet", [*CONTEXT, "train.probes_per_window=8"]),
        (2, "sliding-convolution", [*CONTEXT, "bptt.recompute=window"]),
        *(
            pytest.param(2, rule, layout, marks=pytest.mark.slow)
            for rule in RULES
            for layout in (["parallel.pipeline=2"], ["parallel.tensor=2", "parallel.sequence_parallel=true"], CONTEXT)
        ),
    ],
)
def test_packed_windows_have_the_gradients_of_one_graph(pools, reference, world, rule, overrides):
    """Documents share segments; that the graph is right for each of them is seen in tests/model/test_packing.py."""
    settings = [*RULES[rule], *PACKED, *overrides]
    expected = reference(tuple(s for s in settings if s.startswith(("model.", "data.", "train.probes"))))
    per_rank = pools.run(world, bptt_cases.by_schedule, overrides=settings, chunk_counts=[2])
    for ranks in zip(*per_rank, strict=True):
        assert_same(whole(list(ranks)), expected)


def test_parts_have_the_statistics_of_the_whole(pools):
    """Means over tokens and lanes; what is a ratio of sums is averaged over context ranks, as it is over chunks."""
    settings = [*RULES["gated_deltanet"], "bptt.chunks_per_window=2"]
    (whole,) = pools.run(1, bptt_cases.statistics, overrides=settings)
    overrides = [*settings, *CONTEXT, "parallel.tensor=2"]
    for found in pools.run(4, bptt_cases.statistics, overrides=overrides):
        assert found.keys() == whole.keys()
        for layer, expected in whole.items():
            for name, value in expected.items():
                ratio = name in ("memory_share", "read_variation")
                torch.testing.assert_close(
                    found[layer][name] * (2 if "histogram" in name else 1), value, rtol=0.2 if ratio else 1e-5, atol=0
                )


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, []),
        (1, ["bptt.recompute=layer", "model.tie_embeddings=false"]),
        (2, ["parallel.tensor=2"]),
        # The second rank's part of the vocabulary is nothing but padding.
        (2, ["parallel.tensor=2", "parallel.sequence_parallel=true", "model.vocab_size_multiple=256"]),
        (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence_parallel=true", "bptt.recompute=window"]),
    ],
)
@pytest.mark.parametrize("recompute_logits", ["true", "false"])
def test_blocks_of_logits_give_the_gradients_of_one_graph(pools, reference, world, overrides, recompute_logits):
    expected = reference((*RULES["delta"], *(s for s in overrides if s.startswith("model."))))
    settings = [*RULES["delta"], *overrides, f"bptt.recompute_logits={recompute_logits}"]
    per_rank = pools.run(world, bptt_cases.by_small_blocks, overrides=settings, chunk_counts=[4])
    for ranks in zip(*per_rank, strict=True):
        assert_same(whole(list(ranks)), expected)


def test_plain_transformer_too(pools, reference):
    settings = ["model.memory.rule=none"]
    ranks = pools.run(2, bptt_cases.by_schedule, overrides=[*settings, "parallel.pipeline=2"], chunk_counts=[4])
    assert_same(whole([rank[0] for rank in ranks]), reference(tuple(settings)))


@pytest.mark.parametrize("chunks", [1, 4])
def test_cutting_the_gradient_would_show(pools, reference, chunks):
    """The comparison has teeth: with reads that are detached the gradients are wrong."""
    overrides = [*RULES["delta"], "bptt.gradient=detached"]
    (rank,) = pools.run(1, bptt_cases.by_schedule, overrides=overrides, chunk_counts=[chunks])
    with pytest.raises(AssertionError, match="differs by"):
        assert_same(whole([rank[0]]), reference(tuple(RULES["delta"])))


@pytest.mark.parametrize("recompute", ["none", "window"])
@pytest.mark.parametrize("chunks", [1, 2, 8])
@pytest.mark.parametrize("gradient", ["full", "detached"])
@pytest.mark.parametrize("rule", RULES)
def test_truncation_is_exact(pools, rule, gradient, chunks, recompute):
    """The last segment's loss reaches the inputs of its own window with `full`, its own alone with `detached`, and
    never those of the window before, whose memory it reads."""
    overrides = [*RULES[rule], f"bptt.gradient={gradient}", f"bptt.recompute={recompute}"]
    overrides += [f"bptt.chunks_per_window={chunks}"]
    (found,) = pools.run(1, bptt_cases.input_gradients, overrides=overrides)
    assert not found["carries_graph"]
    reached = [largest > 0 for largest in found["largest"]]
    assert reached == [False] * 8 + ([True] * 8 if gradient == "full" else [False] * 7 + [True])
