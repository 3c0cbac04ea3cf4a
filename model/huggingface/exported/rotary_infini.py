"""Rotary positions of the local attention, with the scalings of `config.json`'s `rope_parameters`."""

import math

import torch
from torch import Tensor

from .configuration_infini import InfiniConfig


def rotary_frequencies(config: InfiniConfig, device: torch.device) -> tuple[Tensor, float]:
    """Angle per position `[d / 2]`, float64, and the factor of rotated queries and keys.

    Raises:
        ValueError: a type of scaling that is not known.
    """
    settings, dim = config.rope_parameters, config.head_dim
    kind, base = settings.get("rope_type", "default"), settings["rope_theta"]
    pair = torch.arange(dim // 2, dtype=torch.float64, device=device)
    frequency = base ** (-2 * pair / dim)
    if kind == "default":
        return frequency, 1.0
    factor = settings["factor"]
    if kind == "linear":
        return frequency / factor, 1.0
    if kind == "llama3":  # long waves are stretched, short ones are not, those between partly
        turns = settings["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = settings["low_freq_factor"], settings["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / factor), 1.0
    if kind == "yarn":  # the same between two pairs, and larger logits

        def pair_of(turns: float) -> float:
            length = settings["original_max_position_embeddings"] / (2 * math.pi * turns)
            return dim / 2 * math.log(length) / math.log(base)

        first, last = pair_of(settings.get("beta_fast") or 32.0), pair_of(settings.get("beta_slow") or 1.0)
        if settings.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        kept = 1 - ((pair - first) / max(last - first, 0.001)).clamp(0, 1)
        size = settings.get("attention_factor")
        if size is None:
            size = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        return frequency * (kept + (1 - kept) / factor), size
    raise ValueError(f"config.json: rope_type {kind!r} is not known; known are default, linear, llama3, yarn")


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate `[b, heads, m, d]`; the two halves of d form the pairs."""
    cos, sin = rotary
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
