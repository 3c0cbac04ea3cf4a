"""Under bfloat16 the memory is float32 in both directions, and everything else is bfloat16 in both directions."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import precision_cases
from tests.distributed.precision_cases import PRODUCTS

pytestmark = pytest.mark.distributed

RULES = {
    "linear": ["model.memory.rule=linear", "model.memory.write_gate=sigmoid"],
    "delta": ["model.memory.rule=delta", "model.memory.write_gate=hard", "model.local_context=sliding"],
    "deltanet": ["model.memory.rule=deltanet", "model.memory.short_convolution=true"],
    "gated_deltanet": ["model.memory.rule=gated_deltanet", "model.memory.mix_gate=token"],
}
BF16 = ["train.precision=bf16"]


@pytest.fixture(scope="module")
def run(pools):
    def run(world, rule, *overrides, chunks=2):
        return pools.run(world, precision_cases.run_window, overrides=[*RULES[rule], *BF16, *overrides], chunks=chunks)

    return run


@pytest.mark.parametrize(
    ("world", "layout"),
    [(1, []), (2, ["parallel.tensor=2", "parallel.sequence_parallel=true"]), (2, ["parallel.pipeline=2"])],
    ids=["one", "tensor", "pipeline"],
)
@pytest.mark.parametrize("rule", RULES)
def test_memory_goes_back_in_float32_and_the_rest_in_bfloat16(run, rule, world, layout):
    for rank in run(world, rule, *layout):
        low = {entry for entry in rank["in_memory"] if entry[2] != torch.float32}
        assert not low, f"in the backward pass of the memory: {sorted(map(str, low))}"
        assert any(operation in PRODUCTS for _, operation, _ in rank["in_memory"])
        high = {entry for entry in rank["elsewhere"] if entry[1] in PRODUCTS and entry[2] != torch.bfloat16}
        assert not high, f"matrix products outside of the memory: {sorted(map(str, high))}"
        assert any(operation in PRODUCTS for _, operation, _ in rank["elsewhere"])


@pytest.mark.parametrize("recompute", ["selective", "layer", "window"])
def test_recomputation_changes_no_number_under_bfloat16(run, recompute):
    expected = run(1, "gated_deltanet")[0]["gradients"]
    found = run(1, "gated_deltanet", f"bptt.recompute={recompute}")[0]["gradients"]
    assert [name for name, gradient in expected.items() if not torch.equal(found[name], gradient)] == []
