"""Bytes of a rank that has tensor-parallel neighbours, against what autograd keeps on such a rank."""

from __future__ import annotations

import pytest
import torch

from model.config import MemoryConfig, ModelConfig
from model.decoder import DecoderStage
from model.layers.decoder_layer import StageOptions
from model.megatron import parallel_state
from model.rules.context import ContextGroup
from pipeline.accounting.footprint import per_rank_bytes
from pipeline.accounting.planner import pretended_rank
from pipeline.config.schema import BpttConfig, Config, ParallelConfig, TrainConfig
from tests.pipeline.tracing.cases import whole_tensors
from tests.saved_bytes import saved_bytes

TENSOR, LANES, SEGMENTS, LENGTH = 4, 2, 2, 64


def run_config(memory, sequence_parallel, recompute, precision):
    model = ModelConfig(
        num_layers=2,
        hidden_size=256,
        num_attention_heads=8,
        num_query_groups=4,
        ffn_hidden_size=688,
        vocab_size=512,
        vocab_size_multiple=128,
        segment_length=LENGTH,
        memory=memory,
    )
    return Config(
        model=model,
        parallel=ParallelConfig(tensor=TENSOR, sequence_parallel=sequence_parallel),
        bptt=BpttConfig(recompute=recompute),
        train=TrainConfig(lanes=LANES, segments_per_window=SEGMENTS, precision=precision),
    )


@pytest.mark.parametrize("recompute_logits", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "selective", "layer"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(
    "memory",
    [MemoryConfig("delta", "hard", mix_gate="token"), MemoryConfig("gated_deltanet", "none")],
    ids=["delta", "gated_deltanet"],
)
def test_estimate_against_what_autograd_keeps(memory, sequence_parallel, recompute, precision, recompute_logits):
    """The collectives of a pretended rank do nothing, so numbers mean nothing; bytes do."""
    config = run_config(memory, sequence_parallel, recompute, precision)
    config.bptt.recompute_logits = recompute_logits
    options = StageOptions(
        precision=precision,
        recompute=recompute,
        sequence_parallel=sequence_parallel,
        recompute_logits=recompute_logits,
    )
    with pretended_rank(0, TENSOR, tensor=TENSOR, pipeline=1):
        stage = DecoderStage(
            config.model, options, vocab_size=512, first_layer=0, last_layer=2, tensor_rank=0, tensor_size=TENSOR
        )
        stage.initialize(seed=0)
        tokens = torch.randint(0, 512, (LANES, SEGMENTS, LENGTH))
        measured = saved_bytes(stage, tokens, tokens, torch.zeros(LANES, SEGMENTS, dtype=torch.bool))
    (rank,) = per_rank_bytes(config, world_size=TENSOR)
    assert rank.chunk_activations == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("rule", ["linear", "delta", "gated_deltanet"])
def test_a_context_rank_keeps_its_part_of_a_chunk_and_its_own_transition(rule):
    context, found = 2, {}
    for ranks in (1, context):
        config = run_config(MemoryConfig(rule), False, "none", "bf16")
        config.parallel.tensor, config.parallel.context, config.bptt.recompute_logits = 1, ranks, True
        config.train.segments_per_window = 4
        options = StageOptions(precision="bf16", recompute_logits=True)
        with pretended_rank(0, ranks, tensor=1, pipeline=1, context=ranks):
            group = ContextGroup(parallel_state.get_context_parallel_group(), 0, ranks) if ranks > 1 else None
            stage = DecoderStage(
                config.model,
                options,
                vocab_size=512,
                first_layer=0,
                last_layer=2,
                tensor_rank=0,
                tensor_size=1,
                context=group,
            )
            stage.initialize(seed=0)
            tokens, reset = torch.zeros(LANES, 4 // ranks, LENGTH, dtype=torch.int64), torch.zeros(LANES, 4)
            with whole_tensors():
                found[ranks] = saved_bytes(stage, tokens, tokens, reset.bool())
        (rank,) = per_rank_bytes(config, world_size=ranks)
        assert rank.chunk_activations == pytest.approx(found[ranks], rel=0.02)
    assert found[context] == pytest.approx(found[1] / context, rel=0.03)
