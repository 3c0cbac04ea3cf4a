"""What queries and keys pass on their way to a memory: into its precision, one head's tokens next to one another, and
through the rule's map. One function for both, on one buffer, with its backward pass written out.

    phi           exp(min(x, 0)) + max(x, 0), which is ELU + 1 (arXiv 2404.07143)
    unit length   x / |x|
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

SHORTEST = 1e-12
"""Vectors that are shorter are not stretched to length one."""


def phi(x: Tensor) -> Tensor:
    """ELU + 1, written so that it stays positive: `elu(x) + 1` rounds to 0 in low precision for x < -6."""
    return x.clamp(max=0).exp() + x.clamp(min=0)


def phi_(x: Tensor) -> None:
    """`phi` in place."""
    # With a gradient of one ELU's backward kernel is exp(min(x, 0)): one launch for two, and 0.4 ms for 0.8 on a CPU.
    exponential = torch.ops.aten.elu_backward(x.new_ones(()).expand_as(x), 1, 1, 1, False, x)
    x.clamp_min_(0).add_(exponential)


def phi_slope(mapped: Tensor) -> Tensor:
    """The derivative of phi from its value."""
    return mapped.clamp_max(1)


def unit_length_(x: Tensor) -> Tensor:
    """Divide `x` by its Euclidean norm over the last dim, in place; zeros stay zeros. Returns the divisor."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(SHORTEST)
    x.div_(length)
    return length


def phi_of(
    q: Tensor, k: Tensor | None, dtype: torch.dtype, blind: Tensor | None = None, unwritten: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """phi of queries and keys.

    Args:
        q: `[b, t + p, n, r, s, d]`, of any precision and strides.
        k: `[b, t, n, s, d]`, or None.
        dtype: the memory's.
        blind: bool `[b, t + p, s]` or None, True where a query becomes 0.
        unwritten: bool `[b, t, s]` or None, True where a key becomes 0.

    Returns:
        Both in `dtype`; the `[r s, d]` of a query's head and the `[s, d]` of a key's are contiguous.
    """
    return _Mapped.apply(q, k, dtype, blind, unwritten, True)


def unit_length_of(
    q: Tensor, k: Tensor | None, dtype: torch.dtype, blind: Tensor | None = None, unwritten: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`phi_of` with length one in place of phi."""
    return _Mapped.apply(q, k, dtype, blind, unwritten, False)


def plain_phi_of(
    q: Tensor, k: Tensor | None, dtype: torch.dtype, blind: Tensor | None = None, unwritten: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`phi_of` for the compiler."""

    def mapped(x: Tensor, absent: Tensor | None) -> Tensor:
        x = x.to(dtype)
        x = torch.where(x > 0, x + 1, x.clamp(max=0).exp())
        return (x if absent is None else x.masked_fill(_per_token(absent, x), 0)).contiguous()

    return mapped(q, blind), None if k is None else mapped(k, unwritten)


def plain_unit_length_of(
    q: Tensor, k: Tensor | None, dtype: torch.dtype, blind: Tensor | None = None, unwritten: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`unit_length_of` for the compiler."""

    def mapped(x: Tensor, absent: Tensor | None) -> Tensor:
        x = x.to(dtype)
        x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(SHORTEST)
        return (x if absent is None else x.masked_fill(_per_token(absent, x), 0)).contiguous()

    return mapped(q, blind), None if k is None else mapped(k, unwritten)


class _Mapped(Function):
    """phi: dx = min(phi, 1) dy. Unit length: dx = (dy - y (y dy)) / |x|.

    What becomes 0 has no gradient: min(phi, 1) is 0 there, and |x| is set to infinity.
    """

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor | None,
        dtype: torch.dtype,
        blind: Tensor | None,
        unwritten: Tensor | None,
        is_phi: bool,
    ):
        together = k is not None and q.shape[1] == k.shape[1]
        buffers = _buffers(q, k, together, dtype)
        mapped = _parts(buffers, k is not None, together)
        for x, into in zip((q, k), mapped, strict=False):
            into.copy_(x)
        lengths = []
        for buffer in buffers:
            if is_phi:
                phi_(buffer)
            else:
                lengths.append(unit_length_(buffer))
        absent = (blind, unwritten)
        _fill(mapped, absent, 0)
        _fill(_parts(lengths, k is not None, together) if lengths else (), absent, torch.inf)
        ctx.is_phi, ctx.has_key, ctx.together = is_phi, k is not None, together
        ctx.dtype = q.dtype
        ctx.save_for_backward(*buffers, *lengths)
        return mapped if k is not None else (*mapped, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        saved = ctx.saved_tensors
        count = 1 if ctx.together or not ctx.has_key else 2
        buffers, lengths = saved[:count], saved[count:]
        found = []
        if ctx.is_phi:
            slopes = _parts([phi_slope(x) for x in buffers], ctx.has_key, ctx.together)
            for gradient, slope in zip(gradients, slopes, strict=False):
                found.append(torch.mul(gradient, slope, out=_empty_as(gradient, ctx.dtype)))
        else:
            parts = (_parts(x, ctx.has_key, ctx.together) for x in (buffers, lengths))
            for gradient, mapped, length in zip(gradients, *parts, strict=False):
                along = (gradient * mapped).sum(dim=-1, keepdim=True)
                across = torch.addcmul(gradient, mapped, along, value=-1)
                found.append(torch.div(across, length, out=_empty_as(gradient, ctx.dtype)))
        return found[0], found[1] if ctx.has_key else None, None, None, None, None


def _buffers(q: Tensor, k: Tensor | None, together: bool, dtype: torch.dtype) -> list[Tensor]:
    """Where queries and keys are mapped: one buffer `[b, t, n, r + 1, s, d]` where they are of the same segments."""
    b, t, n, r, s, d = q.shape
    if together:
        return [q.new_empty(b, t, n, r + 1, s, d, dtype=dtype)]
    shapes = [q.shape] if k is None else [q.shape, k.shape]
    return [q.new_empty(shape, dtype=dtype) for shape in shapes]


def _parts(buffers: list[Tensor] | tuple[Tensor, ...], has_key: bool, together: bool) -> tuple[Tensor, ...]:
    if together and has_key:
        return buffers[0][:, :, :, :-1], buffers[0][:, :, :, -1]
    return tuple(buffers)


def _fill(parts: tuple[Tensor, ...], absent: tuple[Tensor | None, ...], value: float) -> None:
    """Set what queries and keys have, in this order, to `value` for tokens that are `absent`."""
    for x, tokens in zip(parts, absent, strict=False):
        if tokens is not None:
            x.masked_fill_(_per_token(tokens, x), value)


def _per_token(of_tokens: Tensor, x: Tensor) -> Tensor:
    """`[b, t, s]` so that it broadcasts over queries `[b, t, n, r, s, d]` or keys `[b, t, n, s, d]`."""
    return of_tokens.view(*of_tokens.shape[:2], *(1,) * (x.dim() - 4), of_tokens.shape[2], 1)


def _empty_as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)
