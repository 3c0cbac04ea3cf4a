"""A Hugging Face configuration as a configuration of ours: which models are this project's decoder, and which are not.

The decoder is Llama's: pre-norm layers, rotary embeddings, grouped queries, a gated SiLU MLP. Mistral is the same;
Qwen 2 adds biases to the query, key and value projections, Qwen 3 norms to every head's query and key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from model.config import MemoryConfig, ModelConfig, RopeScalingConfig
from model.huggingface.describe import EXPORTED, MEMORY_SETTINGS


class Family(NamedTuple):
    """What a `model_type` means for our options, and which of its own options have no counterpart here.

    The defaults are those of transformers' class: what a setting that is not in `config.json` means.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    must_be_false: tuple[str, ...] = ()
    slides: str = "never"
    """`always`: all layers, over `sliding_window` where it is not null. `asked`: with `use_sliding_window`, the layers
    from `max_window_layers` on or those of `layer_types`. `never`: there is no such option."""
    positions: int = 2048
    """Default of `max_position_embeddings`."""
    groups: int | None = None
    """Default of `num_key_value_heads`; None: as many as query heads."""
    head_dim: int | None = None
    """Default of `head_dim`; None: `hidden_size / num_attention_heads`."""


FAMILIES: dict[str, Family] = {
    "llama": Family(must_be_false=("attention_bias", "mlp_bias")),
    "mistral": Family(slides="always", positions=1 << 17, groups=8),
    "qwen2": Family(qkv_bias=True, slides="asked", positions=1 << 15, groups=32),
    "qwen3": Family(
        qk_norm=True, must_be_false=("attention_bias",), slides="asked", positions=1 << 15, groups=32, head_dim=128
    ),
}

_SLIDING_WINDOW = 4096
_MAX_WINDOW_LAYERS = 28
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
    hf: Mapping[str, Any],
    *,
    source: str,
    segment_length: int | None,
    memory: MemoryConfig | None,
    notes: list[str] | None = None,
) -> ModelConfig:
    """The model section for a Hugging Face `config.json`, read as transformers reads it.

    Args:
        hf: the contents of `config.json`, of the right types (see `pipeline.huggingface.schema`).
        source: its path, for messages.
        segment_length: tokens that the local attention sees; None takes an exported model's own, and for others 2,048,
            or the model's context where that is shorter.
        memory: what a plain model does not have; None for a model that this project exported, with its own.
        notes: what stands there twice, and which of the two was taken, is added here.

    Raises:
        ValueError: an architecture, an activation, a rope type or an option that this decoder does not have, or a
            setting that is missing; names it and what would be valid.
    """
    kind = hf.get("model_type")
    notes = [] if notes is None else notes
    if is_exported(hf):
        family = Family(bool(hf.get("qkv_bias")), bool(hf.get("qk_norm")), positions=1 << 20)
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

    heads, layers = need("num_attention_heads"), need("num_hidden_layers")
    base, scaling = _rope(hf, source, notes)
    context = hf.get("max_position_embeddings") or family.positions
    window, sliding_layers = _sliding(hf, family, layers, source, notes)
    config = ModelConfig(
        num_layers=layers,
        hidden_size=need("hidden_size"),
        num_attention_heads=heads,
        num_query_groups=hf.get("num_key_value_heads", family.groups) or heads,
        kv_channels=hf.get("head_dim", family.head_dim) or need("hidden_size") // heads,
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
        sliding_window=window,
        sliding_layers=sliding_layers,
    )
    if config.segment_length > context:
        raise ValueError(
            f"{source}: segments of {config.segment_length} tokens are longer than the model's context, "
            f"max_position_embeddings = {context}"
        )
    if window is not None and window < config.segment_length:
        missing = "" if is_exported(hf) or "sliding_window" in hf else " (its default: config.json does not say)"
        raise ValueError(
            f"{source}: the model's attention slides over sliding_window = {window} tokens{missing}: the segment "
            f"length must be at most that, not {config.segment_length}"
        )
    return config


def is_exported(hf: Mapping[str, Any]) -> bool:
    """Whether this is a model of ours, with its memory (see `model.huggingface.describe`)."""
    return hf.get("model_type") == EXPORTED


def _own_memory(hf: Mapping[str, Any], memory: MemoryConfig | None, source: str) -> MemoryConfig:
    if memory is not None:
        raise ValueError(f"{source}: the model has a memory, {hf.get('memory_rule')}, and keeps it: choose no other")
    # Exports from before these existed do not say.
    absent = {"short_convolution": None, "convolution_width": 4, "num_householder": 2, "layers": None}
    hf = {f"memory_{name}": value for name, value in absent.items()} | dict(hf)
    if missing := [f"memory_{name}" for name in MEMORY_SETTINGS if f"memory_{name}" not in hf]:
        raise ValueError(f"{source}: {', '.join(missing)} is missing")
    if unknown := sorted(x for x in hf if x.startswith("memory_") and x.removeprefix("memory_") not in MEMORY_SETTINGS):
        raise ValueError(f"{source}: {', '.join(unknown)} is not known here")
    return MemoryConfig(**{name: hf[f"memory_{name}"] for name in MEMORY_SETTINGS})


def _vocab_multiple(vocab_size: int) -> int:
    """A multiple that needs no padding and leaves tensor parallelism its choices, where the vocabulary has one."""
    unpadded = math.gcd(vocab_size, 3 * _VOCAB_MULTIPLE)
    return unpadded if unpadded >= 8 else _VOCAB_MULTIPLE


def _sliding(
    hf: Mapping[str, Any], family: Family, layers: int, source: str, notes: list[str]
) -> tuple[int | None, list[int] | None]:
    """The window that attention slides over, None where it does not, and the layers that do, None for all."""
    if is_exported(hf):
        return hf.get("source_sliding_window"), hf.get("source_sliding_layers")
    window = hf.get("sliding_window", _SLIDING_WINDOW)
    if family.slides == "always":
        return window, None
    if family.slides == "never":
        if hf.get("sliding_window") is not None:
            notes.append(f"{source}: sliding_window is not used, as in transformers: a {hf['model_type']} has none")
        return None, None
    window = window if hf.get("use_sliding_window") else None
    kinds = hf.get("layer_types")
    if kinds is None:
        first = hf.get("max_window_layers", _MAX_WINDOW_LAYERS)
        sliding = [layer for layer in range(layers) if window is not None and layer >= first]
    else:
        if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"{source}: layer_types must hold full_attention or sliding_attention for each of the "
                f"num_hidden_layers = {layers} layers"
            )
        sliding = [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"]
        if sliding and window is None:
            raise ValueError(
                f"{source}: layer_types has sliding_attention, but use_sliding_window and sliding_window give no window"
            )
    if not sliding:
        return None, None
    return window, None if len(sliding) == layers else sliding


def _rope(hf: Mapping[str, Any], source: str, notes: list[str]) -> tuple[float, RopeScalingConfig]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    Where several are given, transformers 5 goes by `rope_scaling`, and by what stands in it before what stands beside
    it, but for `original_max_position_embeddings`, where it is the other way round.
    """
    old, new = hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}
    given = dict(old or new)
    place = "rope_scaling" if old else "rope_parameters"
    kind, other = given.pop("rope_type", None), given.pop("type", None)
    if None not in (kind, other) and kind != other:
        notes.append(
            f"{source}: {place} has rope_type {kind!r} and type {other!r}: rope_type counts, as in transformers"
        )
    kind = kind or other or "default"
    theta = given.pop("rope_theta", None)
    if None not in (theta, hf.get("rope_theta")) and theta != hf["rope_theta"]:
        notes.append(
            f"{source}: rope_theta is {theta:g} in {place} and {hf['rope_theta']:g} beside it: {theta:g} counts, as in "
            "transformers"
        )
    base = float(theta or hf.get("rope_theta") or 10000.0)
    if old and new and _without_names(old) != _without_names(new):
        notes.append(
            f"{source}: rope_scaling and rope_parameters are both there and differ: rope_scaling counts alone, as in "
            f"transformers, so the rope type is {kind} with rope_theta {base:g}; rope_parameters says "
            f"{new.get('rope_type') or new.get('type') or 'default'} with rope_theta {new.get('rope_theta', 10000):g}"
        )
    if (part := given.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError(f"{source}: partial_rotary_factor is {part}; this decoder turns whole heads")
    given = {name: value for name, value in given.items() if value is not None}
    if kind == "default":
        if given:
            notes.append(f"{source}: {place} has the rope type default, which uses no {', '.join(sorted(given)[:5])}")
        return base, RopeScalingConfig()
    if kind not in _ROPE_KEYS:
        raise ValueError(f"{source}: rope type {kind!r}; this decoder has default, {', '.join(_ROPE_KEYS)}")
    if kind == "linear":
        given.pop("original_max_position_embeddings", None)
    if unknown := sorted(given.keys() - _ROPE_KEYS[kind]):
        raise ValueError(f"{source}: rope type {kind!r} with {', '.join(unknown)}, which this decoder does not know")
    if kind != "linear":
        within, beside = given.get("original_max_position_embeddings"), hf.get("original_max_position_embeddings")
        if None not in (within, beside) and within != beside:
            notes.append(
                f"{source}: original_max_position_embeddings is {within} in {place} and {beside} beside it: {beside} "
                "counts, as in transformers"
            )
        original = beside or within or hf.get("max_position_embeddings")
        if original is None:
            raise ValueError(f"{source}: rope type {kind!r} without original_max_position_embeddings")
        given["original_max_position_embeddings"] = original
    needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}
    if missing := [name for name in needed[kind] if name not in given]:
        raise ValueError(f"{source}: rope type {kind!r} without {', '.join(missing)}")
    numerator, denominator = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    if numerator and denominator and "attention_factor" not in given and given["factor"] > 1:
        log = 0.1 * math.log(given["factor"])
        given["attention_factor"] = (numerator * log + 1.0) / (denominator * log + 1.0)
    return base, RopeScalingConfig(type=kind, **given)


def _without_names(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a rope, however its type is spelt."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return {name: x for name, x in rope.items() if name not in ("rope_type", "type") and x is not None} | {"": kind}
