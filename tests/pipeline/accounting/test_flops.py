"""Counts by arithmetic agree with published figures, with the built model, and with each other."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from model.config import MemoryConfig, ModelConfig
from model.decoder import DecoderStage
from model.device import prepare_megatron
from model.layers.decoder_layer import StageOptions
from model.megatron import parallel_state
from pipeline.accounting.flops import (
    forward_flops_per_token,
    measured_matmul_peak,
    memory_state_bytes,
    parameter_count,
    train_flops_per_token,
)
from pipeline.accounting.footprint import per_rank_bytes
from pipeline.config.schema import BpttConfig, Config, ParallelConfig, TrainConfig
from pipeline.parallel.parameter_groups import parameter_groups
from tests.saved_bytes import saved_bytes

MEMORY_KINDS = [("none", "none"), ("linear", "none"), ("delta", "none"), ("delta", "hard"), ("deltanet", "hard")]
MEMORY_KINDS += [("gated_deltanet", "none"), ("gated_deltanet", "hard")]
MEMORY_KINDS += [("delta_product", "none"), ("delta_product", "hard")]
MEMORY_KINDS += [("kda", "sigmoid"), ("gdn2", "none"), ("gdn2", "hard")]
MEMORY_KINDS += [("linear+convolution", "none"), ("delta+convolution", "none"), ("deltanet+convolution", "none")]
MEMORY_KINDS += [("linear+wide", "none"), ("gated_deltanet+wide", "hard")]


def llama3_8b(rule="linear", **changes):
    values = {
        "num_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "ffn_hidden_size": 14336,
        "vocab_size": 128256,
        "tie_embeddings": False,
        "segment_length": 2048,
        "memory": MemoryConfig(rule=rule),
    }
    return ModelConfig(**(values | changes))


QWEN = {"qkv_bias": True, "qk_norm": True}


def small(rule="delta", gate="hard", **changes):
    rule, _, convolution = rule.partition("+")
    values = {
        "num_layers": 3,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 688,
        "vocab_size": 500,
        "segment_length": 256,
        "memory": MemoryConfig(
            rule,
            gate,
            short_convolution=bool(convolution) or None,
            convolution_width=8 if convolution == "wide" else MemoryConfig().convolution_width,
        ),
    }
    return ModelConfig(**(values | changes))


def test_llama3_8b_has_its_published_size():
    plain = parameter_count(llama3_8b("none"))
    assert plain["total"] == 8_030_261_248  # Meta's 8.03B, to the last one
    with_memory = parameter_count(llama3_8b("linear"))
    assert with_memory["total"] - plain["total"] == with_memory["beta"] == 32 * 32
    gated = parameter_count(llama3_8b(memory=MemoryConfig(rule="delta", write_gate="hard")))
    assert gated["total"] - with_memory["total"] == gated["write_gate"] == 32 * 8 * (4096 + 1)


def test_smollm2_135m_has_its_published_size():
    config = llama3_8b(
        "none",
        num_layers=30,
        hidden_size=576,
        num_attention_heads=9,
        num_query_groups=3,
        ffn_hidden_size=1536,
        vocab_size=49152,
        tie_embeddings=True,
    )
    assert parameter_count(config)["total"] == 134_515_008


def test_llama3_8b_carries_16_9_megabytes_per_lane():
    assert memory_state_bytes(llama3_8b()) == 32 * 8 * (128 * 128 + 128) * 4
    assert memory_state_bytes(llama3_8b()) / 1e6 == pytest.approx(16.9, abs=0.05)
    assert memory_state_bytes(llama3_8b("none")) == 0
    assert memory_state_bytes(llama3_8b("deltanet")) == 32 * 8 * 128 * 128 * 4


def test_memory_costs_an_eighth_of_local_attention():
    """12.5 % by hand: linear, one key/value head per query head, d = 128, S = 2048, causal local attention."""

    def share(rule, groups):
        flops = forward_flops_per_token(llama3_8b(rule, num_query_groups=groups))
        return flops["memory"] / flops["local_attention"]

    assert share("linear", 32) == 0.125
    assert share("delta", 32) == share("deltanet", 32) == 0.1875
    assert share("linear", 8) == 0.078125
    assert share("none", 32) == 0


def test_training_costs_six_flops_per_parameter():
    """The 6N rule: N without the input embedding, which is looked up; attention and memory come on top."""
    config = llama3_8b()
    counted = parameter_count(config)
    expected = 6 * (counted["total"] - counted["embedding"])
    flops = forward_flops_per_token(config)
    on_top = 3 * (flops["local_attention"] + flops["memory"])
    assert train_flops_per_token(config) - on_top == pytest.approx(expected, rel=1e-4)
    assert train_flops_per_token(config) == pytest.approx(expected, rel=0.06)


def test_recomputation_adds_what_it_runs_again():
    config = llama3_8b("delta")
    forward = forward_flops_per_token(config)
    assert train_flops_per_token(config) == 3 * forward["total"]
    assert train_flops_per_token(config, recompute="window") == 4 * forward["total"]
    assert train_flops_per_token(config, recompute="layer") == 4 * forward["total"] - forward["output"]
    selective = train_flops_per_token(config, recompute="selective") - 3 * forward["total"]
    assert selective == forward["local_attention"] + forward["memory"]
    with pytest.raises(ValueError, match="'all'.*selective"):
        train_flops_per_token(config, recompute="all")


def test_flops_by_counting_matrix_products():
    """Every weight matrix is 2 FLOPs per entry; attention and memory by hand, for sizes that are all different."""
    flops = forward_flops_per_token(small())
    assert flops["projections"] == 3 * 2 * (256 * 64 * (4 + 2 + 2) + 4 * 64 * 256)
    assert flops["mlp"] == 3 * 2 * (256 * 2 * 688 + 688 * 256)
    assert flops["local_attention"] == 3 * 2 * (4 * 64 * 128 + 4 * 64 * 128)
    assert flops["memory"] == 3 * 2 * (4 * 64 * 64 + 2 * 64 * 64 + 2 * 64 * 64 + 256 * 2)
    assert flops["output"] == 2 * 256 * 512
    assert flops["total"] == sum(value for name, value in flops.items() if name != "total")


def test_vocabulary_comes_from_the_configuration_or_the_tokenizer():
    config = small(vocab_size=None)
    assert parameter_count(config, vocab=257)["embedding"] == 320 * 256
    with pytest.raises(ValueError, match="vocab_size"):
        parameter_count(config)


# The model as built, on one process.


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    prepare_megatron()
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def build(config, *, precision="fp32", recompute="none"):
    options = StageOptions(precision=precision, recompute=recompute)
    stage = DecoderStage(
        config,
        options,
        vocab_size=config.vocab_size,
        first_layer=0,
        last_layer=config.num_layers,
        tensor_rank=0,
        tensor_size=1,
    )
    stage.initialize(seed=0)
    return stage


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rule", ["none", "delta", "gated_deltanet"])
def test_sliding_context_of_the_built_model(one_process, monkeypatch, rule, precision):
    monkeypatch.setattr("model.layers.local_context.host_knows", lambda device: False)  # as the device does
    config = small(rule, "none", local_context="sliding")
    stage = build(config, precision=precision)
    carried = sum(x.numel() * x.element_size() for state in stage.empty_memory(1, torch.device("cpu")) for x in state)
    assert memory_state_bytes(config, precision) == carried
    number = 2 if precision == "bf16" else 4  # the memory itself stays float32, and how much is seen
    assert carried - memory_state_bytes(small(rule, "none")) == 3 * 2 * (2 * 256 * 64 * number + 4)
    tokens = torch.randint(0, 500, (2, 3, 256))
    measured = saved_bytes(stage, tokens, tokens, torch.zeros(2, 3, dtype=torch.bool))
    run = Config(model=config, train=TrainConfig(lanes=2, segments_per_window=3, precision=precision))
    assert per_rank_bytes(run, world_size=1)[0].chunk_activations == pytest.approx(measured, rel=0.05)


def test_sliding_context_sees_three_times_as_many_keys():
    """S + S / 2 keys per query instead of S / 2."""
    segment, sliding = (forward_flops_per_token(small(local_context=c)) for c in ("segment", "sliding"))
    assert sliding["local_attention"] == 3 * segment["local_attention"]
    assert sliding["memory"] == segment["memory"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_mix_gate_per_token_of_the_built_model(one_process, precision):
    config = small(memory=MemoryConfig(rule="delta", mix_gate="token"))
    stage = build(config, precision=precision)
    assert parameter_count(config)["beta"] == 3 * 4 * (256 + 1)
    assert parameter_count(config)["total"] == sum(parameter.numel() for parameter in stage.parameters())
    tokens = torch.randint(0, 500, (2, 3, 256))
    measured = saved_bytes(stage, tokens, tokens, torch.zeros(2, 3, dtype=torch.bool))
    run = Config(model=config, train=TrainConfig(lanes=2, segments_per_window=3, precision=precision))
    assert per_rank_bytes(run, world_size=1)[0].chunk_activations == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("family", [{}, {"tie_embeddings": False}, QWEN], ids=["tied", "untied", "bias-norms"])
@pytest.mark.parametrize(("rule", "gate"), MEMORY_KINDS)
def test_parameters_of_the_built_model(one_process, rule, gate, family):
    config = small(rule, gate, **family)
    built = sum(parameter.numel() for parameter in build(config).parameters())
    assert parameter_count(config)["total"] == built
    run = Config(model=config, parallel=ParallelConfig(), train=TrainConfig(lanes=1))
    assert per_rank_bytes(run, world_size=1)[0].parameter_count == built


@pytest.mark.parametrize(("rule", "gate"), MEMORY_KINDS)
def test_carried_state_of_the_built_model(one_process, rule, gate):
    config = small(rule, gate)
    states = build(config).empty_memory(1, torch.device("cpu"))
    built = sum(x.numel() * x.element_size() for state in states if state is not None for x in state)
    assert memory_state_bytes(config) == built


@pytest.mark.parametrize("recompute", ["none", "selective", "layer"])
def test_a_memory_in_some_layers_costs_what_they_cost(one_process, recompute):
    """Parameters, state, activations of the built model; FLOPs of as many layers with and without."""
    config, plain = small("gated_deltanet", "hard"), small("none", "none")
    every = forward_flops_per_token(config)
    config.memory.layers = [config.num_layers - 1]
    stage = build(config, recompute=recompute)
    assert parameter_count(config)["total"] == sum(parameter.numel() for parameter in stage.parameters())
    built = sum(x.nbytes for state in stage.empty_memory(1, torch.device("cpu")) for x in state or ())
    assert memory_state_bytes(config) == built > 0
    found = forward_flops_per_token(config)
    assert found["memory"] * config.num_layers == every["memory"]
    assert found["total"] - found["memory"] == forward_flops_per_token(plain)["total"]
    tokens = torch.randint(0, 500, (2, 3, 256))
    measured = saved_bytes(stage, tokens, tokens, torch.zeros(2, 3, dtype=torch.bool))
    run = Config(model=config, bptt=BpttConfig(recompute=recompute), train=TrainConfig(lanes=2, segments_per_window=3))
    assert per_rank_bytes(run, world_size=1)[0].chunk_activations == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "selective", "layer"])
@pytest.mark.parametrize(("rule", "gate", "family"), [*((*kind, {}) for kind in MEMORY_KINDS), ("delta", "none", QWEN)])
def test_activation_estimate_against_what_autograd_keeps(one_process, rule, gate, family, recompute, precision):
    config = small(rule, gate, **family)
    stage = build(config, precision=precision, recompute=recompute)
    lanes, segments = 2, 3
    tokens = torch.randint(0, 500, (lanes, segments, 256))
    measured = saved_bytes(stage, tokens, tokens, torch.zeros(lanes, segments, dtype=torch.bool))
    run = Config(
        model=config,
        bptt=BpttConfig(recompute=recompute),
        train=TrainConfig(lanes=lanes, segments_per_window=segments, precision=precision),
    )
    (rank,) = per_rank_bytes(run, world_size=1)
    assert rank.live_chunks == 1
    assert rank.chunk_activations == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("rule", ["kda", "gdn2"])
def test_gates_per_channel_of_narrow_heads(one_process, rule):
    """Where 16 features per head are as many as it has channels, what is kept of them counts most."""
    config = small(rule, "hard", hidden_size=64, ffn_hidden_size=128, segment_length=32)
    stage = build(config, precision="bf16")
    tokens = torch.randint(0, 500, (2, 8, 32))
    measured = saved_bytes(stage, tokens, tokens, torch.zeros(2, 8, dtype=torch.bool))
    run = Config(model=config, train=TrainConfig(lanes=2, segments_per_window=8, precision="bf16"))
    assert per_rank_bytes(run, world_size=1)[0].chunk_activations == pytest.approx(measured, rel=0.03)


def test_what_wider_convolutions_cost(one_process):
    """Per further token a product and a sum of every channel, and its q, k, v in front of every segment."""
    flops, estimated, measured = [], [], []
    for rule in ("gated_deltanet+convolution", "gated_deltanet+wide"):
        config = small(rule, "hard", segment_length=14)
        flops.append(forward_flops_per_token(config)["memory"])
        run = Config(model=config, train=TrainConfig(lanes=2, segments_per_window=16))
        estimated.append(per_rank_bytes(run, world_size=1)[0].chunk_activations)
        tokens = torch.randint(0, 500, (2, 16, 14))
        measured.append(saved_bytes(build(config), tokens, tokens, torch.zeros(2, 16, dtype=torch.bool)))
    channels = (4 + 2 * 2) * 64
    assert flops[1] - flops[0] == config.num_layers * (8 - 4) * 2 * channels
    assert estimated[1] - estimated[0] == pytest.approx(measured[1] - measured[0], rel=0.05)


# Layouts.


def run_8b(**parallel):
    return Config(
        model=llama3_8b("delta"),
        parallel=ParallelConfig(**parallel),
        bptt=BpttConfig(chunks_per_window=4),
        train=TrainConfig(lanes=8, segments_per_window=8, precision="bf16"),
    )


def test_stages_and_tensor_ranks_hold_the_model_once():
    whole = parameter_count(llama3_8b("delta"))["total"]
    stages = per_rank_bytes(run_8b(tensor=8, pipeline=4), world_size=64)
    replicated = 32 * 2 * 4096 + 4096  # norms, on each of the 8 ranks
    assert sum(8 * rank.parameter_count for rank in stages) == whole + 7 * replicated
    assert [rank.layers for rank in stages] == [8, 8, 8, 8]
    assert [rank.live_chunks for rank in stages] == [7, 6, 5, 4]
    # Four lanes per data-parallel rank, a quarter of the layers, an eighth of the heads, old and new state.
    assert stages[0].memory_state == 2 * 4 * memory_state_bytes(llama3_8b("delta")) // 32
    last = stages[3]
    assert last.total == last.parameters + last.optimizer + last.memory_state + max(last.passes, last.update)
    # The loss is where most is alive: the output matrix's gradient in float32, and a block's in bfloat16 that is added,
    # 2^22 logits in float32, and d(hidden) of a chunk of two segments.
    at_loss = 128256 // 8 * 4096 * (4 + 2) + 2**22 * 4 + 2 * 2048 * 4096 * 2
    assert last.passes == last.gradients + 4 * last.chunk_activations + at_loss


def test_tied_embedding_is_held_twice_over_stages():
    config = run_8b(pipeline=2)
    untied = per_rank_bytes(config, world_size=2)
    config.model.tie_embeddings = True
    assert [rank.parameters for rank in per_rank_bytes(config, 2)] == [rank.parameters for rank in untied]
    config.parallel.pipeline = 1
    (tied,) = per_rank_bytes(config, world_size=1)
    assert tied.parameter_count == parameter_count(config.model)["total"]


def test_zero_stages_share_out_what_they_share_out():
    one, two, three = (per_rank_bytes(run_8b(zero_stage=stage), world_size=8)[0] for stage in (1, 2, 3))
    count = parameter_count(llama3_8b("delta"))["total"]
    assert one.gradients == 4 * count and one.parameters == pytest.approx(2 * count, rel=1e-3)
    assert one.optimizer == pytest.approx(12 * count / 8, rel=1e-6)
    assert (two.parameters, two.gradients, two.optimizer) == (one.parameters, one.gradients, one.optimizer)
    assert three.gradients == one.gradients and three.optimizer == one.optimizer
    assert 2 * count / 8 < three.parameters < one.parameters / 3


def test_recomputation_bounds_activations_by_the_chunk():
    """With window recomputation a longer window costs only the memory at its chunk borders."""

    def activations(recompute, segments):
        config = run_8b()
        config.bptt = BpttConfig(recompute=recompute, chunks_per_window=segments)
        config.train = TrainConfig(lanes=1, segments_per_window=segments, precision="bf16")
        return per_rank_bytes(config, world_size=1)[0].activations

    assert activations("none", 64) == 16 * activations("none", 4)
    border = 2048 * 4096 * 2 + memory_state_bytes(llama3_8b("delta"))
    assert activations("window", 64) - activations("window", 4) == 60 * border
    assert activations("window", 64) < activations("layer", 64) < activations("selective", 64) < activations("none", 64)


def test_peak_is_operations_over_seconds_of_the_best_size(monkeypatch):
    """A clock by the book: 1e9 FLOP/s up to 64 rows, 4e9 above, so 128 wins however long is measured."""
    seen = []

    def timed(left, right, repeats):
        size = left.shape[0]
        seen.append((size, repeats))
        return repeats * 2 * size**3 / (1e9 if size <= 64 else 4e9)

    monkeypatch.setattr("pipeline.accounting.flops._time_products", timed)
    for seconds in (0.1, 0.4):
        assert measured_matmul_peak(torch.float32, "cpu", seconds=seconds, sizes=(64, 128)) == pytest.approx(4e9)
    assert measured_matmul_peak(torch.float32, "cpu", seconds=1e-6, sizes=(64, 128)) == pytest.approx(1e9)
    assert seen[-1] == (64, 1)  # too slow for its budget already: the larger one is not tried


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_of_this_machine_is_plausible(dtype):
    assert 1e8 < measured_matmul_peak(dtype, "cpu", seconds=0.05, sizes=(64, 128)) < 1e14


def test_gates_learn_at_rates_of_their_own(one_process):
    """Mixing gates like beta, decays like the write gate, both without weight decay; convolutions like any matrix."""
    config = Config(model=small(memory=MemoryConfig("gated_deltanet", "hard", mix_gate="token")))
    settings = {}
    stage = build(config.model)
    names = {id(parameter): name.split("layers.0.attention.")[-1] for name, parameter in stage.named_parameters()}
    for group in parameter_groups(stage, config):
        for parameter in group["params"]:
            settings[names[id(parameter)]] = (group["weight_decay"], group["kind"].lr_scale)
    optimizer = config.optimizer
    for name in ("mix_gate.weight", "mix_gate.bias"):
        assert settings[name] == (0, optimizer.beta_lr_scale)
    for name in ("write_gate.weight", "memory_decay.weight", "memory_decay.bias", "memory_decay_rate"):
        assert settings[name] == (0, optimizer.write_gate_lr_scale)
    assert settings["memory_convolution"] == settings["qkv.weight"] == (optimizer.weight_decay, 1)
