"""Bytes that a plan says are sent, against the collectives of a rank whose neighbours are pretended."""

from __future__ import annotations

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from model.config import MemoryConfig, ModelConfig
from model.decoder import DecoderStage
from model.layers.decoder_layer import StageOptions
from pipeline.accounting.communication import context_bytes, context_messages, data_bytes, tensor_bytes
from pipeline.accounting.footprint import per_rank_bytes
from pipeline.accounting.planner import pretended_rank
from pipeline.config.schema import BpttConfig, Config, ParallelConfig, TrainConfig

TENSOR, LANES, SEGMENTS, LENGTH, LAYERS = 4, 2, 2, 32, 2


class Collectives(TorchDispatchMode):
    """Bytes that one rank of a ring sends in the collectives of whole hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "c10d" in name:
            tensors = [x for x in tree_iter(args) if isinstance(x, torch.Tensor)]
            largest = max(tensors, key=lambda x: x.numel())
            if largest.numel() >= LANES * SEGMENTS * LENGTH * 64:  # not the loss's sums
                twice = 2 if "allreduce" in name else 1
                self.sent += twice * largest.numel() * largest.element_size() * (TENSOR - 1) // TENSOR
                self.calls[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", ["none", "selective", "layer"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(
    "memory",
    [MemoryConfig("delta", "hard", mix_gate="token"), MemoryConfig("gated_deltanet", "none"), MemoryConfig("none")],
    ids=["delta", "gated_deltanet", "none"],
)
def test_tensor_parallel_bytes_of_a_chunk(memory, sequence_parallel, recompute):
    precision = "bf16"  # numbers of 2 bytes in the residual stream, of 4 in the gates
    model = ModelConfig(
        num_layers=LAYERS,
        hidden_size=64,
        num_attention_heads=8,
        num_query_groups=4,
        ffn_hidden_size=80,
        vocab_size=128,
        segment_length=LENGTH,
        tie_embeddings=False,
        memory=memory,
    )
    config = Config(
        model=model,
        parallel=ParallelConfig(tensor=TENSOR, sequence_parallel=sequence_parallel),
        bptt=BpttConfig(recompute=recompute),
        train=TrainConfig(lanes=LANES, segments_per_window=SEGMENTS, precision=precision),
    )
    options = StageOptions(precision=precision, recompute=recompute, sequence_parallel=sequence_parallel)
    with pretended_rank(0, TENSOR, tensor=TENSOR, pipeline=1):
        stage = DecoderStage(
            model, options, vocab_size=128, first_layer=0, last_layer=LAYERS, tensor_rank=0, tensor_size=TENSOR
        )
        stage.initialize(seed=0)
        tokens = torch.randint(0, 128, (LANES, SEGMENTS, LENGTH))
        reset = torch.zeros(LANES, SEGMENTS, dtype=torch.bool)
        with Collectives() as forward:
            output = stage(tokens, stage.empty_memory(LANES, torch.device("cpu")), reset, tokens)
        with Collectives() as backward:
            output.token_loss.sum().backward()
    said = tensor_bytes(config, TENSOR, layers=range(LAYERS), is_first=True, is_last=True)
    assert (said.forward, said.backward) == (forward.sent, backward.sent), (forward.calls, backward.calls)


def test_data_parallel_bytes():
    """An all-reduce of the gradients, and parameters gathered after the step; with ZeRO 3 for every pass of a chunk."""
    config = Config(
        model=ModelConfig(vocab_size=128, num_layers=2),
        train=TrainConfig(lanes=8, segments_per_window=8, lanes_per_microbatch=1),
        bptt=BpttConfig(chunks_per_window=2),
    )
    (needs,) = per_rank_bytes(config, 4)
    gradients = 4 * needs.parameter_count
    assert data_bytes(config, 4, needs) == 3 * gradients * 3 // 4
    assert data_bytes(config, 1, per_rank_bytes(config, 1)[0]) == 0
    config.parallel.zero_stage = 3
    (needs,) = per_rank_bytes(config, 4)
    # Two lanes of two chunks each: forward and backward of four chunks, and the gradients once.
    assert data_bytes(config, 4, needs) == (1 + 2 * 4) * gradients * 3 // 4


def test_bfloat16_matrices_are_gathered_at_half_the_bytes():
    config = Config(
        model=ModelConfig(vocab_size=128, num_layers=2, memory=MemoryConfig("delta", mix_gate="token")),
        train=TrainConfig(lanes=8, segments_per_window=8, precision="bf16"),
    )
    (needs,) = per_rank_bytes(config, 4)
    options = StageOptions(precision="bf16")
    with pretended_rank(0, 1, tensor=1, pipeline=1):
        stage = DecoderStage(
            config.model, options, vocab_size=128, first_layer=0, last_layer=2, tensor_rank=0, tensor_size=1
        )
    parameters = list(stage.parameters())
    assert needs.whole_parameters == needs.parameters == sum(p.nbytes for p in parameters)
    assert needs.gradients == 4 * needs.parameter_count == 4 * sum(p.numel() for p in parameters)
    assert 2 * needs.parameter_count < needs.parameters < 2.05 * needs.parameter_count
    assert data_bytes(config, 4, needs) == (2 * needs.gradients + needs.parameters) * 3 // 4


@pytest.mark.parametrize(
    ("rule", "width"), [("none", 4), ("linear", 4), ("delta", 4), ("gated_deltanet", 4), ("gated_deltanet", 7)]
)
def test_context_parallel_bytes_do_not_grow_with_the_window(rule, width):
    config = Config(
        model=ModelConfig(vocab_size=128, num_layers=2, memory=MemoryConfig(rule, convolution_width=width)),
        parallel=ParallelConfig(context=8),
        train=TrainConfig(lanes=2, segments_per_window=16),
    )
    found = []
    for segments in (16, 256):
        config.train.segments_per_window = segments
        found.append(context_bytes(config, 8, layers=range(2)))
    assert found[0] == found[1]
    heads, dim = config.model.num_attention_heads, config.model.hidden_size // config.model.num_attention_heads
    square, sums = 4 * heads * dim**2, 4 * heads * dim
    numbers = {"none": 0, "linear": square + sums, "delta": 2 * square + sums, "gated_deltanet": 2 * square}[rule]
    halo = 4 * (width - 1) * 3 * heads * dim if rule == "gated_deltanet" else 0  # of its convolutions, to the next rank
    each_way = 2 * 2 * (7 * numbers + halo)  # two lanes, two layers
    assert (found[0].forward, found[0].backward) == (each_way, each_way)
    config.bptt.recompute = "layer"
    assert context_bytes(config, 8, layers=range(2)).backward == 2 * each_way
    config.parallel.context = 1
    assert context_bytes(config, 8, layers=range(2)).forward == context_messages(config, range(2)) == 0
