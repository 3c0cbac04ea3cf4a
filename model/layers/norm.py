"""The root-mean-square norm of the residual stream and, where the model has them, of each head's queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim, computed in float32 at least.

    By hand, though `F.rms_norm` gives the same numbers: over the strided keys of a projection it also copies them into
    another layout, and the memory's sums behind it are then rounded in another order.

    Args:
        dim: size of the last dim.
        epsilon: added to the mean square.
        dtype: of the weight, and the least precision of the computation.
        partial_gradient: each tensor-parallel rank sees only its part of what is normalised (of the sequence, or of the
            heads), so that the gradient of the weight, which all of them hold, is the sum over the ranks.
    """

    def __init__(self, dim: int, epsilon: float, *, dtype: torch.dtype, partial_gradient: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, dtype=dtype))
        self.weight.partial_gradient = partial_gradient  # read by the gradient synchronisation
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(self.weight.dtype)
        return (wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self.epsilon) * self.weight).to(x.dtype)
