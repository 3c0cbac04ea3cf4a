"""From the output of the q, k, v projection to what the local attention and the memory take of it, and back.

One function each way: everything is a view of two tensors (the projection's output and the rotated queries and keys),
and the backward pass writes every gradient to its place in one. Slices and permutations that autograd takes apart by
itself cost a tensor of zeros, a copy and a sum each.

Shapes: s tokens of a segment, B folded lanes and segments, n key/value heads of this rank, r query heads per key/value
head, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.device import cache_blocks
from model.layers.rotary import Table, rotate_into


class Heads(NamedTuple):
    """The local attention gets one batch entry per key/value head, which r query heads share: no layout between the
    projection and the attention has to be copied."""

    query: Tensor
    """`[B*n, r, s, d]`, rotated."""
    key: Tensor
    """`[B*n, 1, s, d]`, rotated."""
    value: Tensor
    """`[B*n, 1, s, d]`."""
    memory_query: Tensor | None = None
    """`[B, n, r, s, d]`, without position; None, as the next two, without a memory."""
    memory_key: Tensor | None = None
    """`[B, n, s, d]`."""
    memory_value: Tensor | None = None
    """`[B, n, s, d]`."""


class Passes(NamedTuple):
    """What computes in `split_heads` in place of what is written there: `plain_turn` and `plain_gradient`, compiled."""

    forward: Callable[..., Tensor]
    backward: Callable[..., Tensor]


def split_heads(qkv: Tensor, table: Table, memory: bool, passes: Passes | None = None) -> Heads:
    """Split `[s, B, n, r + 2, d]`: of every key/value head its query heads, its key, its value.

    Args:
        table: `[s, d]`, of the segment's positions.
        memory: there is one, which wants queries, keys and values as well.
    """
    return Heads(*_SplitHeads.apply(qkv, *table, memory, passes))


def plain_turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What `split_heads` computes, for the compiler: `[s, B, n, r + 1, d]` rotated."""
    return _turned(x, cos, sin).to(x.dtype).contiguous()


def plain_gradient(
    local: tuple[Tensor, ...], memory: tuple[Tensor | None, ...], cos: Tensor, sin: Tensor, dtype: torch.dtype
) -> Tensor:
    """The way back, for the compiler.

    Args:
        local, memory: gradients of queries, keys and values, `[s, B, n, r or 1, d]`, from the local attention and from
            the memory (None without one).
    """
    turned = [_turned(x, cos, -sin) for x in local[:2]] + [local[2]]
    parts = [x if y is None else x + y for x, y in zip(turned, memory, strict=True)]
    return torch.cat([x.to(dtype) for x in parts], dim=3)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([second, first], dim=-1) * sin


def join_heads(attended: Tensor, b: int) -> Tensor:
    """What the heads of B = b give, `[B*n, r, s, d]`, as hidden states `[s, B, n*r*d]`: a view where the attention
    lays its output out as its queries are."""
    return attended.unflatten(0, (b, -1)).permute(3, 0, 1, 2, 4).flatten(2)


class _SplitHeads(torch.autograd.Function):
    """Nothing is kept but the table. A gradient is the sum of what comes from both sides, that of the local attention
    rotated back."""

    @staticmethod
    def forward(ctx, qkv: Tensor, cos: Tensor, sin: Tensor, memory: bool, passes: Passes | None) -> tuple[Tensor, ...]:
        s, b, n, parts, d = qkv.shape
        ctx.table = tuple(x.view(s, 1, 1, 1, d) for x in (cos, sin))
        ctx.shape, ctx.options = qkv.shape, {"dtype": qkv.dtype, "device": qkv.device}
        ctx.set_materialize_grads(False)
        ctx.passes, turning = passes, qkv[:, :, :, :-1]
        if passes is not None:
            rotated = passes.forward(turning.detach(), *ctx.table)
        else:
            rotated = torch.empty(s, b, n, parts - 1, d, dtype=qkv.dtype, device=qkv.device)
            for out, x, *table in cache_blocks(rotated, turning, *ctx.table):
                rotate_into(out, x, table)
        local = rotated.flatten(1, 2).permute(1, 2, 0, 3)
        value = qkv.flatten(1, 2).permute(1, 2, 0, 3)[:, -1:]
        outputs = local[:, :-1], local[:, -1:], value
        if memory:
            own = qkv.permute(1, 2, 3, 0, 4)
            outputs += own[:, :, :-2], own[:, :, -2], own[:, :, -1]
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _, b, n, parts, _ = ctx.shape
        of_local = [x if x is None else x.unflatten(0, (b, n)).permute(3, 0, 1, 2, 4) for x in grads[:3]]
        of_memory = [
            x if x is None else (x if x.dim() == 5 else x.unsqueeze(2)).permute(3, 0, 1, 2, 4)
            for x in grads[3:] or (None, None, None)
        ]
        if ctx.passes is not None and None not in of_local:
            gradient = ctx.passes.backward(tuple(of_local), tuple(of_memory), *ctx.table, ctx.options["dtype"])
            return gradient, None, None, None, None
        gradient = torch.empty(ctx.shape, **ctx.options)
        places = gradient.split((parts - 2, 1, 1), dim=3)
        for place, local, memory in zip(places, of_local, of_memory, strict=True):
            if local is None:
                place.zero_() if memory is None else place.copy_(memory)
            elif place is not places[2]:
                for out, x, add, *table in cache_blocks(place, local, memory, *ctx.table):
                    rotate_into(out, x, table, back=True, add=add)
            elif memory is None:
                place.copy_(local)
            else:
                torch.add(local, memory, out=place)
        return gradient, None, None, None, None
