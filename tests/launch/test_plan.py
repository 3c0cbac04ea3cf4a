"""`infini plan`: the shipped configurations can be planned without data, quickly, and the numbers are the real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from launch.cli import main
from launch.plan import ASSUMED_VOCAB, planned_vocabulary
from pipeline import planner
from pipeline.config_io import load_config
from pipeline.flops import train_flops_per_token
from pipeline.footprint import per_rank_bytes
from pipeline.schedule import Kind
from tests.prepared import write_set

CONFIGS = Path(__file__).parents[2] / "configs"


def plan(capsys, *arguments):
    """Exit code, standard output with single spaces, standard error."""
    code = main(["plan", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, " ".join(captured.out.split()), captured.err


def test_llama3_8b_with_its_schedule(capsys, tmp_path):
    png = tmp_path / "timeline.png"
    code, out, _ = plan(capsys, CONFIGS / "llama3_8b.yaml", "--world-size", 64, "--png", png)
    assert code == 0
    assert "tensor 8 x pipeline 4 x data 2 = 64 processes" in out
    # Meta's 8,030,261,248 and one beta for each of 32 heads in 32 layers.
    assert "parameters 8,030,262,272, all stages built and counted; 1,024 of them for the memory" in out
    assert "tokens per step 1,048,576 = 128 lanes x 4 segments x 2048 tokens" in out
    assert "simulated step of 64 windows" in out
    assert "segment_1f1b, 4 chunks per window" in out
    # 64 windows of 8,192 tokens, split over 8 ranks by sequence parallelism, 4,096 bfloat16 numbers each.
    assert 64 * 8192 // 8 * 4096 * 2 == 512 * 2**20
    assert "512 MiB" in out
    assert png.stat().st_size > 10_000
    assert not dist.is_initialized()


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


@pytest.mark.parametrize("recompute", ["none", "selective", "layer", "window"])
def test_costs_add_up_to_the_flops_of_a_step(recompute):
    """All computation of all stages, at 1 FLOP/s, is what `pipeline.flops` says for the step's tokens."""
    config = load_config(
        None,
        [
            *("model.num_layers=6", "model.vocab_size=128", "parallel.pipeline=3", "train.lanes=4"),
            *("train.segments_per_window=8", "bptt.chunks_per_window=4", f"bptt.recompute={recompute}"),
        ],
    )
    costs = planner.estimated_costs(config, 3, 128, flops_per_s=1.0, bytes_per_s=1e9)
    timeline = planner.simulate_step(config, costs, planner.windows_per_step(config, 3))
    seconds = sum(timeline.compute_s(stage) for stage in range(3))
    tokens = 4 * 8 * config.model.segment_length
    expected = tokens * train_flops_per_token(config.model, 128, recompute=recompute)
    if recompute != "window":
        assert seconds == pytest.approx(expected)
    else:  # the output matrix runs once; the last chunk of a window may go without replay
        assert 0.9 * expected < seconds < expected
    assert timeline.peak_live_chunks == (
        [1] * 3 if recompute == "window" else [needs.live_chunks for needs in per_rank_bytes(config, 3, 128)]
    )
    assert costs.message_bytes == 2 * config.model.segment_length * config.model.hidden_size * 4
    assert costs.compute_s[2][Kind.BACKWARD] > costs.compute_s[1][Kind.BACKWARD]


def test_planning_in_a_rank_of_a_run_is_a_mistake(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(AssertionError, match="has not joined a run"):
        planner.build_stages(load_config(None, ["model.vocab_size=100"]), 100)


def test_a_configuration_is_checked_before_anything_is_built(capsys, monkeypatch):
    monkeypatch.setattr(planner, "build_stages", lambda *arguments: pytest.fail("built"))
    assert plan(capsys, CONFIGS / "llama3_8b.yaml", "--world-size", 32, "parallel.zero_stage=3")[0] == 2
