"""Random tiny Hugging Face models on disk, with a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from data.tokenizer.tokenizer import train_bpe

VOCAB = 300
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"head_dim": 12, "sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


def write_hf_model(folder: Path, family: str, *, shard_size: str = "1GB", **changes) -> transformers.PreTrainedModel:
    """Save a random model, with weights far from zero, and a tokenizer; returns the model (float32)."""
    kind, settings = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**SIZES | settings | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1))
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer = train_bpe(["the cat sat on the mat and looked at the hat, " * 3] * 3, 280)
    (folder / "tokenizer.json").write_bytes(tokenizer._definition)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}), encoding="utf-8")
    return model
