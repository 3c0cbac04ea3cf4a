"""A Hugging Face configuration as a configuration of ours: which models are this project's decoder, and which are not.

The decoder is Llama's: pre-norm layers, rotary embeddings, grouped queries, a gated SiLU MLP. Mistral is the same;
Qwen 2 adds biases to the query, key and value projections, Qwen 3 norms to every head's query and key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from model.config import MemoryConfig, ModelConfig, RopeScalingConfig
from model.hf_describe import EXPORTED, MEMORY_SETTINGS


class Family(NamedTuple):
    """What a `model_type` means for our options, and which of its own options have no counterpart here."""

    qkv_bias: bool = False
    qk_norm: bool = False
    must_be_false: tuple[str, ...] = ()
    slides_only_if: str | None = None
    """The option that turns `sliding_window` on; None: a window that is given is used."""


FAMILIES: dict[str, Family] = {
    "llama": Family(must_be_false=("attention_bias", "mlp_bias"), slides_only_if="use_sliding_window"),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True, slides_only_if="use_sliding_window"),
    "qwen3": Family(qk_norm=True, must_be_false=("attention_bias",), slides_only_if="use_sliding_window"),
}

_ROPE_KEYS = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
        *("mscale", "mscale_all_dim"),
    },
}
_VOCAB_MULTIPLE = 128


def model_config(
    hf: Mapping[str, Any], *, source: str, segment_length: int | None, memory: MemoryConfig | None
) -> ModelConfig:
    """The model section for a Hugging Face `config.json`.

    Args:
        hf: the contents of `config.json`.
        source: its path, for messages.
        segment_length: tokens that the local attention sees; None takes an exported model's own, and for others 2,048,
            or the model's context where that is shorter.
        memory: what a plain model does not have; None for a model that this project exported, with its own.

    Raises:
        ValueError: an architecture, an activation, a rope type or an option that this decoder does not have, or a
            setting that is missing; names it and what would be valid.
    """
    kind = hf.get("model_type")
    if is_exported(hf):
        family = Family(bool(hf.get("qkv_bias")), bool(hf.get("qk_norm")), slides_only_if="use_sliding_window")
        memory, segment_length = _own_memory(hf, memory, source), segment_length or hf.get("segment_length")
    elif kind in FAMILIES:
        family = FAMILIES[kind]
    else:
        raise ValueError(f"{source}: model_type is {kind!r}; this decoder covers {', '.join((*FAMILIES, EXPORTED))}")
    if hf.get("quantization_config"):
        raise ValueError(f"{source}: the weights are quantised (quantization_config); import the unquantised model")
    for name in family.must_be_false:
        if hf.get(name):
            raise ValueError(f"{source}: {name} is true; this decoder has no such biases")
    if (activation := hf.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"{source}: hidden_act is {activation!r}; this decoder has silu")

    def need(name: str) -> Any:
        if hf.get(name) is None:
            raise ValueError(f"{source}: {name} is missing")
        return hf[name]

    heads = need("num_attention_heads")
    base, scaling = _rope(hf, source)
    context = hf.get("max_position_embeddings") or 2048
    config = ModelConfig(
        num_layers=need("num_hidden_layers"),
        hidden_size=need("hidden_size"),
        num_attention_heads=heads,
        num_query_groups=hf.get("num_key_value_heads") or heads,
        kv_channels=hf.get("head_dim") or need("hidden_size") // heads,
        ffn_hidden_size=need("intermediate_size"),
        vocab_size=need("vocab_size"),
        vocab_size_multiple=_vocab_multiple(need("vocab_size")),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        segment_length=segment_length or min(2048, context),
        local_context=hf.get("local_context", "segment") if is_exported(hf) else "segment",
        rope_base=base,
        rope_scaling=scaling,
        norm_epsilon=need("rms_norm_eps"),
        init_std=hf.get("initializer_range") or 0.02,
        memory=memory,
    )
    if config.segment_length > context:
        raise ValueError(
            f"{source}: segments of {config.segment_length} tokens are longer than the model's context, "
            f"max_position_embeddings = {context}"
        )
    slides = family.slides_only_if is None or hf.get(family.slides_only_if)
    window = hf.get("sliding_window") if slides else None
    if window is not None and window < config.segment_length:
        raise ValueError(
            f"{source}: the model's attention slides over sliding_window = {window} tokens: the segment length must "
            f"be at most that, not {config.segment_length}"
        )
    return config


def is_exported(hf: Mapping[str, Any]) -> bool:
    """Whether this is a model of ours, with its memory (see `model.hf_describe`)."""
    return hf.get("model_type") == EXPORTED


def _own_memory(hf: Mapping[str, Any], memory: MemoryConfig | None, source: str) -> MemoryConfig:
    if memory is not None:
        raise ValueError(f"{source}: the model has a memory, {hf.get('memory_rule')}, and keeps it: choose no other")
    hf = {"memory_short_convolution": None} | dict(hf)  # exports from before it existed do not say
    if missing := [f"memory_{name}" for name in MEMORY_SETTINGS if f"memory_{name}" not in hf]:
        raise ValueError(f"{source}: {', '.join(missing)} is missing")
    if unknown := sorted(x for x in hf if x.startswith("memory_") and x.removeprefix("memory_") not in MEMORY_SETTINGS):
        raise ValueError(f"{source}: {', '.join(unknown)} is not known here")
    return MemoryConfig(**{name: hf[f"memory_{name}"] for name in MEMORY_SETTINGS})


def _vocab_multiple(vocab_size: int) -> int:
    """A multiple that needs no padding and leaves tensor parallelism its choices, where the vocabulary has one."""
    unpadded = math.gcd(vocab_size, 3 * _VOCAB_MULTIPLE)
    return unpadded if unpadded >= 8 else _VOCAB_MULTIPLE


def _rope(hf: Mapping[str, Any], source: str) -> tuple[float, RopeScalingConfig]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    given = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    base = float(given.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0)
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    if (part := given.pop("partial_rotary_factor", hf.get("partial_rotary_factor") or 1.0)) != 1.0:
        raise ValueError(f"{source}: partial_rotary_factor is {part}; this decoder turns whole heads")
    if kind == "default":
        return base, RopeScalingConfig()
    if kind not in _ROPE_KEYS:
        raise ValueError(f"{source}: rope type {kind!r}; this decoder has default, {', '.join(_ROPE_KEYS)}")
    given = {name: value for name, value in given.items() if value is not None}
    if unknown := sorted(given.keys() - _ROPE_KEYS[kind]):
        raise ValueError(f"{source}: rope type {kind!r} with {', '.join(unknown)}, which this decoder does not know")
    if kind != "linear":
        original = hf.get("original_max_position_embeddings") or hf.get("max_position_embeddings")
        given.setdefault("original_max_position_embeddings", original)
        if given["original_max_position_embeddings"] is None:
            raise ValueError(f"{source}: rope type {kind!r} without original_max_position_embeddings")
    needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}
    if missing := [name for name in needed[kind] if name not in given]:
        raise ValueError(f"{source}: rope type {kind!r} without {', '.join(missing)}")
    numerator, denominator = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    if numerator and denominator and "attention_factor" not in given and given["factor"] > 1:
        log = 0.1 * math.log(given["factor"])
        given["attention_factor"] = (numerator * log + 1.0) / (denominator * log + 1.0)
    return base, RopeScalingConfig(type=kind, **given)
