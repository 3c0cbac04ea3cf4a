"""A model of the Llama family in a GGUF file (llama.cpp's format), dequantised tensor by tensor.

llama.cpp turns pairs of neighbouring rows where Hugging Face turns the two halves of a head, so its converter reorders
the rows of the query and key matrices; here they go back.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.files import FileError, convert, shown
from model.config import RopeScalingConfig
from model.layers.rotary import scaled_frequencies
from pipeline.huggingface.gguf_header import GgufTensor, read_header
from pipeline.huggingface.schema import ModelSettings
from pipeline.huggingface.tokens import SourceTokens, read_tokens, write_folder

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

_FLOATS = ("F64", "F32", "F16", "BF16")
_TOKEN_IDS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}

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
    """See `pipeline.huggingface.folder_source.ModelSource`.

    Raises:
        ValueError: the file is damaged, or its architecture is not Llama's; names what it found.
        ImportError: the package `gguf` is missing (extra `hf`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_name = str(path)
        self.notes: list[str] = []
        header = read_header(path)
        self._settings = header.settings
        architecture = self._settings.get("general.architecture")
        if architecture != "llama":
            raise ValueError(f"{path}: architecture {shown(architecture)}; of GGUF files only llama is read")
        self._tensors: dict[str, GgufTensor] = {}
        factors = None
        self._check_kinds(header.tensors)
        for tensor in header.tensors:
            if tensor.name == _ROPE_FACTORS:
                factors = torch.from_numpy(self._numbers(tensor).astype(np.float64)).flatten()
            elif (name := self._hf_name(tensor.name)) in self._tensors:
                raise FileError(f"{path}: {shown(tensor.name)} and {shown(self._tensors[name].name)} are one tensor")
            else:
                self._tensors[name] = tensor
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.config = self._config(factors)
        convert(self.config, ModelSettings, self.config_name)

    def read(self, name: str) -> Tensor:
        whole = torch.from_numpy(self._numbers(self._tensors[name])).view(self.shapes[name])
        if ".q_proj." in name:
            return _halves(whole, self.config["num_attention_heads"])
        if ".k_proj." in name:
            return _halves(whole, self.config.get("num_key_value_heads") or self.config["num_attention_heads"])
        return whole

    def place(self, name: str) -> str:
        return f"{self.path}: {self._tensors[name].name}"

    def tokens(self) -> SourceTokens:
        """As transformers converts it, from a folder in which there is nothing else for it to read."""
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory(prefix="infini-gguf-") as name:
            folder = Path(name)
            os.symlink(self.path.resolve(), folder / "model.gguf")
            try:
                tokenizer = AutoTokenizer.from_pretrained(name, gguf_file="model.gguf", trust_remote_code=False)
                definition = tokenizer.backend_tokenizer.to_str().encode("utf-8")
            except (KeyboardInterrupt, SystemExit, MemoryError):
                raise
            except BaseException as error:  # of any kind: a key that is missing, a panic of the tokenizers' library
                reason = shown(str(error).replace(name, str(self.path.parent)), 200)
                raise FileError(
                    f"{self.path}: its tokenizer cannot be read: {type(error).__name__}: {reason}"
                ) from None
            settings = {
                key: str(getattr(tokenizer, key))
                for key in ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template")
                if getattr(tokenizer, key, None) is not None
            }
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            config = {name: self.config[name] for name in _TOKEN_IDS if name in self.config}

            def here(text: str) -> str:
                return text.replace(f"{name}/", f"{self.path}: ").replace(name, str(self.path))

            write_folder(folder, definition, settings, {"model_type": "gguf"} | config)
            try:
                tokens = read_tokens(folder)
            except ValueError as error:
                raise FileError(here(str(error))) from None
        tokens.notes = [here(note) for note in tokens.notes]
        return tokens

    def _check_kinds(self, tensors: list[GgufTensor]) -> None:
        """Refuse kinds of numbers that cannot be turned into floats, before anything is written."""
        counts = Counter(tensor.kind for tensor in tensors)
        for kind in counts:
            try:
                _dequantize(np.zeros((1, _block(kind)[1]), dtype=np.uint8), kind)
            except NotImplementedError:
                raise ValueError(
                    f"{self.path}: {next(shown(t.name) for t in tensors if t.kind == kind)} is stored as {kind}, which "
                    "cannot be turned into floating-point numbers here: import the unquantised model"
                ) from None
        if quantised := {kind: count for kind, count in counts.items() if kind not in _FLOATS}:
            listed = ", ".join(f"{count} as {kind}" for kind, count in sorted(quantised.items()))
            self.notes.append(
                f"{self.path}: {sum(quantised.values())} of {len(tensors)} tensors are quantised ({listed}): the "
                "model is what is left of it"
            )

    def _numbers(self, tensor: GgufTensor) -> np.ndarray:
        """Float32, flat."""
        stored = np.memmap(self.path, mode="r", dtype=np.uint8, offset=tensor.start, shape=(tensor.bytes,))
        block, block_bytes = _block(tensor.kind)
        rows = stored.reshape(-1, tensor.shape[-1] // block * block_bytes)
        return np.array(_dequantize(rows, tensor.kind), dtype=np.float32).reshape(-1)

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
            if (value := self._settings.get(f"llama.{theirs}")) is not None:
                # 1e-5 is stored in float32 as 9.999999747e-06; the shortest decimal is what was meant.
                config[ours] = float(str(np.float32(value))) if isinstance(value, float) else value
        for ours, theirs in _TOKEN_IDS.items():
            if (value := self._settings.get(f"tokenizer.ggml.{theirs}")) is not None:
                config[ours] = value
        config.setdefault("vocab_size", self.shapes.get("model.embed_tokens.weight", (None,))[0])
        config["tie_word_embeddings"] = "lm_head.weight" not in self.shapes
        convert(config, ModelSettings, self.config_name)
        if experts := self._settings.get("llama.expert_count"):
            raise ValueError(f"{self.path}: {shown(experts)} experts; this decoder is dense")
        scaling = self._settings.get("llama.rope.scaling.type")
        if scaling == "linear":
            config["rope_scaling"] = {"rope_type": "linear", "factor": self._settings.get("llama.rope.scaling.factor")}
        elif scaling not in (None, "none"):
            raise ValueError(
                f"{self.path}: rope scaling {shown(scaling)} of a GGUF file; readable are none, linear, llama3"
            )
        if factors is not None:
            config["rope_scaling"] = self._llama3(config, factors)
        return config

    def _llama3(self, config: dict[str, Any], factors: Tensor) -> dict[str, Any]:
        base = config.get("rope_theta", 10000.0)
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


def _block(kind: str) -> tuple[int, int]:
    """Numbers and bytes of a block."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def _dequantize(rows: np.ndarray, kind: str) -> np.ndarray:
    """Rows of bytes as rows of numbers.

    Raises:
        NotImplementedError: there is no way to.
    """
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    return rows.view(np.float64) if kind == "F64" else dequantize(rows, GGMLQuantizationType[kind])


def _halves(rows: Tensor, heads: int) -> Tensor:
    """Rows in which pairs are neighbours to rows in which they are half a head apart."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
