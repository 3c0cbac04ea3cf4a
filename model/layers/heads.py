"""From the output of the q, k, v projection to what the local attention and the memory take of it, and back.

One function each way: everything is a view of two tensors (the projection's output and the rotated queries and keys),
and the backward pass writes every gradient to its place in one. Slices and permutations that autograd takes apart by
itself cost a tensor of zeros, a copy and a sum each.

Shapes: s tokens of a segment, B folded lanes and segments, n key/value heads of this rank, r query heads per key/value
head, d head dimension.
"""

from __future__ import annotations

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


def split_heads(qkv: Tensor, table: Table, memory: bool) -> Heads:
    """Split `[s, B, n, r + 2, d]`: of every key/value head its query heads, its key, its value.

    Args:
        table: `[s, d]`, of the segment's positions.
        memory: there is one, which wants queries, keys and values as well.
    """
    return Heads(*_SplitHeads.apply(qkv, *table, memory))


def plain_split_heads(qkv: Tensor, table: Table, memory: bool) -> Heads:
    """`split_heads` for the compiler."""
    cos, sin = (x.view(-1, 1, 1, 1, qkv.shape[-1]) for x in table)
    turning = qkv[:, :, :, :-1]
    first, second = turning.chunk(2, dim=-1)
    rotated = (turning * cos + torch.cat([second, first], dim=-1) * sin).to(qkv.dtype)
    local = rotated.flatten(1, 2).permute(1, 2, 0, 3)
    value = qkv.flatten(1, 2).permute(1, 2, 0, 3)[:, -1:]
    if not memory:
        return Heads(local[:, :-1], local[:, -1:], value)
    own = qkv.permute(1, 2, 3, 0, 4)
    return Heads(local[:, :-1], local[:, -1:], value, own[:, :, :-2], own[:, :, -2], own[:, :, -1])


def join_heads(attended: Tensor, b: int) -> Tensor:
    """What the heads of B = b give, `[B*n, r, s, d]`, as hidden states `[s, B, n*r*d]`: a view where the attention
    lays its output out as its queries are."""
    return attended.unflatten(0, (b, -1)).permute(3, 0, 1, 2, 4).flatten(2)


class _SplitHeads(torch.autograd.Function):
    """Nothing is kept but the table. A gradient is the sum of what comes from both sides, that of the local attention
    rotated back."""

    @staticmethod
    def forward(ctx, qkv: Tensor, cos: Tensor, sin: Tensor, memory: bool) -> tuple[Tensor, ...]:
        s, b, n, parts, d = qkv.shape
        ctx.table = tuple(x.view(s, 1, 1, 1, d) for x in (cos, sin))
        ctx.shape, ctx.options = qkv.shape, {"dtype": qkv.dtype, "device": qkv.device}
        ctx.set_materialize_grads(False)
        rotated = torch.empty(s, b, n, parts - 1, d, dtype=qkv.dtype, device=qkv.device)
        for out, x, *table in cache_blocks(rotated, qkv[:, :, :, :-1], *ctx.table):
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
        gradient = torch.empty(ctx.shape, **ctx.options)
        places = gradient.split((parts - 2, 1, 1), dim=3)
        from_memory = grads[3:] or (None, None, None)
        for place, local, memory in zip(places, grads[:3], from_memory, strict=True):
            if local is not None:
                local = local.unflatten(0, (b, n)).permute(3, 0, 1, 2, 4)
            if memory is not None:
                memory = (memory if memory.dim() == 5 else memory.unsqueeze(2)).permute(3, 0, 1, 2, 4)
            if local is None:
                place.zero_() if memory is None else place.copy_(memory)
            elif place is not places[2]:
                for out, x, add, *table in cache_blocks(place, local, memory, *ctx.table):
                    rotate_into(out, x, table, back=True, add=add)
            elif memory is None:
                place.copy_(local)
            else:
                torch.add(local, memory, out=place)
        return gradient, None, None, None
