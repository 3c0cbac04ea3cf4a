"""How the memory's and the segment's part become a layer's attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def mix(share: Tensor, read: Tensor, local: Tensor) -> Tensor:
    """`share * read + (1 - share) * local`, exactly `local` where the share is 0.

    Args:
        share: the memory's, broadcasts to `[b, t, n, r, s, d]`, in its precision.
        read: what the memory gives, `[b, t, n, r, s, d]`, in its precision.
        local: what the local attention gives, `[b*t*n, r, s, d]`.

    Returns:
        Hidden states `[s, b*t, n*r*d]` in the precision of `local`, rounded once.
    """
    return _Mix.apply(share, read, local)


def plain_mix(share: Tensor, read: Tensor, local: Tensor) -> Tensor:
    """`mix` for the compiler."""
    b, t, n, r, s, d = read.shape
    local = local.view(read.shape)
    mixed = (local + share * (read - local)).to(local.dtype)
    return mixed.permute(4, 0, 1, 2, 3, 5).reshape(s, b * t, n * r * d)


class _Mix(torch.autograd.Function):
    """With the gradient g: d read = share g, d local = g - share g, d share = the sum of g (read - local) over what the
    share is broadcast over.

    Kept: the share, and read and local, which are there anyway: what gave them keeps its results.
    """

    @staticmethod
    def forward(ctx, share: Tensor, read: Tensor, local: Tensor) -> Tensor:
        b, t, n, r, s, d = read.shape
        ctx.save_for_backward(share, read, local)
        local = local.view(read.shape)
        mixed = torch.empty(s, b, t, n, r, d, dtype=local.dtype, device=local.device)
        torch.addcmul(local, share, read - local, out=mixed.permute(1, 2, 3, 4, 0, 5))
        return mixed.view(s, b * t, n * r * d)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        share, read, local = ctx.saved_tensors
        b, t, n, r, s, d = read.shape
        grad = grad.view(s, b, t, n, r, d).permute(1, 2, 3, 4, 0, 5)
        of_read = torch.mul(share, grad, out=torch.empty(read.shape, dtype=read.dtype, device=read.device))
        of_local = torch.sub(grad, of_read, out=torch.empty_like(grad))
        of_share = None
        if ctx.needs_input_grad[0]:
            broadcast = [dim for dim in range(6) if share.shape[dim] == 1]
            of_share = (read - local.view(read.shape)).mul_(grad).sum(dim=broadcast, keepdim=True)
        return of_share, of_read, of_local.flatten(0, 2)
