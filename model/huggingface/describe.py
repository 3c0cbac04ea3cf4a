"""What `config.json` of an exported model says: the model with its memory, or the plain transformer in it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from model.config import ModelConfig, RopeScalingConfig, layer_shape, same_function
from model.huggingface.exported.memory_infini import LOCAL_CONTEXTS, MIX_GATES, RULES, WRITE_GATES
from model.rules import has_convolution

EXPORTED = "infini"
"""The `model_type` of the model with its memory."""

EXPORTED_CODE = {
    "AutoConfig": "configuration_infini.InfiniConfig",
    "AutoModel": "modeling_infini.InfiniModel",
    "AutoModelForCausalLM": "modeling_infini.InfiniForCausalLM",
}
"""Its `auto_map`: the code in `model.huggingface.exported`, which goes with it."""

MEMORY_SETTINGS = (
    *("rule", "layers", "write_gate", "write_gate_bias", "short_convolution", "mix_gate", "gate_floor", "beta_init"),
    *("skip_empty", "epsilon", "convolution_width", "num_householder"),
)
"""Of `MemoryConfig`: `memory_<name>` in an exported `config.json`."""

_MODEL = {
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size"),
    *("vocab_size", "vocab_size_multiple", "tie_embeddings", "qkv_bias", "qk_norm", "segment_length", "rope_base"),
    *("local_context", "rope_scaling", "norm_epsilon", "init_std", "qk_init", "memory"),
    *("sliding_window", "sliding_layers"),
}
_ROPE_SETTINGS = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor"),
}


def describe_infini(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """The model with its memory, for the files in `model.huggingface.exported`.

    Args:
        config: the model.
        vocab_size: tokens, without padding.

    Raises:
        ValueError: the exported code does not know one of the model's settings, or its value.
    """
    config = same_function(config)  # how it is computed is not exported
    memory = config.memory
    for name, value, known in (
        ("rule", memory.rule, ("none", *RULES)),
        ("write_gate", memory.write_gate, WRITE_GATES),
        ("mix_gate", memory.mix_gate, MIX_GATES),
    ):
        if value not in known:
            raise ValueError(f"model.memory.{name} = {value}: the exported model knows {', '.join(known)}")
    if config.local_context not in LOCAL_CONTEXTS:
        known = ", ".join(LOCAL_CONTEXTS)
        raise ValueError(f"model.local_context = {config.local_context}: the exported model knows {known}")
    for section, settings, known in (("model", config, _MODEL), ("model.memory", memory, MEMORY_SETTINGS)):
        for field in fields(settings):
            value, default = getattr(settings, field.name), getattr(type(settings)(), field.name)
            if field.name not in known and value != default:
                raise ValueError(f"{section}.{field.name} = {value}: the exported model does not have this setting")
    return {
        "architectures": ["InfiniForCausalLM"],
        "auto_map": EXPORTED_CODE,
        "model_type": EXPORTED,
        **_common(config, vocab_size),
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        "segment_length": config.segment_length,
        "local_context": config.local_context,
        "max_position_embeddings": 1 << 20,
        **{f"memory_{name}": getattr(memory, name) for name in MEMORY_SETTINGS},
        "memory_short_convolution": has_convolution(memory),
        **_source_sliding(config),
    }


def describe_plain(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """The transformer without the memory, as the family of models that has these parts.

    Its `max_position_embeddings` is what the rotary scaling was made for, or else what the local attention sees, one
    segment or two: the training has seen no longer distance. A sliding window is that of the imported model.

    Raises:
        ValueError: no family has these parts.
    """
    if config.qkv_bias and config.qk_norm:
        raise ValueError("model.qkv_bias with model.qk_norm: no plain model of transformers has both")
    kind = "Qwen2" if config.qkv_bias else "Qwen3" if config.qk_norm else "Llama"
    sliding: dict[str, Any] = {}
    if config.sliding_window is not None:
        if kind == "Llama" and config.sliding_layers is not None:
            raise ValueError(
                "model.sliding_layers: a plain model without query biases or norms (Mistral) slides in all layers or "
                "in none; model.sliding_window = null gives up the window"
            )
        kind = "Mistral" if kind == "Llama" else kind
        sliding = {"sliding_window": config.sliding_window}
        if kind != "Mistral":
            layers = range(config.num_layers) if config.sliding_layers is None else config.sliding_layers
            kinds = ["sliding_attention" if i in layers else "full_attention" for i in range(config.num_layers)]
            sliding |= {"use_sliding_window": True, "max_window_layers": 0, "layer_types": kinds}
    positions = config.segment_length * (2 if config.local_context == "sliding" else 1)
    scaling = config.rope_scaling
    if scaling.type in ("llama3", "yarn"):
        positions = max(positions, int(scaling.factor * scaling.original_max_position_embeddings))
    return {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        **_common(config, vocab_size),
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        **sliding,
    }


def _source_sliding(config: ModelConfig) -> dict[str, Any]:
    """What a plain export of the model would have: the model with its memory does not use it."""
    settings = {"source_sliding_window": config.sliding_window, "source_sliding_layers": config.sliding_layers}
    return {name: value for name, value in settings.items() if value is not None}


def _common(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    _, heads, groups, dim = layer_shape(config)
    return {
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": dim,
        "rms_norm_eps": config.norm_epsilon,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": _rope(config.rope_base, config.rope_scaling),
    }


def _rope(base: float, scaling: RopeScalingConfig) -> dict[str, Any]:
    settings = {name: getattr(scaling, name) for name in _ROPE_SETTINGS[scaling.type]}
    kind = "default" if scaling.type == "none" else scaling.type
    return {"rope_type": kind, "rope_theta": base} | {k: v for k, v in settings.items() if v is not None}
