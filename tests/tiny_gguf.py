"""A tiny GGUF file, as llama.cpp's converter writes one, with a tokenizer; and headers that lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import transformers

_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(
    path: Path,
    model: transformers.PreTrainedModel,
    tokenizer: Path,
    *,
    kind: str = "F32",
    settings: dict[str, int] | None = None,
) -> dict[str, np.ndarray]:
    """Write a Llama with tied embeddings and its byte-level tokenizer; returns the tensors by Hugging Face's names.

    Args:
        tokenizer: `tokenizer.json`.
        kind: type of the matrices' numbers, where rows are blocks of 32.
        settings: further whole numbers.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    content = json.loads(tokenizer.read_text())
    tokens = content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    added = {token["id"] for token in content["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(sorted(tokens, key=tokens.get))
    writer.add_token_types([3 if number in added else 1 for number in range(len(tokens))])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokens["<|endoftext|>"])
    for name, value in (settings or {}).items():
        writer.add_uint32(name, value)
    state = {name: x.numpy() for name, x in model.state_dict().items() if name != "lm_head.weight"}
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for name, x in state.items():
        for heads, part in ((config.num_attention_heads, "q_proj"), (config.num_key_value_heads, "k_proj")):
            if part in name:  # convert_hf_to_gguf's permute
                x = x.reshape(heads, 2, x.shape[0] // heads // 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        if name.startswith("model.layers."):
            layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            names[name] = f"blk.{layer}.{_PARTS[part]}.weight"
        stored = gguf.GGMLQuantizationType[kind if x.ndim == 2 and x.shape[1] % 32 == 0 else "F32"]
        writer.add_tensor(names[name], gguf.quants.quantize(np.ascontiguousarray(x), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def setting(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def header(*settings: bytes, tensors: tuple[bytes, ...] = (), say: dict[str, int] | None = None) -> bytes:
    """A GGUF file of a head alone; it may `say` another `settings`, `tensors` or `version` than there are."""
    told = {"version": 3, "tensors": len(tensors), "settings": len(settings)} | (say or {})
    head = b"GGUF" + struct.pack("<IQQ", told["version"], told["tensors"], told["settings"])
    return head + b"".join(settings) + b"".join(tensors)
