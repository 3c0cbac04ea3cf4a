"""Every layout trains the same model: 20 float32 steps against one process, step by step, weight by weight."""

from __future__ import annotations

import functools
import itertools

import pytest

from tests.distributed import cases
from tests.prepared import write_set

pytestmark = pytest.mark.distributed

STEPS = 20
MODELS = {
    "delta": ["model.memory.rule=delta"],
    "delta-untied": ["model.memory.rule=delta", "model.tie_embeddings=false"],
    "linear": ["model.memory.rule=linear", "model.memory.beta_init=-1.0"],
    "linear-sigmoid-untied": [
        "model.memory.rule=linear",
        "model.memory.write_gate=sigmoid",
        "model.tie_embeddings=false",
    ],
    "deltanet-hard": [
        "model.memory.rule=deltanet",
        "model.memory.write_gate=hard",
        "model.memory.write_gate_bias=0.5",
        "train.write_gate_penalty=0.1",
    ],
    "gated_deltanet": [
        "model.memory.rule=gated_deltanet",
        "model.memory.write_gate=sigmoid",
        "model.memory.mix_gate=token",
        "model.memory.gate_floor=0.1",
        "model.qk_init=tied",
    ],
    "delta_product": [
        "model.memory.rule=delta_product",
        "model.memory.num_householder=3",
        "model.memory.write_gate=hard",
        "model.memory.write_gate_bias=0.5",
    ],
    "gdn2": ["model.memory.rule=gdn2", "model.memory.write_gate=hard", "model.memory.write_gate_bias=0.5"],
    "linear-convolution": [
        "model.memory.rule=linear",
        "model.memory.write_gate=hard",
        "model.memory.short_convolution=true",
        "model.qk_init=tied",
    ],
    "sliding": ["model.memory.rule=deltanet", "model.local_context=sliding"],
    "transformer-xl": ["model.memory.rule=none", "model.local_context=sliding"],
    "none": ["model.memory.rule=none"],
    "delta-bias-norms": ["model.qkv_bias=true", "model.qk_norm=true"],
    "some-layers": [
        "model.memory.layers=[3]",
        "model.memory.write_gate=hard",
        "model.local_context=sliding",
        "train.write_gate_penalty=0.1",
    ],
    "probes": ["model.memory.rule=delta", "train.probes_per_window=4"],
}
"""What is trained; each is compared with itself on one process."""


def row(layout, model, *, context=1, chunks=1, recompute="none", marks=(), **settings):
    """A line of the table. `layout`: tensor, pipeline, data, ZeRO stage."""
    tensor, pipeline, data, zero = layout
    overrides = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.zero_stage={zero}"]
    overrides += [f"bptt.chunks_per_window={chunks}", f"bptt.recompute={recompute}"]
    overrides += [f"parallel.context={context}"] if context > 1 else []
    overrides += [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    shared = [f"context{context}"] if context > 1 else []
    name = "-".join(
        [*map(str, layout), *shared, model, f"chunks{chunks}", recompute, *(k.split("__")[1] for k in settings)]
    )
    return pytest.param(tensor * pipeline * data * context, model, overrides, id=name, marks=marks)


SP = {"parallel__sequence_parallel": "true"}
SLOW = pytest.mark.slow
"""A row whose parts others of the default tests have: its rule, gates and recomputation on other layouts, its layout
with other models."""
ROWS = [
    row((1, 1, 1, 1), "delta", chunks=4),
    row((1, 1, 1, 1), "deltanet-hard", recompute="selective"),
    row((1, 1, 1, 2), "linear", chunks=4, recompute="layer"),
    row((1, 1, 1, 3), "delta-untied", chunks=4, recompute="window"),
    row((1, 1, 1, 1), "linear-sigmoid-untied", chunks=2, train__lanes_per_microbatch=2),
    row((2, 1, 1, 1), "delta"),
    row((2, 1, 1, 1), "linear", recompute="selective", bptt__recompute_logits="true", **SP),
    row((2, 1, 1, 1), "delta-bias-norms", chunks=4, **SP),
    row((1, 2, 1, 1), "delta-bias-norms", chunks=2, marks=SLOW),
    row((2, 1, 1, 1), "deltanet-hard", chunks=4, **SP),
    row((2, 1, 1, 1), "linear-sigmoid-untied", chunks=4, recompute="layer", marks=SLOW, **SP),
    row((1, 2, 1, 1), "delta", parallel__schedule="1f1b"),
    row((1, 2, 1, 1), "delta-untied", chunks=4, recompute="window"),
    row((1, 2, 1, 1), "deltanet-hard", chunks=4, parallel__layers_per_stage="[1,3]"),
    row((1, 2, 1, 1), "linear", chunks=4, recompute="layer", train__lanes_per_microbatch=2),
    row((1, 2, 1, 2), "none", chunks=4),
    row((2, 1, 1, 1), "gated_deltanet", chunks=2, **SP),
    row((1, 2, 1, 1), "gated_deltanet", chunks=4, recompute="selective", marks=SLOW),
    row((1, 1, 2, 3), "gated_deltanet", chunks=2),
    row((2, 1, 1, 1), "delta_product", chunks=2, **SP),
    row((2, 1, 1, 1), "gdn2", chunks=2, **SP),
    row((1, 2, 1, 1), "gdn2", chunks=4, recompute="selective", marks=SLOW),
    row((1, 1, 2, 3), "gdn2", context=2, chunks=2, marks=SLOW),
    row((2, 1, 1, 1), "linear-convolution", chunks=4, recompute="window", **SP),
    row((1, 2, 1, 1), "linear-convolution", chunks=4, marks=SLOW),
    row((1, 2, 1, 1), "some-layers", chunks=2),
    row((1, 1, 2, 3), "some-layers"),
    row((2, 1, 1, 1), "sliding", chunks=2, **SP),
    row((1, 2, 1, 1), "sliding", chunks=4, recompute="window", marks=SLOW),
    row((1, 2, 1, 1), "transformer-xl", chunks=2, marks=SLOW),
    row((1, 1, 2, 1), "delta", chunks=4, recompute="selective"),
    row((1, 1, 2, 1), "deltanet-hard", marks=SLOW),
    row((1, 1, 2, 2), "delta-untied", recompute="layer"),
    row((1, 1, 2, 2), "linear-sigmoid-untied", chunks=4, marks=SLOW),
    row((1, 1, 2, 3), "linear", chunks=4, recompute="window", marks=SLOW),
    row((1, 1, 2, 3), "deltanet-hard", bptt__recompute_logits="true"),
    row((2, 1, 1, 1), "gated_deltanet", chunks=2, recompute="selective", model__compile="true", **SP),
    row((1, 2, 1, 1), "delta", chunks=4, recompute="window", model__compile="true"),
    row((1, 1, 2, 3), "deltanet-hard", recompute="layer", model__compile="true"),
    row((2, 1, 1, 1), "delta-untied", recompute="selective", model__backend="onednn"),
    row((2, 1, 1, 1), "delta-bias-norms", chunks=2, model__backend="onednn", **SP),
    row((1, 1, 2, 3), "linear", chunks=2, model__backend="onednn"),
    row((2, 2, 1, 1), "delta-untied", chunks=2, **SP),
    row((1, 2, 2, 1), "deltanet-hard", chunks=4, recompute="window", marks=SLOW),
    row((1, 2, 2, 2), "delta", recompute="selective", marks=SLOW),
    row((2, 1, 2, 3), "linear-sigmoid-untied"),
    row((1, 1, 1, 1), "probes", chunks=4, recompute="window"),
    row((2, 1, 1, 1), "probes", recompute="layer", **SP),
    row((1, 2, 2, 1), "probes", chunks=2),
    row((1, 1, 1, 1), "deltanet-hard", context=2, chunks=2),
    row((1, 1, 1, 1), "sliding", context=4, recompute="window"),
    row((1, 1, 1, 1), "delta-bias-norms", context=4, recompute="selective", marks=SLOW),
    row((1, 1, 1, 2), "linear-convolution", context=2, recompute="layer", train__lanes_per_microbatch=2),
    row((1, 1, 1, 3), "gated_deltanet", context=2, chunks=2, recompute="window", marks=SLOW),
    row((1, 1, 1, 1), "probes", context=2, chunks=2),
    row((2, 1, 1, 1), "gated_deltanet", context=2, **SP),
    row((1, 2, 1, 1), "delta-untied", context=2, chunks=2, recompute="window"),
    row((1, 1, 2, 1), "linear-sigmoid-untied", context=2, chunks=2, marks=SLOW),
    row((1, 1, 2, 3), "delta", context=2),
    row((1, 1, 1, 1), "transformer-xl", context=2, marks=SLOW),
    row((2, 2, 2, 1), "delta", chunks=4, recompute="window", marks=SLOW),
    row((2, 2, 2, 1), "deltanet-hard", marks=SLOW, **SP),
]


@pytest.fixture(scope="module")
def train(pools, tmp_path_factory):
    """Train a model of `MODELS` under some settings; what rank 0 returns."""
    folder = tmp_path_factory.mktemp("layouts")
    data = write_set(folder / "set", [37, 500, 130, 64, 250, 90, 17, 400], questions=True)
    runs = itertools.count()

    def train(world: int, model: str, overrides: list[str] = (), **options):
        run = {"folder": str(folder / f"run{next(runs)}"), "data": str(data), "steps": STEPS}
        return pools.run(world, cases.train_steps, **run, overrides=[*MODELS[model], *overrides], **options)[0]

    return train


@pytest.fixture(scope="module")
def reference(train):
    return functools.cache(lambda model: train(1, model))


def assert_same_run(run, expected) -> None:
    """Losses and gradient norms of every step to 1e-5, weights, moments and carried memory to 1e-4 of their norm."""
    for what in ("losses", "norms"):
        assert len(expected[what]) == STEPS
        for step, (value, other) in enumerate(zip(run[what], expected[what], strict=True), start=1):
            assert value == pytest.approx(other, rel=1e-5), f"{what} of step {step}"
    assert run["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        assert tensor.norm() > 0, f"{name} is zero: nothing is compared"
        difference = ((run["tensors"][name] - tensor).norm() / tensor.norm()).item()
        assert difference <= 1e-4, f"{name} differs by {difference:.1e} of its norm"


@pytest.mark.parametrize(("world", "model", "overrides"), ROWS)
def test_layout_trains_the_same_model(train, reference, world, model, overrides):
    assert_same_run(train(world, model, overrides), reference(model))


def test_training_learns(reference):
    """The comparison would also hold for a model that does nothing."""
    for model in MODELS:
        losses = reference(model)["losses"]
        assert losses[-1] < 0.9 * losses[0]


def test_gradient_off_by_one_percent_is_noticed(train, reference):
    with pytest.raises(AssertionError, match="norms of step 1"):
        assert_same_run(train(1, "delta", damage="gradient"), reference("delta"))


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=["tensor", "pipeline"])
def test_bfloat16_stays_near_one_process(train, reference, layout):
    """Rounding differs between layouts, by what 8 bits of mantissa can do and no more."""
    overrides = [f"parallel.tensor={layout[0]}", f"parallel.pipeline={layout[1]}", "bptt.chunks_per_window=4"]
    expected = train(1, "delta", ["train.precision=bf16"])
    run = train(2, "delta", ["train.precision=bf16", *overrides])
    assert run["losses"] == pytest.approx(expected["losses"], rel=3e-3)
    assert run["norms"] == pytest.approx(expected["norms"], rel=5e-2)
    exact = reference("delta")
    assert run["losses"] != exact["losses"]
    assert run["losses"] == pytest.approx(exact["losses"], rel=3e-3)


def test_hosts_reduce_numbers_in_a_grid_as_around_a_ring(pools):
    """More than 32 processes do; here four, on two axes."""
    for rank in pools.run(4, cases.host_sums):
        assert (rank["ring axes"], rank["grid axes"]) == (1, 2)
        assert rank["grid"] == pytest.approx([6, 15, 2, 3, 8, 1]) == rank["ring"]
