"""Rotary position encoding for the local attention. Positions restart in every segment.

Scaled frequencies as Hugging Face's configurations describe them: `linear` (position interpolation, arXiv 2306.15595),
`llama3` (Llama 3.1: long wavelengths divided by the factor, short ones kept, a ramp between) and `yarn` (arXiv
2309.00071, which also scales the attention's logits).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import RopeScalingConfig


def rotary_table(
    positions: Tensor,
    dim: int,
    base: float,
    *,
    dtype: torch.dtype,
    scaling: RopeScalingConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[..., dim / 2]` of positions `[...]`, computed in float64 and rounded once to `dtype`."""
    frequency = base ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim)
    size = 1.0
    if scaling is not None and scaling.type != "none":
        frequency, size = scaled_frequencies(frequency, base, scaling)
    angle = positions.double().unsqueeze(-1) * frequency
    return (angle.cos() * size).to(dtype), (angle.sin() * size).to(dtype)


def scaled_frequencies(frequency: Tensor, base: float, scaling: RopeScalingConfig) -> tuple[Tensor, float]:
    """Frequencies `[dim / 2]` after scaling, and the factor of both rotated queries and rotated keys."""
    slow = frequency / scaling.factor
    if scaling.type == "linear":
        return slow, 1.0
    original = scaling.original_max_position_embeddings
    if scaling.type == "llama3":
        turns = original * frequency / (2 * math.pi)  # in the context that the model was first trained with
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        return torch.lerp(slow, frequency, keep.clamp(0, 1)), 1.0
    pairs = len(frequency)

    def pair_that_turns(times: float) -> float:
        return pairs * math.log(original / (2 * math.pi * times)) / math.log(base)

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    index = torch.arange(pairs, device=frequency.device, dtype=frequency.dtype)
    stretch = ((index - first) / max(last - first, 0.001)).clamp(0, 1)
    size = scaling.attention_factor
    if size is None:
        size = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return torch.lerp(frequency, slow, stretch), size


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate `[..., s, d]` by its position in the segment; the two halves of d form the pairs, as in Llama."""
    cos, sin = table
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
