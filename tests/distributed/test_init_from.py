"""Runs that start from weights: an imported model, an earlier phase; with parts that do not train."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict

import pytest
import torch

from data.tokenizer.tokenizer import load_tokenizer
from pipeline.config.load import load_config
from tests.distributed import cases, init_from_cases
from tests.prepared import write_set

pytestmark = pytest.mark.distributed

CONSTANT = ["optimizer.schedule=constant", "optimizer.warmup_steps=0"]
LENGTHS = [37, 500, 130, 64, 250, 90, 17, 400]
DELTA = ["model.memory.rule=delta"]


@pytest.fixture(scope="module")
def start(pools, tmp_path_factory):
    """Run a case on some layout; folders are made up."""
    folder = tmp_path_factory.mktemp("init")
    data = write_set(folder / "set", LENGTHS)
    count = itertools.count()

    def start(world, function, overrides, *, name=None, **options):
        run = {"folder": str(folder / (name or f"run{next(count)}")), "data": str(data), "overrides": overrides}
        return pools.run(world, function, **run, **options)[0]

    start.folder = folder
    return start


@pytest.fixture(scope="module")
def imported(pools, start):
    """A tiny Llama, imported; overrides of a run that starts from it."""
    tiny_hf = pytest.importorskip("tests.tiny_hf", reason="the extra `hf` is not installed")
    source, out = start.folder / "hf", start.folder / "imported"
    tiny_hf.write_hf_model(source, "llama")
    pools.run(1, init_from_cases.import_folder, source=str(source), out=str(out), segment_length=16)
    model = asdict(load_config(out / "config.yaml", []).model)
    data = write_set(start.folder / "imported-set", LENGTHS, tokenizer=load_tokenizer(out))  # else it is refused
    sets = f"data.sets=[{{path: {data}, answer_weight: 3.0}}]"
    return source, [f"model={json.dumps(model)}", f"train.init_from={out}", sets]


@pytest.fixture(scope="module")
def first_phase(start):
    """Three steps of training, saved: where a second phase starts."""
    run = start(1, cases.train_steps, DELTA, name="phase1", steps=3, save=True)
    return start.folder / "phase1", run


def moved(before, after, kind="master"):
    names = {name for name in before if name.startswith(f"{kind}/")}
    return {name.removeprefix(f"{kind}/") for name in names if not torch.equal(before[name], after[name])}


def test_first_loss_is_the_imported_model_exactly(start, imported):
    """On first segments: the very number of the same model without a memory, and transformers' to rounding."""
    source, overrides = imported
    overrides = [*overrides, "train.segments_per_window=1", "data.stagger=false"]
    found = start(1, init_from_cases.first_loss, overrides, hf_folder=str(source))
    plain = start(1, init_from_cases.first_loss, [*overrides, "model.memory.rule=none"])
    assert found["all_start"]
    assert found["loss"] == plain["loss"]
    assert found["loss"] == pytest.approx(found["hf_loss"], rel=1e-6)
    hurt = start(1, init_from_cases.first_loss, [*overrides, "model.memory.skip_empty=false"])
    assert abs(hurt["loss"] - plain["loss"]) > 1e-5  # what skipping the empty memory is for


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=["tensor", "pipeline"])
def test_imported_weights_on_any_layout(start, imported, layout):
    """A vocabulary of 300 in other paddings too: the padding is no part of the model."""
    overrides = [*imported[1], "train.trainable=['*.beta', '*norm*', '*qkv*']"]
    expected = start(1, cases.train_steps, overrides, steps=3)
    tensor, pipeline = layout
    other = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", "model.vocab_size_multiple=64"]
    run = start(2, cases.train_steps, [*overrides, *other], steps=3)
    assert run["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert run["norms"] == pytest.approx(expected["norms"], rel=1e-5)


def test_second_phase_takes_the_weights_and_nothing_else(start, first_phase):
    folder, phase1 = first_phase
    settings = [
        f"train.init_from={folder}",
        "model.segment_length=32",
        "train.segments_per_window=2",
        "optimizer.lr=0.1",
    ]
    phase2 = start(1, cases.train_steps, [*DELTA, *settings], steps=0)
    masters = {name: x for name, x in phase1["tensors"].items() if name.startswith("master/")}
    assert masters and all(torch.equal(phase2["tensors"][name], x) for name, x in masters.items())
    others = {name: x for name, x in phase2["tensors"].items() if name not in masters}
    assert others and not any(x.any() for x in others.values())  # moments and memory


def test_memory_parts_that_the_weights_lack_start_fresh(start, first_phase):
    plain = start(1, cases.train_steps, ["model.memory.rule=none"], name="plain", steps=2, save=True)
    overrides = ["model.memory.rule=delta", "model.memory.write_gate=hard", "model.memory.beta_init=-1.5"]
    run = start(1, cases.train_steps, [*overrides, f"train.init_from={start.folder / 'plain'}"], steps=0)
    assert moved(plain["tensors"], run["tensors"]) == set()
    assert (run["tensors"]["master/layers.2.attention.beta"] == -1.5).all()
    assert (run["tensors"]["master/layers.2.attention.write_gate.bias"] == 2.0).all()


REFUSED = [
    (["model.num_layers=2"], "model.num_layers is 2 here, 4 there"),
    (["model.rope_base=500.0"], "model.rope_base is 500.0 here, 10000.0 there"),
    (["model.rope_scaling.type=linear"], "model.rope_scaling"),
    (["model.qk_norm=true"], "model.qk_norm is True here, False there"),
    (["model.vocab_size=301"], "the vocabulary has 301 tokens here, 257 there"),
    (["model.memory.rule=linear"], "model.memory.rule is 'linear' here, 'delta' there"),
    (["model.memory.rule=none"], "model.memory.rule is 'none' here, 'delta' there"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_weights_of_another_model_are_refused(start, first_phase, overrides, message):
    overrides = [*DELTA, f"train.init_from={first_phase[0]}", *overrides]
    assert message in (start(1, init_from_cases.try_to_start, overrides) or "")


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_frozen_backbone(start, first_phase, zero):
    """It does not move, its Adam state begins when it does, and a resume in the middle changes nothing."""
    overrides = [*DELTA, *CONSTANT, f"parallel.zero_stage={zero}", f"train.init_from={first_phase[0]}"]
    overrides += ["train.freeze_backbone_steps=3", "optimizer.clip=0"]
    before = first_phase[1]["tensors"]
    name = f"frozen-{zero}"
    frozen = start(2, cases.train_steps, overrides, name=name, steps=2, save=True)["tensors"]
    assert moved(before, frozen) == {f"layers.{i}.attention.beta" for i in range(4)}
    assert not any(frozen[f"{kind}/layers.1.mlp_norm.weight"].any() for kind in ("exp_avg", "exp_avg_sq"))
    whole = start(2, cases.train_steps, overrides, steps=5)
    at_four = start(2, cases.train_steps, overrides, steps=4)["tensors"]
    checkpoint = str(start.folder / name / "checkpoints" / "step_00000002")
    resumed = start(2, cases.train_steps, overrides, name=name, steps=3, resume=checkpoint)
    assert resumed["losses"] == whole["losses"][2:]
    for key, tensor in whole["tensors"].items():
        assert torch.equal(resumed["tensors"][key], tensor), key
    # Adam's first step moves everything without weight decay by the learning rate.
    first = at_four["master/layers.1.mlp_norm.weight"] - before["master/layers.1.mlp_norm.weight"]
    torch.testing.assert_close(first.abs(), torch.full_like(first, 3e-3), rtol=0.02, atol=0)


@pytest.mark.parametrize("zero", [1, 3])
def test_only_what_the_patterns_name_trains(start, first_phase, zero):
    overrides = [*DELTA, f"parallel.zero_stage={zero}", f"train.init_from={first_phase[0]}"]
    overrides += ["train.trainable=['*.beta', 'layers.2.*norm.weight']"]
    name = f"part-{zero}"
    run = start(2, cases.train_steps, overrides, name=name, steps=2, save=True)
    wanted = {f"layers.{i}.attention.beta" for i in range(4)} | {"layers.2.attention_norm.weight"}
    assert moved(first_phase[1]["tensors"], run["tensors"]) == wanted | {"layers.2.mlp_norm.weight"}
    assert "exp_avg/embedding.weight" not in run["tensors"]
    whole = start(2, cases.train_steps, overrides, steps=4)
    resumed = start(2, cases.train_steps, overrides, name=name, steps=2, resume="latest")
    assert resumed["losses"] == whole["losses"][2:]
    for key, tensor in whole["tensors"].items():
        assert torch.equal(resumed["tensors"][key], tensor), key
    expected = start(1, cases.train_steps, [o for o in overrides if "zero" not in o], steps=4)
    assert whole["norms"] == pytest.approx(expected["norms"], rel=1e-5)


def test_patterns_that_fit_nothing_are_refused(start):
    message = start(1, init_from_cases.try_to_start, [*DELTA, "train.trainable=['*.beta', '*.gamma']"])
    assert "'*.gamma' fits no parameter" in message and "layers.0.attention.beta" in message
    message = start(2, init_from_cases.try_to_start, [*DELTA, "parallel.pipeline=2", "train.trainable=['layers.3.*']"])
    assert "stage of layers 0 to 1 without anything to train" in message
