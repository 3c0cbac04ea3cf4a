"""Golden windows for every memory rule: inputs, outputs and gradients in float64, by the rules written token by token.

    python -m tests.gpu.golden        writes tests/gpu/golden.npz anew

Inputs and the weights of the outputs are bfloat16 numbers: every precision reads the same ones, so what differs is
arithmetic alone. Keys: `inputs/NAME`, `reset`, `weights/NAME`, and for every rule `RULE/read`, `RULE/after/FIELD`,
`RULE/gradient/NAME`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.model.rules.test_memory import RULES, naive, random_window, state_type

PATH = Path(__file__).with_name("golden.npz")
SHAPE = {"b": 2, "t": 3, "n": 1, "r": 2, "s": 8, "d": 16}
GATE = "sigmoid"


def golden() -> dict[str, np.ndarray]:
    """All arrays, by key."""
    window, _ = random_window(5, **SHAPE)
    window = {name: x.detach() for name, x in window.items()}
    for name in ("x", "bias_decay"):
        window[name] -= 4  # decays that forget over hundreds of tokens, as a trained model's
    window = {name: x.bfloat16().double() for name, x in window.items()}
    reset = torch.tensor([[False, True, False], [False, False, False]])
    generator = torch.Generator().manual_seed(6)
    arrays = {f"inputs/{name}": x.float() for name, x in window.items()} | {"reset": reset}
    weights: dict[str, Tensor] = {}
    for rule in RULES:
        leaves = {name: x.clone().requires_grad_() for name, x in window.items()}
        read, after = naive(rule, GATE, leaves, reset)
        outputs = {"read": read} | dict(zip(state_type(rule)._fields, after, strict=True))
        for name, x in outputs.items():
            if name not in weights:
                weights[name] = torch.randn(x.shape, generator=generator).bfloat16().double()
        sum((x * weights[name]).sum() for name, x in outputs.items()).backward()
        arrays |= {f"{rule}/{'read' if n == 'read' else f'after/{n}'}": x.detach() for n, x in outputs.items()}
        arrays |= {f"{rule}/gradient/{n}": x.grad for n, x in leaves.items() if x.grad is not None}
    arrays |= {f"weights/{name}": x.float() for name, x in weights.items()}
    return {key: x.numpy() for key, x in arrays.items()}


if __name__ == "__main__":
    np.savez_compressed(PATH, **golden())
    print(f"{PATH}: {PATH.stat().st_size:,} bytes")
