"""Rotary position encoding for the local attention. Positions restart in every segment."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(
    length: int, dim: int, base: float, *, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[length, dim / 2]`, computed in float64 and rounded once to `dtype`."""
    frequency = base ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float64), frequency)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate `[..., s, d]` by its position in the segment; the two halves of d form the pairs, as in Llama."""
    cos, sin = table
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
