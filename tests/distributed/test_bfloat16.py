"""bfloat16 matrices over float32 masters: bytes, traffic, sums, checkpoints, and the losses of float32."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.distributed import bfloat16_cases
from tests.prepared import write_set

pytestmark = pytest.mark.distributed

BF16, FP32 = "train.precision=bf16", "train.precision=fp32"
STEPS = 6
LAYOUTS = {
    "zero1": (2, ["parallel.zero_stage=1"]),
    "zero2": (2, ["parallel.zero_stage=2", "bptt.recompute=selective"]),
    "zero3": (2, ["parallel.zero_stage=3", "bptt.recompute=window"]),
    "tensor": (2, ["parallel.tensor=2", "parallel.sequence_parallel=true"]),
    "pipeline": (2, ["parallel.pipeline=2"]),
}
MODEL = ["model.qkv_bias=true", "model.memory.mix_gate=token", "model.memory.write_gate=sigmoid"]
TRAINABLE = "train.trainable=['*.attention.*', 'layers.3.*norm*']"


@pytest.fixture(scope="module")
def runs(pools, tmp_path_factory):
    """Train some steps and return what rank 0 found, with the run's folder; the same run is made once."""
    folder = tmp_path_factory.mktemp("bfloat16")
    data = str(write_set(folder / "set", [37, 500, 130, 64, 250, 90, 17, 400], questions=True))
    count, known = itertools.count(), {}

    def run(world: int, *overrides: str, steps: int = STEPS, **options):
        key = (world, overrides, steps, *options.items())
        if key not in known:
            own = {"folder": str(folder / f"run{next(count)}"), "data": data, "steps": steps}
            overrides = [*MODEL, "bptt.chunks_per_window=4", "train.steps=20", *overrides]
            ranks = pools.run(world, bfloat16_cases.examine, **own, overrides=overrides, **options)
            # Out of the memory that is shared with the ranks: each of those tensors holds a file open.
            tensors = {what: {n: x.clone() for n, x in ranks[0].pop(what).items()} for what in ("start", "tensors")}
            known[key] = ranks[0] | tensors | {"folder": own["folder"], "ranks": ranks}
        return known[key]

    return run


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], x) for name, x in expected.items())


CONTEXT = {"context": (2, ["parallel.context=2", "bptt.chunks_per_window=2", "parallel.zero_stage=2"])}


@pytest.mark.parametrize("layout", LAYOUTS | CONTEXT)
def test_layouts_stay_near_one_process(runs, layout):
    """Rounding differs between layouts, by what 8 bits of mantissa can do and no more."""
    expected, exact = runs(1, BF16), runs(1, FP32)
    world, overrides = (LAYOUTS | CONTEXT)[layout]
    found = runs(world, BF16, *overrides)
    assert found["losses"] == pytest.approx(expected["losses"], rel=3e-3)
    assert found["norms"] == pytest.approx(expected["norms"], rel=5e-2)
    assert found["losses"] == pytest.approx(exact["losses"], rel=3e-3)
    assert found["losses"] != exact["losses"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masters_begin_as_in_float32_and_the_matrices_are_their_rounding(runs, layout):
    world, overrides = LAYOUTS[layout]
    found = runs(world, BF16, *overrides)
    assert same(found["start"], runs(1, FP32)["start"])
    assert any(not torch.equal(x, x.bfloat16().float()) for x in found["start"].values())
    assert all(rank["rounded"] for rank in found["ranks"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unsharded_bytes_of_a_parameter(runs, layout):
    """2 of the matrix and 4 of its gradient's sum; under ZeRO 3 the matrix is shared out, too."""
    world, overrides = LAYOUTS[layout]
    matrix = 2 / world if layout == "zero3" else 2
    for rank in runs(world, BF16, *overrides)["ranks"]:
        elements, held = rank["unsharded"][torch.bfloat16]
        assert held / elements == pytest.approx(4 + matrix, abs=1e-3)
        others, held = rank["unsharded"][torch.float32]
        assert held <= 8 * others + 64 and others < 0.04 * elements
        assert rank["unsharded"].keys() == {torch.bfloat16, torch.float32}
    fp32 = runs(1, FP32)["unsharded"]
    assert fp32.keys() == {torch.float32} and fp32[torch.float32][1] == 8 * fp32[torch.float32][0]


@pytest.mark.parametrize("layout", ["zero1", "zero3"])
def test_gathered_bytes_are_halved_and_gradients_travel_in_float32(runs, layout):
    world, overrides = LAYOUTS[layout]
    found, before = (runs(world, precision, *overrides) for precision in (BF16, FP32))
    large, small = (found["unsharded"][dtype][0] for dtype in (torch.bfloat16, torch.float32))
    now, then = (summed(run["traffic"], "allgather") for run in (found, before))
    assert now[torch.bfloat16] / 2 + now[torch.float32] / 4 == pytest.approx(then[torch.float32] / 4, rel=1e-2), (
        "padding"
    )
    assert sum(now.values()) < 0.55 * sum(then.values())
    own = 4 * (large + small) / (2 if layout == "zero3" else 1)
    reduced = summed(found["traffic"], "reduce")
    assert reduced[torch.float32] == pytest.approx(own, rel=2e-2)
    assert torch.bfloat16 not in reduced


def summed(traffic: dict, kind: str) -> dict[torch.dtype, int]:
    """Bytes of a kind of collective by precision."""
    found = dict.fromkeys((dtype for operation, dtype in traffic if kind in operation), 0)
    for (operation, dtype), size in traffic.items():
        if kind in operation:
            found[dtype] += size
    return found


@pytest.mark.parametrize("layout", ["zero2", "zero3", pytest.param("tensor", marks=pytest.mark.slow)])
def test_resumed_run_is_the_run_that_never_stopped(runs, layout):
    world, overrides = LAYOUTS[layout]
    first = runs(world, BF16, *overrides, steps=3, save=True)
    assert layout == "zero3" or all(rank["evaluated"] for rank in first["ranks"])
    resumed = runs(world, BF16, *overrides, steps=3, resume=first["folder"])
    whole = runs(world, BF16, *overrides)
    assert first["losses"] + resumed["losses"] == whole["losses"]
    assert same(resumed["tensors"], whole["tensors"])


@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_checkpoints_are_interchangeable(runs, layout):
    """bfloat16 to float32, there to bfloat16 and on: what is saved is exact, whoever loads it and wherever."""
    world, overrides = LAYOUTS[layout]
    first = runs(world, BF16, *overrides, TRAINABLE, steps=3, save=True)
    masters = {name: x for name, x in first["tensors"].items() if name.split("/")[0] in ("master", "exp_avg")}
    assert any(not torch.equal(x, x.bfloat16().float()) for name, x in masters.items() if "mlp" in name)
    wide = runs(1, FP32, TRAINABLE, steps=0, resume=first["folder"], save=True)
    assert same({name: wide["start"][name] for name in masters}, masters)
    back = runs(world, BF16, *overrides, TRAINABLE, steps=3, resume=wide["folder"])
    straight = runs(world, BF16, *overrides, TRAINABLE, steps=3, resume=first["folder"])
    assert same(back["start"], first_state(first)) and same(back["tensors"], straight["tensors"])
    assert back["losses"] == straight["losses"]


def first_state(found: dict) -> dict:
    return {
        name: x for name, x in found["tensors"].items() if name.split("/")[0] in ("master", "exp_avg", "exp_avg_sq")
    }


@pytest.mark.parametrize(
    ("layout", "frozen"),
    [(layout, TRAINABLE) for layout in ("zero2", "zero3", "tensor")]
    + [(layout, "train.freeze_backbone_steps=3") for layout in ("zero1", "pipeline")],
)
def test_what_is_not_trained_stays_exactly(runs, layout, frozen):
    world, overrides = LAYOUTS[layout]
    found, expected = runs(world, BF16, *overrides, frozen, steps=3, save=True), runs(1, BF16, frozen, steps=3)
    initial = runs(1, FP32)["start"]
    name = "master/layers.1.mlp.linear_fc1.weight"
    assert torch.equal(found["tensors"][name], initial[name])
    assert all(rank["rounded"] for rank in found["ranks"])
    assert found["losses"] == pytest.approx(expected["losses"], rel=3e-3)
    moved = {name for name, x in found["start"].items() if not torch.equal(x, found["tensors"][name])}
    expected_moved = {name for name, x in expected["start"].items() if not torch.equal(x, expected["tensors"][name])}
    assert moved == expected_moved and moved
