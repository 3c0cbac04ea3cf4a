"""A run's folder with random weights, as training would leave it: a checkpoint and a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from data.tokenizer.tokenizer import byte_tokenizer
from model.config import MemoryConfig, ModelConfig
from model.huggingface.weights import backbone_weights
from pipeline.checkpoint.memory_parameters import memory_parameters
from pipeline.checkpoint.weights_only import write_weights
from pipeline.config.schema import Config, TrainConfig


def write_run(
    folder: Path, rule="delta", gate="hard", *, layers=None, width=4, leave_out=(), not_finite=None, **settings
) -> Path:
    """Weights far from their initial values, without the parameters in `leave_out`, with two NaN in `not_finite`.

    Megatron's groups must be there.
    """
    memory = MemoryConfig(rule=rule, write_gate=gate, layers=layers, convolution_width=width)
    sizes = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 2}
    sizes |= {"ffn_hidden_size": 20, "segment_length": 8, "vocab_size": 257}
    model = ModelConfig(**sizes | settings, memory=memory)
    shapes = {name: weight.shape for name, weight in backbone_weights(model, 257).items()}
    config = Config(model=model, train=TrainConfig(precision="fp64"))
    shapes |= {name: tuple(tensor.shape) for name, tensor in memory_parameters(config, 257).items()}
    shapes = {name: shape for name, shape in shapes.items() if name not in leave_out}

    def read(name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        noise = torch.randn(shapes[name], generator=generator) * (0.25 if len(shapes[name]) == 2 else 0.3)
        if name == not_finite:
            noise.view(-1)[:2] = torch.nan
        return 1 + noise if name.endswith("norm.weight") else noise

    tokenizer = byte_tokenizer()
    source = {"memory": "trained"}
    write_weights(folder / "checkpoints", config, 257, shapes, read, source=source, tokenizer_sha256=tokenizer.hash)
    tokenizer.save(folder / "tokenizer")
    return folder
