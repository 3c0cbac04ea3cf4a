"""Rotary position encoding for the local attention. Positions restart in every segment.

Scaled frequencies as Hugging Face's configurations describe them: `linear` (position interpolation, arXiv 2306.15595),
`llama3` (Llama 3.1: long wavelengths divided by the factor, short ones kept, a ramp between) and `yarn` (arXiv
2309.00071, which also scales the attention's logits).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.config import RopeScalingConfig

Table = tuple[Tensor, Tensor]
"""Cosines and sines `[..., d]` of positions `[...]`: each pair's cosine twice, its sine once negated, once as it is."""


def rotary_table(
    positions: Tensor,
    dim: int,
    base: float,
    *,
    dtype: torch.dtype,
    scaling: RopeScalingConfig | None = None,
) -> Table:
    """The table of positions `[...]`, computed in float64 and rounded once to `dtype`."""
    frequency = base ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim)
    size = 1.0
    if scaling is not None and scaling.type != "none":
        frequency, size = scaled_frequencies(frequency, base, scaling)
    angle = positions.double().unsqueeze(-1) * frequency
    cos, sin = angle.cos() * size, angle.sin() * size
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


class RotaryTables:
    """The tables of a segment's positions and of the segment before it, computed once and shared by all layers.

    A plain object, neither module nor buffer: checkpoints and conversions of a model's precision do not see it.

    Args:
        length: tokens of a segment.
    """

    def __init__(self, length: int, dim: int, base: float, scaling: RopeScalingConfig | None = None) -> None:
        self.length, self.dim, self.base, self.scaling = length, dim, base, scaling
        self._known: dict[tuple, Table] = {}

    def own(self, device: torch.device, dtype: torch.dtype) -> Table:
        """Of positions 0 .. length - 1."""
        return self._table(0, device, dtype)

    def before(self, device: torch.device, dtype: torch.dtype) -> Table:
        """Of positions -length .. -1."""
        return self._table(-self.length, device, dtype)

    def _table(self, first: int, device: torch.device, dtype: torch.dtype) -> Table:
        key = (first, device, dtype)
        if key not in self._known:
            # Inference tensors could not be used in a training step later.
            with torch.inference_mode(False), torch.no_grad():
                self._known[key] = rotary_table(
                    torch.arange(first, first + self.length, device=device),
                    self.dim,
                    self.base,
                    scaling=self.scaling,
                    dtype=dtype,
                )
        return self._known[key]


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


def rotate(x: Tensor, table: Table) -> Tensor:
    """Rotate `[..., d]` by its position; the two halves of d form the pairs, as in Llama.

    Args:
        table: broadcasts to x's shape. What is computed has its precision, what is returned x's, rounded once.
    """
    return _Rotate.apply(x, *table)


def rotate_into(out: Tensor, x: Tensor, table: Table, *, back: bool = False, add: Tensor | None = None) -> Tensor:
    """`rotate` without a graph, written to `out`; `back` turns the other way; `add` is added before the rounding."""
    cos, sin = table
    turned = x * cos if add is None else torch.addcmul(add, x, cos)
    return torch.addcmul(turned, _swap_halves(x), sin, value=-1 if back else 1, out=out)


def _swap_halves(x: Tensor) -> Tensor:
    if x.device.type == "cpu":  # 1.4 ms against 3.8 ms for 2 million numbers
        return x.roll(x.shape[-1] // 2, dims=-1)
    # A GPU's roll first copies what is not contiguous.
    first, second = x.chunk(2, dim=-1)
    return torch.cat([second, first], dim=-1)


class _Rotate(torch.autograd.Function):
    """The backward pass of a rotation is the rotation by the opposite angle; nothing of x is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate_into(torch.empty_like(x), x, (cos, sin))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return rotate_into(torch.empty_like(grad), grad, ctx.saved_tensors, back=True), None, None
