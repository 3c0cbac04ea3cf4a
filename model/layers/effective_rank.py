"""How many directions a memory's matrix really has. On its own: who reads a checkpoint needs no model."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(matrices: Tensor) -> Tensor:
    """exp of the entropy of the singular values of `[..., d, e]`, divided by their sum.

    0 for a matrix of zeros, NaN for one that is not finite.

    Roy and Vetterli, The effective rank (EUSIPCO 2007).
    """
    finite = torch.isfinite(matrices).all(dim=-1).all(dim=-1)
    # The library raises where there is no decomposition.
    values = torch.linalg.svdvals(torch.where(finite[..., None, None], matrices, 0).double())
    total = values.sum(dim=-1, keepdim=True)
    shares = values / total.clamp_min(torch.finfo(values.dtype).tiny)
    rank = torch.special.entr(shares).sum(dim=-1).exp() * (total.squeeze(-1) > 0)
    return torch.where(finite, rank, torch.nan)
