"""Bytes that each rank needs, by arithmetic, before anything is built.

Weights. Under bf16 the matrices are bfloat16 and their gradients are summed in float32: 2 + 4 bytes a parameter; what
norms, gates and memory rules own is float32, 4 + 4 bytes, as all parameters are under fp32 (8 + 8 under fp64). The
float32 masters and Adam's two moments, 12 bytes a parameter, are shared out over the data-parallel ranks. Gradients are
shared out at no ZeRO stage: our schedule feeds them under `coalesce_grad_reduction`, which keeps them whole to the end
of the step, so stage 2 saves nothing over stage 1 here. Stage 3 shares out the parameters and gathers at least a layer
(or embedding) at a time.

Memory state. That of each lane of the rank in the layers of the stage, twice: the one from before a step is kept until
the step is accepted.

Activations: what autograd keeps from forward to backward. With e bytes per number of the residual stream (2 in bf16), m
of the memory (4; 8 in fp64) and c = m if e < m else 0 for float32 copies, h hidden size (with sequence parallelism a
rank's share of it: what is between the matrices is split along the tokens, and gathered again where a matrix needs it),
and of one rank n query and g key/value heads of dimension d and an MLP width f, a layer keeps per token

    norms       4 h e                                      what goes in and what comes out
    mlp         3 f e
    attention   d e (3 n + 3 g) + 4 n                      flash-like: no S x S matrix
                + d e n                                    with a memory: what is projected
                + d e (n + 2 g)                            query and key norms
    + sliding   d e (2 n + 5 g) + 4 n
    memory      n (2 d + 1) m + g d m                      every rule: q and k behind its map, reads
                g d (c + m with a write gate)              linear
                g (2 d + 1) m                              delta
                g (4 d + 1 + 64) m, and 64 g m with gates  deltanet, gated_deltanet
                g (d + 64 + 4) m + h c                     gated_deltanet
                (n + 2 g) d m, twice behind SiLU           short convolutions
                + h c                                      write gate
                + h c + 3 n m                              mix gate per token
    states      g d^2 m per segment (linear), 4 times that (delta), or 4 times per 64 tokens less 1 (the others)

and the last stage 2 h e for the final norm, 2 m + 9 for the loss, and e per logit where logits are kept
(`bptt.recompute_logits`; see `model.layers.loss`). A **chunk** is one
microbatch's lanes x segments_per_window / chunks_per_window segments. Stage i of P holds chunks_per_window + P - 1 - i
chunks (never more than a step has). Recomputation leaves less per chunk, and one part at a time in full:

    selective   each layer without its attention, that is 3 h e + 3 f e                 one layer's attention in full
    layer       h e per layer                                                           one layer in full
    window      the input of the chunk and the memory that each layer carries in        one chunk in full

Working space: the gradient of the largest matrix, which is whole before it is added to what other chunks gave (e bytes
a number, those of embedding and output 4 at least); on the last stage also a block of logits that are made again.

Not counted: what a kernel uses only inside itself, communication buckets, the allocator's waste, the loader. Held
against a trace of a step of fake tensors (every live byte of gradients and activations; Llama 3 8B, tensor 8 x
pipeline 4, bf16, recompute selective): stage 0 3.11 GiB here and 3.05 there, without sequence parallelism 5.72 and
5.74; stage 3 2.03 and 2.15.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig, layer_shape
from model.decoder import split_layers
from model.layers.loss import BLOCK_ROWS
from model.rules import build_rule
from pipeline.accounting.flops import embedding_rows, layer_parameters, memory_state_bytes
from pipeline.config.derived import (
    data_parallel_size,
    lanes_per_microbatch,
    lanes_per_rank,
    number_bytes,
    recomputes_logits,
    segments_per_chunk,
)
from pipeline.config.schema import Config
from pipeline.schedule.operations import expected_peak_live_chunks

OPTIMIZER_COPIES = 3
"""Of every parameter: the master and Adam's two moments."""


@dataclass(frozen=True)
class RankBytes:
    """What each rank of one pipeline stage holds, in bytes."""

    stage: int
    layers: int
    """Layers of the stage."""
    parameter_count: int
    """Parameters of this rank (its tensor-parallel part of the stage), before ZeRO shares them out."""
    parameters: int
    whole_parameters: int
    """The same before ZeRO 3 shares them out: what is gathered."""
    gradients: int
    optimizer: int
    memory_state: int
    live_chunks: int
    """Chunks whose activations are held at once, at most."""
    chunk_activations: int
    """What one live chunk keeps for its backward pass."""
    recompute_activations: int
    """What recomputation holds on top, once; 0 without."""
    working: int
    """What a backward pass needs for a moment."""
    late_gradients: int
    """Gradients that come as the activations go, in a step of a single chunk: not alive with them."""

    @property
    def activations(self) -> int:
        """All live chunks, and what recomputation holds."""
        return self.live_chunks * self.chunk_activations + self.recompute_activations

    @property
    def total(self) -> int:
        held = self.parameters + self.gradients - self.late_gradients + self.optimizer + self.memory_state
        return held + self.activations + self.working


def per_rank_bytes(config: Config, world_size: int, vocab: int | None = None) -> list[RankBytes]:
    """The needs of a rank of every pipeline stage, first to last; the ranks of a stage are alike.

    Args:
        config: a validated configuration.
        world_size: processes of the run.
        vocab: tokens of the tokenizer; None takes `model.vocab_size`.
    """
    parallel = config.parallel
    bounds = split_layers(config.model.num_layers, parallel.pipeline, parallel.layers_per_stage)
    return [_stage_bytes(config, world_size, vocab, stage, last - first) for stage, (first, last) in enumerate(bounds)]


def _stage_bytes(config: Config, world_size: int, vocab: int | None, stage: int, layers: int) -> RankBytes:
    model, parallel = config.model, config.parallel
    e = number_bytes(config)
    number = max(e, 4)
    replicas = data_parallel_size(config, world_size)

    of_layer = layer_parameters(model, parallel.tensor)
    layer = sum(of_layer.values())
    gate_and_up = of_layer["mlp"] * 2 // 3  # one matrix, a layer's largest
    embedding = embedding_rows(model, vocab) * model.hidden_size // parallel.tensor
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    # Tied embeddings on different stages are two copies.
    matrices = is_first + is_last - (is_first and is_last and model.tie_embeddings)
    parameters = layers * layer + matrices * embedding + is_last * model.hidden_size
    wide_of_layer = sum(of_layer[part] for part in ("norms", "beta", "write_gate", "rule"))
    wide = layers * wide_of_layer + is_last * model.hidden_size
    whole = held = parameters * e + wide * (number - e)
    if parallel.zero_stage == 3:
        held = -(-whole // replicas) + max(layer * e + wide_of_layer * (number - e), embedding * e)

    lanes = lanes_per_microbatch(config, world_size)
    segments = segments_per_chunk(config)
    microbatches = lanes_per_rank(config, world_size) // lanes
    logits_again = is_last and recomputes_logits(config, world_size, embedding_rows(model, vocab))
    chunk, once = _chunk_activations(config, layers, lanes * segments, lanes, is_last, vocab, logits_again)
    block_rows = min(BLOCK_ROWS, lanes * segments * model.segment_length) if logits_again else 0
    block = block_rows * embedding // model.hidden_size * number_bytes(config)
    lane_state = _lane_state_bytes(config, layers)
    working = max(embedding * number if matrices else 0, gate_and_up * e) + block
    if config.bptt.recompute == "layer":
        between = 3 * model.ffn_hidden_size // parallel.tensor + _hidden_between_matrices(config)
        working = max(working, gate_and_up * e + lanes * segments * model.segment_length * between * e)
    single = microbatches * config.bptt.chunks_per_window == 1 and e == number
    return RankBytes(
        stage=stage,
        layers=layers,
        parameter_count=parameters,
        parameters=held,
        whole_parameters=whole,
        gradients=parameters * number,
        optimizer=-(-parameters // replicas) * OPTIMIZER_COPIES * number,
        memory_state=2 * lanes_per_rank(config, world_size) * lane_state,
        # With window recomputation what a live chunk keeps is its input and its memory.
        live_chunks=expected_peak_live_chunks(
            stages=parallel.pipeline,
            stage=stage,
            microbatches=microbatches,
            chunks=config.bptt.chunks_per_window,
            replay=False,
        ),
        chunk_activations=chunk,
        recompute_activations=once,
        working=working,
        late_gradients=min(parameters * number, chunk + once) if single else 0,
    )


def _lane_state_bytes(config: Config, layers: int) -> int:
    """Memory of one lane in `layers` layers of one tensor-parallel rank."""
    whole = memory_state_bytes(config.model, config.train.precision)
    return whole * layers // (config.model.num_layers * config.parallel.tensor)


def _chunk_activations(
    config: Config,
    layers: int,
    segments: int,
    lanes: int,
    is_last: bool,
    vocab: int | None,
    logits_again: bool,
) -> tuple[int, int]:
    """Bytes that a chunk of `segments` segments, those of all its lanes, keeps; and what recomputation holds once."""
    model, tensor = config.model, config.parallel.tensor
    e = number_bytes(config)
    m = max(e, 4)
    hidden, tokens = _hidden_between_matrices(config), segments * model.segment_length
    norm_and_mlp = tokens * e * (2 * hidden + 3 * model.ffn_hidden_size // tensor)
    attention = tokens * hidden * 2 * e + _attention_bytes(model, tensor, hidden, e, m, segments)
    output = 0
    if is_last:
        logits = 0 if logits_again else e * embedding_rows(model, vocab) // tensor
        output = tokens * (hidden * 2 * e + 2 * m + 9 + logits)
    residual = tokens * hidden * e
    everything = layers * (attention + norm_and_mlp) + output
    kinds = {
        "none": (everything, 0),
        "selective": (layers * (residual + norm_and_mlp) + output, attention),
        "layer": (layers * residual + output, attention + norm_and_mlp),
        "window": (residual + lanes * _lane_state_bytes(config, layers), everything),
    }
    return kinds[config.bptt.recompute]


def _hidden_between_matrices(config: Config) -> int:
    """Numbers of the residual stream that a rank holds per token."""
    return config.model.hidden_size // (config.parallel.tensor if config.parallel.sequence_parallel else 1)


def _attention_bytes(model: ModelConfig, tensor: int, hidden: int, e: int, m: int, segments: int) -> int:
    """The rows `attention`, `memory` and `states` of the module's table, for `segments` segments."""
    layer, length = layer_shape(model, tensor)._replace(hidden=hidden), model.segment_length
    _, n, g, d = layer
    c = m if e < m else 0
    per_token, per_segment = d * e * (3 * n + 3 * g) + 4 * n, 0
    rule = build_rule(model.memory)
    if model.qk_norm:
        per_token += d * e * (n + 2 * g)
    if model.local_context == "sliding":
        per_token += d * e * (2 * n + 5 * g) + 4 * n
    if rule is not None:
        per_token += d * e * n
        gated = model.memory.write_gate != "none"
        of_rule, per_segment = rule.saved_bytes(layer, length, m, c, gated=gated)
        per_token += of_rule
    if model.memory.write_gate != "none":
        per_token += hidden * c
    if model.memory.mix_gate == "token":
        per_token += hidden * c + 3 * n * m
    return segments * (length * per_token + per_segment)
