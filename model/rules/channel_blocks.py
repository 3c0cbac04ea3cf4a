"""The delta rule with a decay per channel and a key of its own for what it erases, in blocks of tokens.

    per token   M <- (I - g k h^T) Diag(a) M + g k v^T

with h the erase key. With t_i the sum of log a up to token i of a block of c tokens, a vector of d as log a is, and the
other names as in `model.rules.delta_blocks`, a block's updates u are in

    (I + L) u = g V - g (H e^t) M,    L_ij = [g_i A_ij],    A_ij = sum over channels of h_i k_j exp(t_i - t_j)

and M becomes Diag(e^(t_c)) M + (K e^(t_c - t))^T u. So with X = (I + L)^-1 and Y = X^T (K e^(t_c - t))

    M <- Diag(e^(t_c)) M + (g Y)^T (V - (H e^t) M),

which is a step of `model.rules.scan.scan_blocks`.

A is no product of (h e^t) and (k e^-t): where much is forgotten the second overflows. It is made by halves: between the
later and the earlier half of a block, both are taken relative to the last token of the earlier one, where t is r. Then
exp(t_i - r) and exp(r - t_j) are at most 1, and what underflows is nothing. The two halves are blocks themselves:
log2(c) batches of products, half as many multiplications as one full product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from model.rules.delta_blocks import block_length
from model.rules.scan import Blocks


def solve_channel_blocks(
    key: Tensor, erase_key: Tensor | None, value: Tensor, gate: Tensor | None, log_decay: Tensor
) -> Blocks:
    """What the blocks of every segment do to M.

    Args:
        key: `[b, t, n, s, d]`.
        erase_key: h, of the same shape; None for the key.
        value: `[b, t, n, s, d]`, of any precision.
        gate: g, `[b, t, n, s]`; None for 1.
        log_decay: log a, `[b, t, n, s, d]`.
    """
    left, right, decay = _ChannelSolve.apply(key, erase_key, value, gate, log_decay)
    return Blocks(left, None if gate is None else gate.unflatten(-1, left.shape[3:5]), right, decay)


class _ChannelSolve(Function):
    """Y, R = [V | -e H] and e_c, with e = exp(t) and l = exp(t_c - t). Backward, with D the gradient of l K:

    D = X dY, dL = -[Y D^T], dA = g dL, dH = (what A gives it) - e d(-e H), dK = (what A gives it) + l D; and t, which
    stands in each exponent beside h or minus t beside k, gets h dH - k dK, the last one also what t_c is part of.
    """

    @staticmethod
    def forward(ctx, key: Tensor, erase_key: Tensor | None, value: Tensor, gate: Tensor | None, log_decay: Tensor):
        """`[b, t, n, blocks, c, d]`, `[b, t, n, blocks, c, 2 d]` and `[b, t, n, blocks, d]`."""
        b, t, n, s, d = key.shape
        c = block_length(s, d)
        right = key.new_empty(b, t, n, s, 2 * d).view(-1, c, 2 * d)
        right.view(b, t, n, s, 2 * d)[..., :d] = value
        own_key = key.reshape(-1, c, d)
        erased = own_key if erase_key is None else erase_key.reshape(-1, c, d)
        total = log_decay.reshape(-1, c, d).cumsum(dim=1)
        last = total[:, -1:]
        torch.mul(erased, total.exp().neg_(), out=right[..., d:])
        products = decayed_products(erased, own_key, total)
        column = None if gate is None else gate.reshape(-1, c, 1)
        lower = products if column is None else products * column
        identity = torch.eye(c, dtype=key.dtype, device=key.device).expand_as(lower)
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True)
        y = torch.bmm(inverse.mT, (last - total).exp_().mul_(own_key))
        ctx.dtype, ctx.shape = value.dtype, key.shape
        products = None if column is None else products
        ctx.save_for_backward(own_key, None if erase_key is None else erased, total, inverse, y, column, products)
        blocks = (b, t, n, s // c)
        return y.view(*blocks, c, d), right.view(*blocks, c, 2 * d), last.exp().view(*blocks, d)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_y: Tensor, of_right: Tensor, of_decay: Tensor):
        key, erased, total, inverse, y, column, products = ctx.saved_tensors
        d = y.shape[-1]
        own_erased = key if erased is None else erased
        of_right = of_right.reshape(*y.shape[:-1], 2 * d)
        last = total[:, -1:]
        of_l_key = torch.bmm(inverse, of_y.reshape(y.shape))
        of_products = torch.bmm(y, of_l_key.mT).neg_()  # below the diagonal; the rest is not read
        of_gate = None
        if column is not None:
            of_gate = (of_products * products).sum(dim=-1).reshape(ctx.shape[:-1])
            of_products.mul_(column)
        of_erased, of_key = _of_decayed_products(of_products, own_erased, key, total)
        of_erased.addcmul_(total.exp(), of_right[..., d:], value=-1)
        of_l_key.mul_((last - total).exp_())
        of_key.add_(of_l_key)
        of_total = torch.addcmul(own_erased * of_erased, key, of_key, value=-1)
        of_last = (of_l_key * key).sum(dim=1).addcmul_(of_decay.reshape(-1, d), last.squeeze(1).exp())
        of_total[:, -1].add_(of_last)
        of_log_decay = of_total.flip(1).cumsum(dim=1).flip(1).reshape(ctx.shape)
        if erased is None:
            of_key.add_(of_erased)
            of_erased = None
        else:
            of_erased = of_erased.view(ctx.shape)
        of_value = of_right[..., :d].to(ctx.dtype).reshape(ctx.shape)
        return of_key.view(ctx.shape), of_erased, of_value, of_gate, of_log_decay


def decayed_products(late: Tensor, early: Tensor, total: Tensor) -> Tensor:
    """A of the module's text below the diagonal, 0 elsewhere, `[m, c, c]`, from h, k and t `[m, c, d]`."""
    length = late.shape[1]
    late, early, total = (_padded(x) for x in (late, early, total))
    products = late.new_zeros(*late.shape[:2], late.shape[1])
    for half in _halves(late, early, total):
        half.of(products).copy_(torch.matmul(half.late, half.early.mT))
    return products[:, :length, :length]


def _of_decayed_products(gradient: Tensor, late: Tensor, early: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `late` and `early` of `decayed_products`, from that of what is below the diagonal."""
    length = late.shape[1]
    late, early, total = (_padded(x) for x in (late, early, total))
    missing = late.shape[1] - length
    gradient = F.pad(gradient, (0, missing, 0, missing)) if missing else gradient.contiguous()
    of_late, of_early = torch.zeros_like(late), torch.zeros_like(early)
    for half in _halves(late, early, total):
        of_half = half.of(gradient)
        half.part(of_late, 1).addcmul_(torch.matmul(of_half, half.early), half.late_decay)
        half.part(of_early, 0).addcmul_(torch.matmul(of_half.mT, half.late), half.early_decay)
    return of_late[:, :length].contiguous(), of_early[:, :length].contiguous()


class _Halves(NamedTuple):
    """The later and the earlier halves of blocks of 2 h tokens, each `[m, blocks, h, d]`."""

    late: Tensor
    early: Tensor
    late_decay: Tensor
    early_decay: Tensor
    """What `late` and `early` are multiplied by already."""

    def part(self, x: Tensor, which: int) -> Tensor:
        """The earlier (0) or later (1) halves of `[m, c, d]`, a view."""
        return _by_halves(x, self.late.shape[2])[:, :, which]

    def of(self, products: Tensor) -> Tensor:
        """The rows of later halves with columns of the earlier ones, of `[m, c, c]`: `[m, blocks, h, h]`, a view."""
        blocks, h = self.late.shape[1:3]
        corners = products.view(-1, blocks, 2, h, blocks, 2, h)[:, :, 1, :, :, 0]
        return corners.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _halves(late: Tensor, early: Tensor, total: Tensor) -> Iterator[_Halves]:
    """Of blocks of all lengths, from c (a power of two) to 2, each with its decays."""
    h = late.shape[1] // 2
    while h:
        of_early, of_late = _by_halves(total, h).unbind(2)
        between = of_early[:, :, -1:]
        late_decay, early_decay = (of_late - between).exp_(), (between - of_early).exp_()
        late_half, early_half = _by_halves(late, h)[:, :, 1], _by_halves(early, h)[:, :, 0]
        yield _Halves(late_half * late_decay, early_half * early_decay, late_decay, early_decay)
        h //= 2


def _by_halves(x: Tensor, h: int) -> Tensor:
    """`[m, c, d]` as `[m, blocks, 2, h, d]`."""
    return x.view(x.shape[0], -1, 2, h, x.shape[-1])


def _padded(x: Tensor) -> Tensor:
    """`[m, c, d]` up to a power of two of tokens. What stands behind is not read: the last token, so that no exponent
    is positive there."""
    missing = (1 << (x.shape[1] - 1).bit_length()) - x.shape[1]
    return torch.cat([x, x[:, -1:].expand(-1, missing, -1)], dim=1) if missing else x
