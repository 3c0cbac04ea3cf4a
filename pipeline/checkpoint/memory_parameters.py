"""The memory's parameters as a new model has them, without building the model."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from model.config import same_function
from model.decoder import DecoderStage
from model.huggingface.weights import backbone_names
from model.layers.decoder_layer import StageOptions
from pipeline.config.schema import Config


def memory_parameters(config: Config, vocab_size: int) -> dict[str, Tensor]:
    """Initial values of all parameters that the plain model does not have, whole, float32, by global name.

    Layers are built one after another, without MLP and embedding to speak of. A process group of one must be there.
    """
    model = replace(same_function(config.model), ffn_hidden_size=1)
    backbone = backbone_names(model)
    found: dict[str, Tensor] = {}
    if model.memory.rule == "none":
        return found
    # A stage in the middle has neither embedding nor output; one layer more on either side makes it that.
    middle = replace(model, num_layers=model.num_layers + 1)
    for layer in range(model.num_layers):
        stage = DecoderStage(
            middle,
            StageOptions(),
            vocab_size=vocab_size,
            first_layer=layer,
            last_layer=layer + 1,
            tensor_rank=0,
            tensor_size=1,
        )
        stage.initialize(config.train.seed)
        found |= {name: p.detach().clone() for name, p in stage.global_parameters() if name not in backbone}
    return found
