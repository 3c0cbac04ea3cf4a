"""The root-mean-square norm of the residual stream and, where the model has them, of each head's queries and keys."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.device import cache_blocks


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim, computed in float32 at least and rounded once.

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
        self.function = rms_norm  # or what the compiler makes of it

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.epsilon)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`x / sqrt(mean(x^2) + epsilon) * weight` over the last dim, in the weight's precision and then of x's dtype.

    By hand, in few passes: `F.rms_norm` has no fused kernel for bfloat16 with a float32 weight, and none on a CPU.

    Args:
        x: `[..., d]`, in any layout; its result is contiguous.
        weight: `[d]`, or with more dims, which are the last ones of x.
    """
    return _RMSNorm.apply(x, weight, epsilon)


def plain_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`rms_norm` for the compiler."""
    wide = x.to(weight.dtype)
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon) * weight).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x^2) + epsilon), n = r x and the gradient g of n w:

    d w = sum over tokens of g n,    d x = r (g w - n mean(g n w))

    Kept for the backward pass: x, as it came, and r.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        scale = torch.empty(*x.shape[:-1], 1, dtype=weight.dtype, device=x.device)
        for part, factor, out in _blocks(weight, x, scale, normed):
            torch.linalg.vector_norm(part, dim=-1, keepdim=True, dtype=weight.dtype, out=factor)
            # sqrt(d) / sqrt(|x|^2 + d epsilon), on one number per token.
            factor.square_().add_(x.shape[-1] * epsilon).rsqrt_().mul_(math.sqrt(x.shape[-1]))
            torch.mul(part * factor, weight, out=out)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        tokens = tuple(range(x.dim() - weight.dim()))
        grad_weight = grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for part, factor, g, out in _blocks(weight, x, scale, grad, grad_x):
            normed = part * factor
            product = normed * g
            if ctx.needs_input_grad[1]:
                of_weight = product.sum(dim=tokens) if tokens else product.clone()
                grad_weight = of_weight if grad_weight is None else grad_weight.add_(of_weight)
            if out is not None:
                mean = _sum_with(product, weight).div_(x.shape[-1])
                torch.mul((g * weight).addcmul_(normed, mean, value=-1), factor, out=out)
        return grad_x, grad_weight, None


def _blocks(weight: Tensor, x: Tensor, *others: Tensor | None) -> Iterable[tuple[Tensor, ...]]:
    """`cache_blocks` where x and the others have a first dim that the weight has not."""
    return cache_blocks(x, *others) if x.dim() > weight.dim() else [(x, *others)]


def _sum_with(x: Tensor, weight: Tensor) -> Tensor:
    """The sum of `x * weight` over the last dim, kept."""
    if weight.dim() == 1 and x.is_contiguous():
        return torch.mv(x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], 1)
    return (x * weight).sum(dim=-1, keepdim=True)
