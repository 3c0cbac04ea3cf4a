"""`infini plan`: the shipped configurations can be planned without data, quickly, and the numbers are the real ones."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from launch.cli import main
from launch.commands.plan import add_parser, memory_verdict
from launch.commands.planned import ASSUMED_VOCAB, planned_rates, planned_vocabulary
from pipeline.accounting import planner
from pipeline.accounting.devices import ACCELERATORS
from pipeline.accounting.flops import memory_state_bytes, parameter_count, train_flops_per_token
from pipeline.accounting.footprint import per_rank_bytes
from pipeline.config.load import load_config
from pipeline.config.schema import PRECISIONS
from pipeline.schedule.operations import Kind
from tests.prepared import write_set

CONFIGS = Path(__file__).parents[3] / "configs"


def plan(capsys, *arguments):
    """Exit code, standard output with single spaces, standard error."""
    code = main(["plan", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, " ".join(captured.out.split()), captured.err


def test_llama3_8b_with_its_schedule(capsys, tmp_path):
    png = tmp_path / "timeline.png"
    code, out, _ = plan(capsys, CONFIGS / "llama3_8b.yaml", "--world-size", 64, "--png", png)
    assert code == 0
    assert "tensor 8 x context 1 x pipeline 4 x data 2 = 64 processes" in out
    # Meta's 8,030,261,248 and one beta for each of 32 heads in 32 layers.
    assert "parameters 8,030,262,272, all stages built and counted; 1,024 of them for the memory" in out
    assert "tokens per step 1,048,576 = 128 lanes x 4 segments x 2048 tokens" in out
    assert "simulated pipeline of 64 microbatches per step" in out
    assert "segment_1f1b, 4 chunks per window" in out
    # 64 windows of 8,192 tokens, split over 8 ranks by sequence parallelism, 4,096 bfloat16 numbers each.
    assert 64 * 8192 // 8 * 4096 * 2 == 512 * 2**20
    assert "512 MiB" in out
    assert png.stat().st_size > 10_000
    assert not dist.is_initialized()


def test_fit_speed_and_duration_on_a_device(capsys):
    """The 8B recipe on 512 devices, its numbers added up by hand."""
    code, out, _ = plan(capsys, CONFIGS / "llama3_8b.yaml", "--world-size", 512, "--gpu", "A100-40", "--tflops", 100)
    assert code == 0
    config = load_config(CONFIGS / "llama3_8b.yaml", [])
    rates = planner.Rates(100e12, 50e9, 300e9, 5e-6)  # tensor-parallel ranks share a node of A100s
    step = planner.predict_step(config, 512, 128256, rates)
    per_s = 2**20 / step.step_s
    mfu = 100 * per_s * train_flops_per_token(config.model, 128256) / (512 * 312e12)
    assert f"tokens per second {per_s:,.0f}, {per_s / 512:,.0f} per device" in out
    assert f"MFU {mfu:.1f} % predicted" in out
    share = 100 * step.data_s / step.step_s
    assert f"exposed data traffic {step.data_s:.3g} s, {share:.1f} % of a step: gradients" in out
    left = step.overlapped_reduction_s + step.gathering_s
    assert 0 < left < step.data_s and f"behind the last backward {left:.3g} s" in out
    assert f"the run {30_000 * step.step_s / 86400:,.2f} days" in out
    assert "312 TFLOP/s in bf16" in out and "taken: 100 TFLOP/s while computing (--tflops); 50 GB/s" in out
    assert "memory fits: 3.71 GiB of 37.3 GiB, 33.5 GiB left (stage 0)" in out
    # Stage 0 of 8 tensor-parallel ranks, over 16 replicas: 311,107,620 float32 gradients twice, and the parameters, in
    # bfloat16 but for two norms and four betas in each of 9 layers.
    gathered = 2 * 311_107_620 + 2 * 9 * (2 * 4096 + 4)
    assert step.data_sent[0] == 2 * 4 * 311_107_620 * 15 // 16 + gathered * 15 // 16
    # 11 passes of bfloat16 hidden states per layer and chunk, and the embedding's two.
    assert step.tensor_sent[0] == 32 * 2048 * 4096 * (9 * 11 + 2) * 2 * 7 // 8
    assert step.pipeline_sent == [2**26, 2**27, 2**27, 2**26]


def test_what_does_not_fit_is_said(capsys):
    code, out, _ = plan(capsys, CONFIGS / "llama3_8b.yaml", "--world-size", 4, "parallel.tensor=1", "--gpu", "A100-40")
    assert code == 2  # sequence parallelism needs tensor parallelism
    arguments = ("parallel.tensor=1", "parallel.sequence_parallel=false", "--gpu", "A100-40")
    code, out, _ = plan(capsys, CONFIGS / "llama3_8b.yaml", "--world-size", 4, *arguments)
    assert code == 0 and "memory DOES NOT FIT: " in out and " too much (stage 0)" in out
    assert memory_verdict(95 * 2**30, 100 * 2**30).startswith("TIGHT: 95.0 GiB of 100 GiB, 5.00 GiB left")
    assert memory_verdict(80 * 2**30, 100 * 2**30) == "fits: 80.0 GiB of 100 GiB, 20.0 GiB left"


@pytest.mark.parametrize("device", ACCELERATORS)
def test_every_device_has_its_values(device):
    """A slip of a digit: no device of this table has less than 40 GB, or more float32 than bfloat16."""
    known = ACCELERATORS[device]
    assert 40 <= known.memory_gb < 300 and 60 < known.node_link_gb_per_s < 1000
    assert 5 < known.tflops["bf16"] / known.tflops["fp32"] < 40
    assert known.tflops["bf16"] == pytest.approx(2 * known.tflops["tf32"], rel=1e-2)
    assert set(known.tflops) == {*PRECISIONS, "tf32"}


def test_links_inside_a_node_are_the_devices_own(capsys):
    """Up to eight processes share a node; a link that is given counts in any case."""
    model = ("model.vocab_size=100", "train.lanes=8")
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    for world, link, expected in ((8, [], 450e9), (16, [], 50e9), (8, ["--link", "25"], 25e9)):
        args = parser.parse_args(["plan", "x", "--world-size", str(world), *link])
        rates = planned_rates(load_config(None, list(model)), args)
        assert (rates.link_bytes_per_s, rates.node_bytes_per_s) == (expected, 450e9)
        assert rates.flops_per_s == pytest.approx(0.4 * 67e12)  # float32 is the default


def test_a_line_comes_at_once(capsys, monkeypatch):
    """Before a library is imported or a file read."""

    def look():
        assert capsys.readouterr().out == "planning no_such.yaml on 8 processes ...\n"
        raise ValueError("seen")

    monkeypatch.setattr("launch.processes.quiet.quiet_libraries", look)
    assert plan(capsys, "no_such.yaml", "--world-size", 8)[0] == 2


def test_paper_model_says_that_its_vocabulary_is_assumed(capsys):
    code, out, _ = plan(capsys, CONFIGS / "paper_lm.yaml", "--world-size", 8)
    assert code == 0
    assert f"vocabulary {ASSUMED_VOCAB:,} tokens (ASSUMED" in out
    assert "simulated" not in out


def test_vocabulary_of_prepared_data_counts_when_it_is_there(tmp_path):
    write_set(tmp_path / "set", [30])
    config = load_config(None, [f"data.sets=[{{path: {tmp_path}/set}}, {{path: {tmp_path}/not_yet}}]"])
    assert planned_vocabulary(config) == (257, f"{tmp_path}/set")


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.pipeline=2", "model.tie_embeddings=true"],
        ["parallel.pipeline=4", "parallel.layers_per_stage=[1,2,2,1]", "model.tie_embeddings=false"],
        ["parallel.tensor=2", "parallel.pipeline=2", "model.memory.write_gate=hard"],
        ["model.memory.rule=none", "train.precision=fp64"],
    ],
)
def test_built_stages_have_the_parameters_that_arithmetic_says(overrides):
    config = load_config(None, ["model.num_layers=6", "model.vocab_size=100", *overrides])
    world = config.parallel.tensor * config.parallel.pipeline
    stages = planner.build_stages(config, 100)
    assert len(stages) == config.parallel.pipeline
    planner.check_counts(config, world, 100, stages)
    with pytest.raises(RuntimeError, match="was built with .* parameters, arithmetic says"):
        planner.check_counts(config, world, 200, stages)


def test_what_cannot_run_is_refused(capsys):
    code, _, err = plan(capsys, CONFIGS / "llama3_8b.yaml", "--world-size", 24)
    assert code == 2
    assert "the number of processes must be a multiple of 32" in err
    code, _, err = plan(capsys, CONFIGS / "llama3_8b.yaml", "--world-size", 32, "bptt.chunks_per_window=3")
    assert code == 2
    assert "bptt.chunks_per_window = 3" in err


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "layer", "window"])
def test_costs_add_up_to_the_flops_of_a_step(recompute, logits):
    """All computation of all stages, at 1 FLOP/s, is what `pipeline.accounting.flops` says for the step's tokens."""
    config = load_config(
        None,
        [
            *("model.num_layers=6", "model.vocab_size=128", "parallel.pipeline=3", "train.lanes=4"),
            *("train.segments_per_window=8", "bptt.chunks_per_window=4", f"bptt.recompute={recompute}"),
            f"bptt.recompute_logits={str(logits).lower()}",
        ],
    )
    costs = planner.estimated_costs(config, 3, 128, planner.Rates(flops_per_s=1.0, link_bytes_per_s=1e9))
    timeline = planner.simulate_step(config, costs, planner.microbatches_per_step(config, 3))
    seconds = sum(timeline.compute_s(stage) for stage in range(3))
    tokens = 4 * 8 * config.model.segment_length
    expected = tokens * train_flops_per_token(config.model, 128, recompute=recompute, recompute_logits=logits)
    if recompute != "window":
        assert seconds == pytest.approx(expected)
    else:  # the output matrix runs once; the last chunk of a window may go without replay
        assert 0.9 * expected < seconds < expected
    assert timeline.peak_live_chunks == (
        [1] * 3 if recompute == "window" else [needs.live_chunks for needs in per_rank_bytes(config, 3, 128)]
    )
    assert costs.message_bytes == 2 * config.model.segment_length * config.model.hidden_size * 4
    assert costs.compute_s[2][Kind.BACKWARD] > costs.compute_s[1][Kind.BACKWARD]


def test_logits_are_made_again_where_they_are_large(capsys):
    """1 GiB of a rank decides, unless the configuration does; who has decided is said."""
    arguments = (CONFIGS / "llama3_8b.yaml", "--world-size", 64)
    # 4 chunks of 2,048 tokens, an eighth of 128,256 columns, 2 bytes each.
    assert 4 * 2048 * 128256 // 8 * 2 == 250.5 * 2**20
    assert (
        "logits kept for the backward pass, 250 MiB on a rank of the last stage (by their size)"
        in plan(capsys, *arguments)[1]
    )
    out = plan(capsys, *arguments, "bptt.recompute_logits=true")[1]
    assert "logits made again in the backward pass" in out and "250 MiB (bptt.recompute_logits)" in out
    config = load_config(CONFIGS / "llama3_8b.yaml", ["parallel.tensor=1", "parallel.sequence_parallel=false"])
    kept = replace(config, bptt=replace(config.bptt, recompute_logits=False))
    (*_, again), (*_, held) = (per_rank_bytes(c, 64, 128256) for c in (config, kept))
    block = 2048 * 128256 * 2
    assert held.activations - again.activations == 4 * block and held.passes - again.passes == 3 * block


def test_planning_in_a_rank_of_a_run_is_a_mistake(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(AssertionError, match="has not joined a run"):
        planner.build_stages(load_config(None, ["model.vocab_size=100"]), 100)


def test_a_configuration_is_checked_before_anything_is_built(capsys, monkeypatch):
    monkeypatch.setattr(planner, "build_stages", lambda *arguments: pytest.fail("built"))
    assert plan(capsys, CONFIGS / "llama3_8b.yaml", "--world-size", 32, "parallel.zero_stage=3")[0] == 2


SMALL = [
    *("model.num_layers=8", "model.hidden_size=1024", "model.num_attention_heads=8", "model.ffn_hidden_size=4096"),
    *("train.lanes=16", "train.segments_per_window=2", "train.precision=bf16", "model.vocab_size=32768"),
]


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("name: small\n")
    return path


def test_search_in_words_and_json(capsys, small, tmp_path):
    written = tmp_path / "found.json"
    arguments = ("--nodes", 2, "--gpus-per-node", 2, "--gpu", "h100", *SMALL)
    code, out, _ = plan(capsys, small, "--search", "--tokens", "100e9", "--json", written, *arguments)
    assert code == 0
    found = json.loads(written.read_text())
    best = found["fitting"][0]
    assert f"{best['tokens_per_s']:,.0f} {100 * best['mfu']:.1f} % {best['days']:,.2f}" in out
    assert best["days"] == pytest.approx(100e9 / best["tokens_per_s"] / 86400)
    # Three float32 numbers for each parameter, and the memory of 16 lanes.
    count = parameter_count(load_config(small, SMALL).model)["total"]
    memory = 16 * memory_state_bytes(load_config(small, SMALL).model)
    assert found["checkpoint"]["bytes"] == 12 * count + memory
    assert found["checkpoint"]["write_s"] == pytest.approx(found["checkpoint"]["bytes"] / 2 / 2e9)
    assert "ASSUMED, 40 % of the peak" in out and found["assumptions"]["flops_per_s"] == 0.4 * 989.5e12
    # Planned by itself, with the printed settings, it is the same.
    settings = [f"{key}={value}" for key, value in best["settings"].items()]
    code, out, _ = plan(capsys, small, "--nodes", 2, "--gpus-per-node", 2, *SMALL, *settings)
    assert code == 0 and f"tokens per second {best['tokens_per_s']:,.0f}," in out


def test_a_search_that_finds_nothing_says_what_comes_closest(capsys, small):
    arguments = ("--gpu", "A100-40", *SMALL, "model.hidden_size=8192", "model.ffn_hidden_size=28672")
    code, out, err = plan(capsys, small, "--search", "--nodes", 1, "--gpus-per-node", 1, *arguments)
    assert code == 2
    assert "layouts do not fit in any variant" in out
    assert "nothing fits 1 x A100-40: tensor x context x pipeline x data 1 x 1 x 1 x 1 comes closest, with" in err
    assert "devices would do" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--world-size and --nodes are missing"),
        (["--world-size", 8, "--nodes", 1], "--world-size and --nodes exclude each other"),
        (["--world-size", 8, "--tokens", "1e9"], "--tokens needs --search"),
        (["--world-size", 8, "--search", "--schedule"], "--schedule is of one layout"),
    ],
)
def test_options_that_do_not_go_together(capsys, small, options, message):
    code, _, err = plan(capsys, small, *options)
    assert code == 2 and message in err
