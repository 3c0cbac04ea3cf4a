"""Bytes that one chunk keeps from its forward to its backward pass, by arithmetic.

With e bytes per number of the residual stream (2 in bf16), m of the memory (4; 8 in fp64) and c = m if e < m else 0 for
float32 copies, h hidden size (with sequence parallelism a rank's share of it: what is between the matrices is split
along the tokens, and gathered again where a matrix needs it), and of one rank n query and g key/value heads of
dimension d and an MLP width f, autograd keeps per layer and token

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
                g (d + 64 + 4) m                           gated_deltanet
                all of g N times                           delta_product of N steps
                g (4 d + 16) m                             kda
                g (8 d + 48) m                             gdn2
                (n + 2 g) d m, twice behind SiLU           short convolutions
                + 3 n m                                    mix gate per token
                + h c                                      a decay, write gate, mix gate per token
                + r h' m per layer, not per token          several of these: their r rows in one matrix, h' not shared
    packing     d e n + n m                                heads put together, the memory's share per token
    states      g d^2 m per segment (linear), 4 times that (delta), or 4 times per 64 tokens less 1 (the others)
                with context parallelism g d^2 m per lane: what a rank's segments do to a state (all but linear)

with packing a stage's layers share one mask, S e per token, twice that with a sliding context (on a CPU there is none);
and the last stage 2 h e for the final norm, 2 m + 9 for the loss, and e per logit where logits are kept
(`bptt.recompute_logits`; see `model.layers.loss`). A **chunk** is one microbatch's lanes x segments_per_window /
chunks_per_window segments. Recomputation leaves less per chunk, and one part at a time in full:

    selective   each layer without its attention, that is 3 h e + 3 f e                 one layer's attention in full
    layer       h e per layer                                                           one layer in full
    window      the input of the chunk and the memory that each layer carries in        one chunk in full
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig, layer_kinds, layer_shape
from model.rules import build_rule
from pipeline.accounting.flops import embedding_rows, layer_parameters, memory_state_bytes
from pipeline.config.derived import (
    lanes_per_microbatch,
    number_bytes,
    recomputes_logits,
    segments_per_chunk,
)
from pipeline.config.schema import Config


@dataclass(frozen=True)
class Chunk:
    """Bytes of one chunk, of all its lanes."""

    tokens: int
    kept: int
    """From forward to backward."""
    once: int
    """What recomputation makes again and holds, in full."""
    of_loss: int
    """Part of `kept` (of `once`, where whole chunks run again): gone when the loss has gone back."""
    in_layer: int
    """The worst that a layer's backward pass has beside `kept`."""
    logits_again: bool


def chunk_bytes(
    config: Config, world_size: int, vocab: int | None, layers: range, is_last: bool, *, masked: bool = True
) -> Chunk:
    """Of a stage of these layers.

    Args:
        vocab: tokens of the tokenizer; None takes `model.vocab_size`.
        is_last: the stage has the loss.
        masked: see `pipeline.accounting.footprint.per_rank_bytes`.
    """
    model, parallel = config.model, config.parallel
    tensor = parallel.tensor
    lanes = lanes_per_microbatch(config, world_size)
    segments = lanes * segments_per_chunk(config)
    e = number_bytes(config)
    m = max(e, 4)
    hidden, tokens = _hidden_between_matrices(config), segments * model.segment_length
    mlp = tokens * e * 3 * model.ffn_hidden_size // tensor
    norm_and_mlp = tokens * e * 2 * hidden + mlp
    attentions = []  # bytes, and how many layers have them
    for kind, count in layer_kinds(model, layers):
        attention = tokens * hidden * 2 * e + _attention_bytes(kind, tensor, hidden, e, m, segments)
        if config.data.packing:
            _, heads, _, dim = layer_shape(kind, tensor)
            attention += tokens * heads * (dim * e + (m if kind.memory.rule != "none" else 0))
        if config.parallel.context > 1:
            attention += lanes * m * _own_transition(kind, tensor)
        attentions.append((attention, count))
    worst = max(attention for attention, _ in attentions)
    columns = embedding_rows(model, vocab)
    logits_again = is_last and recomputes_logits(config, world_size, columns)
    of_loss = 0
    if is_last:
        of_loss = tokens * (hidden * 2 * e + 2 * m + 9 + (0 if logits_again else e * columns // tensor))
    residual = tokens * hidden * e
    mask = tokens * e * _mask_columns(config) if masked else 0
    count = len(layers)
    everything = sum(n * attention for attention, n in attentions) + count * norm_and_mlp + mask + of_loss
    kept, once = {
        "none": (everything, 0),
        "selective": (count * (residual + norm_and_mlp) + mask + of_loss, worst),
        "layer": (count * residual + mask + of_loss, worst + norm_and_mlp),
        "window": (residual + lanes * lane_state_bytes(config, layers), everything),
    }[config.bptt.recompute]
    gate_and_up = layer_parameters(model, tensor)["mlp"] * 2 // 3  # one matrix, a layer's largest
    in_mlp = gate_and_up * e + mlp + residual
    in_layer = max(once, in_mlp) if config.bptt.recompute == "selective" else once + in_mlp
    if parallel.sequence_parallel:  # a matrix's input, gathered again, and the whole gradient of it
        in_layer += 2 * tokens * model.hidden_size * e
    return Chunk(tokens, kept, once, of_loss, in_layer, logits_again)


def lane_state_bytes(config: Config, layers: range) -> int:
    """Memory of one lane in these layers of one tensor-parallel rank."""
    return memory_state_bytes(config.model, config.train.precision, layers) // config.parallel.tensor


def _hidden_between_matrices(config: Config) -> int:
    """Numbers of the residual stream that a rank holds per token."""
    return config.model.hidden_size // (config.parallel.tensor if config.parallel.sequence_parallel else 1)


def _mask_columns(config: Config) -> int:
    """Keys that the mask of packed documents has for every token; 0 without packing. With
    `model.packed_attention=flex`, whose blocks are few numbers, as if there were one: more than is kept."""
    if not config.data.packing:
        return 0
    return config.model.segment_length * (2 if config.model.local_context == "sliding" else 1)


def _own_transition(model: ModelConfig, tensor: int) -> int:
    """Numbers per lane that a context-parallel rank keeps of the pair that it has sent."""
    rule, layer = build_rule(model.memory), layer_shape(model, tensor)
    square = layer.groups * layer.dim**2
    return square if rule is not None and max(rule.exchanges(layer)) > square else 0


def has_token_linears(model: ModelConfig) -> bool:
    """A layer has a linear function per token beside the q, k, v projection (`model.layers.token_linears`)."""
    return bool(_token_linear_rows(model, 1))


def _token_linear_rows(model: ModelConfig, tensor: int) -> list[int]:
    """Rows of each of these functions on a rank."""
    rule, layer = build_rule(model.memory), layer_shape(model, tensor)
    rows = [layer.groups] if model.memory.write_gate != "none" else []
    if rule is not None:
        rows += [layer.heads] if model.memory.mix_gate == "token" else []
        rows += [layer.groups * numbers for numbers in rule.token_inputs(layer).values()]
    return rows


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
    joined = 0
    if rows := _token_linear_rows(model, tensor):
        per_token += hidden * c
        joined = sum(rows) * model.hidden_size * m if len(rows) > 1 else 0
    if model.memory.mix_gate == "token":
        per_token += 3 * n * m
    return segments * (length * per_token + per_segment) + joined
