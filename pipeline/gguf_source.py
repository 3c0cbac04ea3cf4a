"""A model of the Llama family in a GGUF file (llama.cpp's format), dequantised tensor by tensor.

llama.cpp turns pairs of neighbouring rows where Hugging Face turns the two halves of a head, so its converter reorders
the rows of the query and key matrices; here they go back.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.config import RopeScalingConfig
from model.rotary import scaled_frequencies

_LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHERS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"
"""Llama 3's scaling as a divisor per pair; the factor itself is not in the metadata."""
_KNOWN_LLAMA3_FACTORS = (8.0, 32.0)

_SETTINGS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
    "vocab_size": "vocab_size",
}


class GgufSource:
    """See `pipeline.hf_source.ModelSource`.

    Raises:
        ValueError: the file is damaged, or its architecture is not Llama's; names what it found.
        ImportError: the package `gguf` is missing (extra `hf`).
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path = path
        self.config_name = str(path)
        try:
            self._reader = GGUFReader(path)
        except Exception as error:  # the library raises what its arrays raise
            raise ValueError(f"{path} is damaged or cut short: {error}") from error
        architecture = self._field("general.architecture")
        if architecture != "llama":
            raise ValueError(f"{path}: architecture {architecture!r}; of GGUF files only llama is read")
        self._tensors = {}
        factors = None
        for tensor in self._reader.tensors:
            if tensor.name == _ROPE_FACTORS:
                factors = torch.from_numpy(np.array(tensor.data, dtype=np.float64))
            else:
                self._tensors[self._hf_name(tensor.name)] = tensor
        self.shapes = {name: tuple(int(n) for n in t.shape[::-1]) for name, t in self._tensors.items()}
        self.config = self._config(factors)

    def read(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(f"{self.path}: {tensor.name} is stored as {tensor.tensor_type.name}: {error}") from error
        whole = torch.from_numpy(np.array(values, dtype=np.float32)).view(self.shapes[name])
        if ".q_proj." in name:
            return _halves(whole, self.config["num_attention_heads"])
        if ".k_proj." in name:
            return _halves(whole, self.config["num_key_value_heads"])
        return whole

    def tokenizer_files(self) -> dict[str, bytes]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(self.path.parent), gguf_file=self.path.name)
        settings = {
            name: getattr(tokenizer, name)
            for name in ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template")
            if getattr(tokenizer, name, None) is not None
        }
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        return {
            "tokenizer.json": tokenizer.backend_tokenizer.to_str().encode("utf-8"),
            "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode("utf-8"),
        }

    def _field(self, name: str) -> Any:
        field = self._reader.fields.get(name)
        return None if field is None else field.contents()

    def _hf_name(self, name: str) -> str:
        if name in _OTHERS:
            return _OTHERS[name]
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if match and match[2] in _LAYER_PARTS:
            return f"model.layers.{match[1]}.{_LAYER_PARTS[match[2]]}.{match[3]}"
        return name  # refused later, as a tensor that the model does not have

    def _config(self, factors: Tensor | None) -> dict[str, Any]:
        config: dict[str, Any] = {"model_type": "llama", "hidden_act": "silu"}
        for ours, theirs in _SETTINGS.items():
            if (value := self._field(f"llama.{theirs}")) is not None:
                # 1e-5 is stored in float32 as 9.999999747e-06; the shortest decimal is what was meant.
                config[ours] = float(str(np.float32(value))) if isinstance(value, float) else value
        config.setdefault("vocab_size", self.shapes.get("model.embed_tokens.weight", (None,))[0])
        config["tie_word_embeddings"] = "lm_head.weight" not in self.shapes
        if (experts := self._field("llama.expert_count")) is not None:
            raise ValueError(f"{self.path}: {experts} experts; this decoder is dense")
        scaling = self._field("llama.rope.scaling.type")
        if scaling == "linear":
            config["rope_scaling"] = {"rope_type": "linear", "factor": self._field("llama.rope.scaling.factor")}
        elif scaling not in (None, "none"):
            raise ValueError(f"{self.path}: rope scaling {scaling!r} of a GGUF file; readable are none, linear, llama3")
        if factors is not None:
            config["rope_scaling"] = self._llama3(config, factors)
        return config

    def _llama3(self, config: dict[str, Any], factors: Tensor) -> dict[str, Any]:
        base = config["rope_theta"]
        frequency = base ** (-torch.arange(len(factors), dtype=torch.float64) / len(factors))
        for factor in _KNOWN_LLAMA3_FACTORS:
            scaling = RopeScalingConfig(type="llama3", factor=factor)
            if torch.allclose(frequency / factors, scaled_frequencies(frequency, base, scaling)[0], rtol=1e-4):
                names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
                return {"rope_type": "llama3"} | {name: getattr(scaling, name) for name in names}
        raise ValueError(
            f"{self.path}: {_ROPE_FACTORS} is not Llama 3's scaling by a factor of 8 or 32: import the Hugging Face "
            "folder, whose config.json says what it is"
        )


def _halves(rows: Tensor, heads: int) -> Tensor:
    """Rows in which pairs are neighbours to rows in which they are half a head apart."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
