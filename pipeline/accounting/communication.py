"""Bytes that a rank sends in one step, by arithmetic.

A ring of n ranks makes each send (n - 1) / n of a tensor to gather it or to reduce and scatter it, and twice that to
reduce it for all (`all-reduce`).

Tensor parallelism. Per layer and token of hidden size h, in numbers of e bytes (k = m bytes for the gates and what a
rule asks of a token, which read float32 in one product; 0 where there are none):

                             with sequence parallelism                              without
    forward                  4 e + k       gather before, scatter behind            4 e            2 all-reduces
    backward                 6 e + 2 k     the same, and inputs gathered again      4 e + 2 k
    recompute selective      e + k                                                  0
    recompute layer          3 e + k                                                2 e

`window` runs forwards again. The embedding and the output matrix add theirs on the first and the last stage.

Context parallelism. Per layer, chunk and lane, whatever the chunk's length; C ranks, each with n query heads and g
key/value heads of dimension d (`docs/context_parallel.md`):

    to all, each way       (C - 1) 2 g d^2 m for the memory, half of it for `linear`
                           (C - 1) g d m for the normaliser of `linear` and `delta`
    to the next, each way  2 S g d e with a sliding context, 3 (n + 2 g) d m with short convolutions

`selective` and `layer` send what goes forward again on the way back, `window` runs forwards again.

Replicas, which hold the same parameters: data x context parallelism. DeepSpeed's ZeRO 1 and 2 reduce all gradients for
all and gather the parameters after the step; ZeRO 3 scatters the gradients and gathers every parameter for every
forward and backward of a chunk (at most: what it keeps in between is not gathered again).

Left out, since small: what the loss, the norms' gradients, a tied embedding's second copy and statistics exchange.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig, layer_kinds, layer_shape
from model.rules import build_rule
from pipeline.accounting.activations import has_token_linears
from pipeline.accounting.footprint import RankBytes
from pipeline.config.derived import (
    lanes_per_microbatch,
    lanes_per_rank,
    number_bytes,
    replicas,
    segments_per_chunk,
)
from pipeline.config.schema import Config


@dataclass(frozen=True)
class ChunkBytes:
    """What one rank sends for one chunk to those that compute it with it."""

    forward: int
    backward: int
    """What recomputation inside the backward pass sends included."""


def chunk_tokens(config: Config, world_size: int) -> int:
    """Tokens of a chunk: of all its lanes, probes included."""
    return lanes_per_microbatch(config, world_size) * segments_per_chunk(config) * config.model.segment_length


def chunks_per_step(config: Config, world_size: int) -> int:
    """Chunks that a stage works off in a step."""
    windows = lanes_per_rank(config, world_size) // lanes_per_microbatch(config, world_size)
    return windows * config.bptt.chunks_per_window


def tensor_bytes(config: Config, world_size: int, *, layers: range, is_first: bool, is_last: bool) -> ChunkBytes:
    """See the module's table, for a stage of these layers."""
    ranks, split = config.parallel.tensor, config.parallel.sequence_parallel
    e = number_bytes(config)
    per_number = [0, 0]
    for kind, count in layer_kinds(config.model, layers):
        k = max(e, 4) if has_token_linears(kind) else 0
        if split:
            forward, backward = 4 * e + k, 6 * e + 2 * k
            again = {"selective": e + k, "layer": 3 * e + k}
        else:
            forward, backward = 4 * e, 4 * e + 2 * k
            again = {"selective": 0, "layer": 2 * e}
        backward += again.get(config.bptt.recompute, 0)
        per_number = [per_number[0] + count * forward, per_number[1] + count * backward]
    embedding, output = ((e, e), (e, 2 * e)) if split else ((2 * e, 0), (0, 2 * e))
    for own, holds in ((embedding, is_first), (output, is_last)):
        if holds:
            per_number = [a + b for a, b in zip(per_number, own, strict=True)]
    sent = [chunk_tokens(config, world_size) * config.model.hidden_size * n * (ranks - 1) // ranks for n in per_number]
    return ChunkBytes(*sent)


def context_bytes(config: Config, world_size: int, *, layers: range) -> ChunkBytes:
    """What one rank sends to its context-parallel neighbours for one chunk, see the module's table; the same however
    long the chunk is.

    Args:
        layers: of the stage.
    """
    ranks, model = config.parallel.context, config.model
    if ranks == 1:
        return ChunkBytes(0, 0)
    e = number_bytes(config)
    m = max(e, 4)
    layer, sent = layer_shape(model, config.parallel.tensor), 0
    for kind, count in layer_kinds(model, layers):
        rule = build_rule(kind.memory)
        if model.local_context == "sliding":
            sent += count * 2 * model.segment_length * layer.groups * layer.dim * e
        if rule is not None:
            sent += count * m * ((ranks - 1) * sum(rule.exchanges(layer)) + rule.halo(layer))
    again = config.bptt.recompute in ("selective", "layer")
    times = lanes_per_microbatch(config, world_size)
    return ChunkBytes(times * sent, times * sent * (1 + again))


def context_messages(config: Config, layers: range) -> int:
    """Exchanges and messages to the next rank in a forward pass through these layers, one after the other; as many go
    back."""
    if config.parallel.context == 1:
        return 0
    return sum(
        count * _layer_messages(kind, config.parallel.tensor) for kind, count in layer_kinds(config.model, layers)
    )


def _layer_messages(model: ModelConfig, tensor: int) -> int:
    rule, sliding = build_rule(model.memory), model.local_context == "sliding"
    if rule is None:
        return sliding
    layer = layer_shape(model, tensor)
    return len(rule.exchanges(layer)) + (rule.halo(layer) > 0) + sliding


def reduction_bytes(config: Config, world_size: int, gradients: int) -> int:
    """What one rank sends to the other replicas to sum `gradients` bytes of gradients."""
    ranks = replicas(config, world_size)
    return (1 if config.parallel.zero_stage == 3 else 2) * gradients * (ranks - 1) // ranks


def gathering_bytes(config: Config, world_size: int, needs: RankBytes) -> int:
    """What one rank of a stage sends to the other replicas in a step for them to have its parameters."""
    ranks, times = replicas(config, world_size), 1
    if config.parallel.zero_stage == 3:
        passes = 3 if config.bptt.recompute == "window" else 2
        times = passes * chunks_per_step(config, world_size)
    return times * needs.whole_parameters * (ranks - 1) // ranks


def data_bytes(config: Config, world_size: int, needs: RankBytes) -> int:
    """What one rank of a stage sends to the other replicas in a step."""
    return reduction_bytes(config, world_size, needs.gradients) + gathering_bytes(config, world_size, needs)
