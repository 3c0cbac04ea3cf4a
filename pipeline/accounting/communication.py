"""Bytes that a rank sends in one step, by arithmetic.

A ring of n ranks makes each send (n - 1) / n of a tensor to gather it or to reduce and scatter it, and twice that to
reduce it for all (`all-reduce`).

Tensor parallelism. Per layer and token of hidden size h, in numbers of e bytes (m bytes for the k linear maps of the
memory's gates, which read float32):

                             with sequence parallelism                              without
    forward                  4 e + k m     gather before, scatter behind            4 e            2 all-reduces
    backward                 6 e + 2 k m   the same, and inputs gathered again      4 e + 2 k m
    recompute selective      e + k m                                                0
    recompute layer          3 e + k m                                              2 e

`window` runs forwards again. The embedding and the output matrix add theirs on the first and the last stage.

Data parallelism. DeepSpeed's ZeRO 1 and 2 reduce all gradients for all and gather the parameters after the step; ZeRO 3
scatters the gradients and gathers every parameter for every forward and backward of a chunk (at most: what it keeps in
between is not gathered again).

Left out, since small: what the loss, the norms' gradients, a tied embedding's second copy and statistics exchange.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.rules import build_rule
from pipeline.accounting.footprint import RankBytes
from pipeline.config.derived import (
    data_parallel_size,
    lanes_per_microbatch,
    lanes_per_rank,
    number_bytes,
    segments_per_chunk,
)
from pipeline.config.schema import Config


@dataclass(frozen=True)
class TensorBytes:
    """What one rank sends to its tensor-parallel neighbours for one chunk."""

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


def tensor_bytes(config: Config, world_size: int, *, layers: int, is_first: bool, is_last: bool) -> TensorBytes:
    """See the module's table, for a stage of `layers` layers."""
    ranks, split = config.parallel.tensor, config.parallel.sequence_parallel
    memory, e = config.model.memory, number_bytes(config)
    m = max(e, 4)
    rule = build_rule(memory)
    maps = (memory.write_gate != "none") + (rule is not None and memory.mix_gate == "token")
    maps += 0 if rule is None else len(rule.token_inputs)
    if split:
        forward, backward = 4 * e + maps * m, 6 * e + 2 * maps * m
        again = {"selective": e + maps * m, "layer": 3 * e + maps * m}
        embedding, output = (e, e), (e, 2 * e)
    else:
        forward, backward = 4 * e, 4 * e + 2 * maps * m
        again = {"selective": 0, "layer": 2 * e}
        embedding, output = (2 * e, 0), (0, 2 * e)
    backward += again.get(config.bptt.recompute, 0)
    per_number = [layers * forward, layers * backward]
    for own, holds in ((embedding, is_first), (output, is_last)):
        if holds:
            per_number = [a + b for a, b in zip(per_number, own, strict=True)]
    sent = [chunk_tokens(config, world_size) * config.model.hidden_size * n * (ranks - 1) // ranks for n in per_number]
    return TensorBytes(*sent)


def reduction_bytes(config: Config, world_size: int, gradients: int) -> int:
    """What one rank sends to its data-parallel neighbours to sum `gradients` bytes of gradients."""
    ranks = data_parallel_size(config, world_size)
    return (1 if config.parallel.zero_stage == 3 else 2) * gradients * (ranks - 1) // ranks


def gathering_bytes(config: Config, world_size: int, needs: RankBytes) -> int:
    """What one rank of a stage sends to its data-parallel neighbours in a step for them to have its parameters."""
    ranks, times = data_parallel_size(config, world_size), 1
    if config.parallel.zero_stage == 3:
        passes = 3 if config.bptt.recompute == "window" else 2
        times = passes * chunks_per_step(config, world_size)
    return times * needs.whole_parameters * (ranks - 1) // ranks


def data_bytes(config: Config, world_size: int, needs: RankBytes) -> int:
    """What one rank of a stage sends to its data-parallel neighbours in a step."""
    return reduction_bytes(config, world_size, needs.gradients) + gathering_bytes(config, world_size, needs)
