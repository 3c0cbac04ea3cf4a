"""The delta rule token by token, `M <- a (M - g k (k^T M)) + g k v^T`, in blocks of tokens.

With t_i the sum of log a up to token i of a block of c tokens, e_i = exp(t_i), l_i = exp(t_c - t_i), rows of K and V
the keys and values, and `[.]` the part below the diagonal, a block's updates are u in (WY form, arXiv 2406.06484,
section 3)

    (I + L) u = g V - g e K M,    L_ij = [g_i exp(t_i - t_j) k_i k_j]

and M becomes e_c M + (l K)^T u. So with X = (I + L)^-1 and Y = X^T (l K)

    M <- e_c M + (g Y)^T (V - e K M),

which is a step of `model.rules.scan.scan_blocks`. All blocks of all segments are solved at once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from model.rules.scan import Blocks

WRITE_BLOCK = 64
"""Tokens that are solved for at once, at most, or d where that is more: the triangular systems stay small however long
a segment is, and composing blocks costs no more than solving them."""


def block_length(segment_length: int, dim: int) -> int:
    """Tokens of a block: a segment has as many blocks as a power of two says, so that neighbours compose by halves; one
    that cannot be divided so is solved as one."""
    blocks = 1
    while blocks * max(WRITE_BLOCK, dim) < segment_length:
        blocks *= 2
    return segment_length // blocks if segment_length % blocks == 0 else segment_length


def solve_blocks(key: Tensor, value: Tensor, gate: Tensor | None, log_decay: Tensor | None) -> Blocks:
    """What the blocks of every segment do to M.

    Args:
        key: `[b, t, n, s, d]`, of length one.
        value: `[b, t, n, s, d]`, of any precision.
        gate: g, `[b, t, n, s]`; None for 1.
        log_decay: log a, `[b, t, n, s]`; None for 0.
    """
    left, right, decay = _Solve.apply(key, value, gate, log_decay)
    return Blocks(left, None if gate is None else gate.unflatten(-1, left.shape[3:5]), right, decay)


class _Solve(Function):
    """Y, R = [V | -e K] and e_c. Backward, with D the gradient of l K:

    D = X dY, dL = -[Y D^T], dS = g ratio dL for S = K K^T, dK = l D - e d(-e K) + (dS + dS^T) K; what is multiplied by
    g, e or l gives them their row sums.
    """

    @staticmethod
    def forward(ctx, key: Tensor, value: Tensor, gate: Tensor | None, log_decay: Tensor | None):
        """`[b, t, n, blocks, c, d]`, `[b, t, n, blocks, c, 2 d]` and `[b, t, n, blocks, 1]`, None without a decay."""
        b, t, n, s, d = key.shape
        c = block_length(s, d)
        right = key.new_empty(b, t, n, s, 2 * d).view(-1, c, 2 * d)
        right.view(b, t, n, s, 2 * d)[..., :d] = value
        minus_e_key = right[..., d:]
        column = None if gate is None else gate.reshape(-1, c, 1)
        if log_decay is None:
            torch.neg(key.reshape(-1, c, d), out=minus_e_key)
            minus_key = minus_l_key = minus_e_key
            e = ratio = None
        else:
            minus_key = key.reshape(-1, c, d).neg()
            total = log_decay.reshape(-1, c, 1).cumsum(dim=1)
            # Below the diagonal exponents are not positive; above it nothing is read, but it must not overflow.
            ratio = (total - total.mT).clamp_max_(0).exp_()
            e = total.exp_()
            torch.mul(minus_key, e, out=minus_e_key)
            minus_l_key = minus_key * ratio[:, -1:].mT
        products = torch.bmm(minus_key, minus_key.mT)
        lower = products if ratio is None else products * ratio
        lower = lower if column is None else lower * column
        identity = torch.eye(c, dtype=key.dtype, device=key.device).expand_as(lower)
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True)
        y = torch.baddbmm(minus_key, inverse.mT, minus_l_key, beta=0, alpha=-1)
        ctx.dtype, ctx.shape = value.dtype, key.shape
        products = None if column is None and ratio is None else products
        minus_key = None if ratio is None else minus_key
        ctx.save_for_backward(right, inverse, y, column, products, minus_key, e, ratio)
        blocks = (b, t, n, s // c)
        decay = None if e is None else e[:, -1].view(*blocks, 1)
        return y.view(*blocks, c, d), right.view(*blocks, c, 2 * d), decay

    @staticmethod
    @once_differentiable
    def backward(ctx, of_y: Tensor, of_right: Tensor, of_decay: Tensor | None):
        right, inverse, y, column, products, minus_key, e, ratio = ctx.saved_tensors
        d = y.shape[-1]
        minus_e_key = right[..., d:]
        of_right = of_right.reshape(right.shape)
        of_value, of_minus_e_key = of_right[..., :d], of_right[..., d:]
        of_l_key = torch.bmm(inverse, of_y.reshape(y.shape))
        of_products = torch.bmm(y, of_l_key.mT).tril_(-1)  # times -1
        if ratio is not None:
            of_products.mul_(ratio)
        of_gate = None
        if column is not None:
            of_gate = (of_products * products).sum(dim=-1).neg_().reshape(ctx.shape[:-1])
            of_products.mul_(column)
        of_log_decay = None
        if ratio is None:
            of_key = of_l_key - of_minus_e_key
            minus_key = minus_e_key
        else:
            of_l_key.mul_(ratio[:, -1:].mT)
            of_exponents = of_products * products  # times -1
            # l is the ratios' last row.
            of_exponents[:, -1].add_((of_l_key * minus_key).sum(dim=-1))
            of_total = (of_minus_e_key * minus_e_key).sum(dim=-1)
            of_total.add_(of_exponents.sum(dim=-2)).sub_(of_exponents.sum(dim=-1))
            of_total[:, -1].addcmul_(of_decay.flatten(), e[:, -1, 0])
            of_log_decay = of_total.flip(-1).cumsum(dim=-1).flip(-1).reshape(ctx.shape[:-1])
            of_key = of_l_key.addcmul_(of_minus_e_key, e, value=-1)
        # (dS + dS^T) K: twice the sign that is in `of_products`, and in `minus_key`.
        of_key.baddbmm_(of_products + of_products.mT, minus_key)
        return of_key.view(ctx.shape), of_value.to(ctx.dtype).reshape(ctx.shape), of_gate, of_log_decay
