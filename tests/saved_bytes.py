"""What a forward pass keeps for its backward pass."""

from __future__ import annotations

import torch
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(stage, inputs, labels, reset):
    """Bytes that a forward pass keeps for its backward pass, each storage once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    kept = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x  # held, so that no address is used twice
        return x

    memory = stage.empty_memory(reset.shape[0], torch.device("cpu"))
    with saved_tensors_hooks(pack, lambda x: x):
        stage(inputs, memory, reset, labels)
    return sum(x.untyped_storage().nbytes() for x in kept.values())
