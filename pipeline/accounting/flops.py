"""What a model costs, by arithmetic: parameters, FLOPs per token, carried memory.

Bytes per rank are in `pipeline.accounting.footprint`.

Conventions. A multiply-add is 2 FLOPs. Matrix products are counted; norms, softmax, rotary, normalisers and other
element-wise work are not. What is counted is what the mathematics needs, not what a kernel happens to execute: local
attention is causal and costs S / 2 keys per query on average (a kernel that computes the masked half too does twice
that; where documents share segments what they need is known of a batch alone), and the delta rules are counted token by
token. Together with the measured time per token this gives
model FLOPs utilisation.

With h hidden size, d head dimension, n query heads, g key/value heads, f MLP width, V padded vocabulary, per token:

    projections       layers * (2 h d (n + 2 g) + 2 n d h)
    mlp               layers * 6 h f
    local_attention   layers * 4 n d * S / 2, with a sliding context 3 S / 2
    memory            layers with one * (what the rule says: 2 n d^2 read + 2 g d^2 write
                                [+ 2 g d^2 the value already stored: all but linear]
                                [+ 2 h g decay: gated_deltanet, delta_product]
                                [+ (N - 1) (4 g d^2 + 2 h g (2 d + 1)) the other steps of N: delta_product]
                                [+ 32 g (h + d) decay, erase and write gate each: kda the first, gdn2 all]
                                [+ 8 d (n + 2 g) short convolutions]
                                [+ 2 h g write gate] [+ 2 h n mix gate per token])
    output            2 h V

With one key/value head per query head, `linear` then costs 4 n d^2 against 2 n d S: d / (S / 2) of the local attention,
12.5 % at d = 128 and S = 2048, and `delta` 18.8 %. Sharing key/value heads makes writing cheaper: 7.8 % and 9.4 % with
Llama 3 8B's 8 for 32.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from model.config import ModelConfig, layer_kinds, layer_shape
from model.rules import build_rule, empty_state
from model.sharding import padded_vocab_size


def embedding_rows(config: ModelConfig, vocab: int | None = None) -> int:
    """Rows of the embedding, padding included.

    Args:
        config: the model.
        vocab: tokens of the tokenizer; None takes `config.vocab_size`.

    Raises:
        ValueError: neither says how many tokens there are.
    """
    vocab = config.vocab_size if vocab is None else vocab
    if vocab is None:
        raise ValueError("model.vocab_size is null: set it, or take it from the tokenizer of the prepared data")
    return padded_vocab_size(vocab, config.vocab_size_multiple)


def layer_parameters(config: ModelConfig, tensor: int = 1) -> dict[str, int]:
    """Parameters of a layer that is as `config` says (of one without a memory that of `model.config.layer_config`) on
    one of `tensor` tensor-parallel ranks: `attention`, `mlp`, `norms` (on every rank alike), `beta`, `write_gate` and
    `rule` (what the memory rule adds)."""
    layer = layer_shape(config)
    _, heads, groups, dim = layer
    hidden, memory = config.hidden_size, config.memory
    remembers = memory.rule != "none"
    gated = remembers and memory.write_gate != "none"
    bias = dim * (heads + 2 * groups) // tensor if config.qkv_bias else 0
    rule = build_rule(memory)
    own = {} if rule is None else rule.parameters(layer)
    return {
        "attention": hidden * dim * (heads + 2 * groups) // tensor + heads * dim * hidden // tensor + bias,
        "mlp": 3 * hidden * config.ffn_hidden_size // tensor,
        "norms": 2 * hidden + (2 * dim if config.qk_norm else 0),
        "beta": heads * (hidden + 1 if memory.mix_gate == "token" else 1) // tensor if remembers else 0,
        "write_gate": groups * (hidden + 1) // tensor if gated else 0,
        "rule": sum(math.prod(parameter.shape) for parameter in own.values()) // tensor,
    }


def parameter_count(config: ModelConfig, vocab: int | None = None) -> dict[str, int]:
    """Exact parameters of the whole model.

    Returns:
        `embedding`, `output` (0 when tied), `layers`, `final_norm`, `total`; and, part of `layers`, what only this
        model has: `beta`, `write_gate` and `rule`.
    """
    embedding = embedding_rows(config, vocab) * config.hidden_size
    output = 0 if config.tie_embeddings else embedding
    parts: Counter[str] = Counter()
    for kind, count in layer_kinds(config):
        parts.update({part: count * number for part, number in layer_parameters(kind).items()})
    layers = parts.total()
    return {
        "embedding": embedding,
        "output": output,
        "layers": layers,
        **{part: parts[part] for part in ("beta", "write_gate", "rule")},
        "final_norm": config.hidden_size,
        "total": embedding + output + layers + config.hidden_size,
    }


def forward_flops_per_token(config: ModelConfig, vocab: int | None = None) -> dict[str, float]:
    """FLOPs of a forward pass per token: `projections`, `mlp`, `local_attention`, `memory`, `output`, `total`, by the
    module's conventions. They do not depend on the document's length."""
    flops = layers_flops_per_token(config) | {"output": 2 * config.hidden_size * embedding_rows(config, vocab)}
    return flops | {"total": sum(flops.values())}


def layers_flops_per_token(config: ModelConfig, layers: Iterable[int] | None = None) -> dict[str, float]:
    """Those of some layers (null: all): `projections`, `mlp`, `local_attention`, `memory`."""
    flops: Counter[str] = Counter()
    for kind, count in layer_kinds(config, layers):
        flops.update({part: count * number for part, number in _layer_flops_per_token(kind).items()})
    return dict(flops)


def _layer_flops_per_token(config: ModelConfig) -> dict[str, float]:
    layer = layer_shape(config)
    _, heads, groups, dim = layer
    hidden, memory = config.hidden_size, 0
    rule = build_rule(config.memory)
    if rule is not None:
        memory = rule.flops_per_token(layer)
        if config.memory.write_gate != "none":
            memory += 2 * hidden * groups
        if config.memory.mix_gate == "token":
            memory += 2 * hidden * heads
    return {
        "projections": 2 * hidden * dim * (heads + 2 * groups) + 2 * heads * dim * hidden,
        "mlp": 6 * hidden * config.ffn_hidden_size,
        "local_attention": 4 * heads * dim * keys_per_query(config),
        "memory": memory,
    }


def keys_per_query(config: ModelConfig) -> float:
    """What a token sees in the local attention of a whole segment, on average."""
    return config.segment_length * (1.5 if config.local_context == "sliding" else 0.5)


def train_flops_per_token(
    config: ModelConfig,
    vocab: int | None = None,
    *,
    recompute: str = "none",
    recompute_logits: bool = False,
    attended: float = 1.0,
) -> float:
    """FLOPs of forward and backward per token: three forward passes, plus what `bptt.recompute` runs once more, and the
    output matrix where logits are made again.

    Model FLOPs utilisation takes `recompute="none"` whatever the run does, since work done twice is not progress; the
    run's own setting gives the FLOPs that the hardware executes.

    Args:
        attended: the share of `keys_per_query` that the local attention sees; less than 1 where documents share
            segments.

    Raises:
        ValueError: `recompute` is not a setting of `bptt.recompute`.
    """
    flops = forward_flops_per_token(config, vocab)
    unseen = (1 - attended) * flops["local_attention"]
    flops |= {part: flops[part] - unseen for part in ("local_attention", "total")}
    again = {
        "none": 0.0,
        "selective": flops["local_attention"] + flops["memory"],
        "layer": flops["total"] - flops["output"],
        "window": flops["total"],
    }
    if recompute not in again:
        raise ValueError(f"recompute is {recompute!r}, must be one of {', '.join(again)}")
    return 3 * flops["total"] + again[recompute] + (flops["output"] if recompute_logits else 0.0)


def memory_state_bytes(config: ModelConfig, precision: str = "fp32", layers: Iterable[int] | None = None) -> int:
    """Bytes that one lane carries through some layers (null: all): M `[d, d]` for each key/value head and what else the
    rule keeps, in float32 (float64 with fp64); with a sliding local context the previous segment's keys and values, in
    the precision of the run."""
    memory = torch.float64 if precision == "fp64" else torch.float32
    context = torch.bfloat16 if precision == "bf16" else memory
    options = {"dtype": memory, "context_dtype": context, "device": torch.device("meta")}
    states = [(empty_state(kind, layer_shape(kind), 1, **options), n) for kind, n in layer_kinds(config, layers)]
    return sum(n * sum(x.numel() * x.element_size() for x in state or ()) for state, n in states)


def measured_matmul_peak(
    dtype: torch.dtype, device: torch.device | str, *, seconds: float = 0.3, sizes: Sequence[int] | None = None
) -> float:
    """The best rate in FLOP/s that square matrix products of `dtype` reach on this process's share of `device`: the
    denominator of model FLOPs utilisation.

    Processes that share a processor should measure at the same time, since they compute at the same time.

    Args:
        dtype: element type of both factors.
        device: where to multiply.
        seconds: about how long the measurement may take in all.
        sizes: edge lengths to try, ascending; None takes such as saturate the kind of device.
    """
    device = torch.device(device)
    if sizes is None:
        sizes = (256, 512, 1024) if device.type == "cpu" else (2048, 4096, 8192)
    own = torch.Generator(device).manual_seed(0)  # the run's random state stays as it is
    budget_s = seconds / len(sizes)
    best = 0.0
    for size in sizes:
        left, right = (torch.rand(size, size, generator=own, device=device).to(dtype) for _ in range(2))
        _time_products(left, right, 1)  # the first product of a shape also chooses and loads its kernel
        once_s = _time_products(left, right, 1)
        repeats = max(1, int(budget_s / once_s))
        best = max(best, repeats * 2 * size**3 / _time_products(left, right, repeats))
        if once_s > budget_s:
            break  # a larger one would take eight times as long
    return best


def _time_products(left: torch.Tensor, right: torch.Tensor, repeats: int) -> float:
    """Seconds that `repeats` products take, waiting for a device that works in the background."""
    result = torch.empty_like(left)
    if left.device.type != "cpu":
        torch.accelerator.synchronize(left.device)
    start = time.perf_counter()
    for _ in range(repeats):
        torch.matmul(left, right, out=result)
    if left.device.type != "cpu":
        torch.accelerator.synchronize(left.device)
    return time.perf_counter() - start
