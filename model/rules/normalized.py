"""`linear` and `delta`: associative memory with a normaliser (Infini-attention, arXiv 2404.07143, equations 3 to 9).

    read     A = phi(q) M / (phi(q) z)
    write    linear:  M += phi(K)^T V                             z += sum phi(K)
             delta:   M += phi(K)^T (V - phi(K) M / (phi(K) z))   z likewise

A write gate multiplies phi(K) where it is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from model.config import LayerShape
from model.rules.base import MemoryRule, Tokens
from model.rules.borders import Borders
from model.rules.feature_maps import phi_of
from model.rules.scan import Blocks, scan_blocks, scan_sums


class NormalizedState(NamedTuple):
    """M `[b, n, d, d]` and z `[b, n, d]`."""

    M: Tensor
    z: Tensor


class NormalizedRule(MemoryRule):
    """`linear`, or `delta` when `delta`."""

    has_feature_map = True

    def __init__(self, delta: bool, epsilon: float) -> None:
        self.delta = delta
        self.epsilon = epsilon

    @property
    def keeps_value(self) -> bool:
        return not self.delta

    def empty(self, lanes: int, layer: LayerShape, *, dtype: torch.dtype, device: torch.device) -> NormalizedState:
        return NormalizedState(
            torch.zeros(lanes, layer.groups, layer.dim, layer.dim, dtype=dtype, device=device),
            torch.zeros(lanes, layer.groups, layer.dim, dtype=dtype, device=device),
        )

    def features(
        self,
        q: Tensor,
        k: Tensor | None,
        dtype: torch.dtype,
        blind: Tensor | None = None,
        unwritten: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        return phi_of(q, k, dtype, blind, unwritten)

    def write(
        self, tokens: Tokens, weights: Mapping[str, Tensor], state: NormalizedState, borders: Borders
    ) -> tuple[NormalizedState, NormalizedState]:
        key, gate = tokens.k, tokens.gate
        sums = key.sum(dim=-2) if gate is None else (gate.unsqueeze(-2) @ key).squeeze(-2)
        z, z_after = scan_sums(state.z, sums, borders, tokens.part)
        if self.delta:
            right = _Stored.apply(key, tokens.v, borders.for_writes(z), self.epsilon)
            # A segment is one block: what it takes off is what was stored before it.
            left, gate, right = (None if x is None else x.unsqueeze(3) for x in (key, gate, right))
            M, M_after = scan_blocks(state.M, Blocks(left, gate, right, None), borders, tokens.part)
        else:
            written = key if gate is None else key * gate.unsqueeze(-1)
            M, M_after = scan_sums(state.M, written.mT @ tokens.v.to(key.dtype), borders, tokens.part)
        return NormalizedState(M, z), NormalizedState(M_after, z_after)

    def look(self, query: Tensor, state: NormalizedState) -> Tensor:
        return _Read.apply(query, state.M, state.z, self.epsilon)

    def present(self, state: NormalizedState) -> Tensor:
        # z is a sum of positive numbers.
        return state.z.detach().sum(dim=-1).sign_()

    def flops_per_token(self, layer: LayerShape) -> int:
        writes = 2 if self.delta else 1  # delta also multiplies by what is stored
        return 2 * layer.heads * layer.dim**2 + writes * 2 * layer.groups * layer.dim**2

    def exchanges(self, layer: LayerShape) -> list[int]:
        of_normaliser, of_matrix = layer.groups * layer.dim, layer.groups * layer.dim**2
        return [of_normaliser, 2 * of_matrix if self.delta else of_matrix]

    def saved_bytes(self, layer: LayerShape, length: int, m: int, c: int, *, gated: bool) -> tuple[int, int]:
        _, n, g, d = layer
        # phi of queries and keys, the reads and their divisors.
        per_token = n * (2 * d + 1) * m + g * d * m
        if self.delta:  # values and keys over their normaliser; states, and transitions and writes
            return per_token + g * (2 * d + 1) * m, g * d * (4 * d + 1) * m
        return per_token + g * d * (c + gated * m), g * d * (d + 1) * m


def _divisor(normaliser: Tensor, epsilon: float) -> Tensor:
    """The normaliser, and infinity where it says that nothing is stored: what is divided by it is 0 there."""
    return F.threshold(normaliser, epsilon, torch.inf)


class _Read(Function):
    """A = N / D with [N | D] = Q [M | z], and 0 where D <= epsilon.

    Backward: dN = dA / D, dD = -(dN A) summed over d, dQ = [dN | dD] [M | z]^T, d[M | z] = Q^T [dN | dD].
    """

    @staticmethod
    def forward(ctx, query: Tensor, M: Tensor, z: Tensor, epsilon: float) -> Tensor:
        """Read `[b, t, n, r, s, d]` for phi of queries of that shape, M `[b, t, n, d, d]` and z `[b, t, n, d]`."""
        d = query.shape[-1]
        rows = query.reshape(-1, query.shape[3] * query.shape[4], d)
        joined = torch.cat([M, z.unsqueeze(-1)], dim=-1).view(-1, d, d + 1)
        product = torch.bmm(rows, joined)
        divisor = _divisor(product[..., d:], epsilon)
        read = product[..., :d] / divisor
        ctx.save_for_backward(rows, joined, read, divisor)
        return read.view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        rows, joined, read, divisor = ctx.saved_tensors
        b, t, n, r, s, d = gradient.shape
        found = torch.empty(*read.shape[:-1], d + 1, dtype=read.dtype, device=read.device)
        of_sum, of_divisor = found[..., :d], found[..., d:]
        torch.div(gradient.reshape(read.shape), divisor, out=of_sum)
        torch.sum(of_sum * read, dim=-1, keepdim=True, out=of_divisor).neg_()
        of_query = torch.bmm(found, joined.mT).view(gradient.shape)
        of_state = torch.bmm(rows.mT, found).view(b, t, n, d, d + 1)
        return of_query, of_state[..., :d], of_state[..., d], None


class _Stored(Function):
    """[V | E] of `delta`, with keys K behind phi, and E = K / -(K z) (0 where K z <= epsilon) for what the memory
    returns already.

    Backward, with D = K z: dK = -dE / D, dD = -(dE E) summed over d / D, dK += dD z^T, dz = dD K.
    """

    @staticmethod
    def forward(ctx, key: Tensor, value: Tensor, z: Tensor, epsilon: float) -> Tensor:
        """`[b, t, n, s, 2 d]` of phi of keys and values `[b, t, n, s, d]`, and the z before every segment
        `[b, t, n, d]`."""
        b, t, n, s, d = key.shape
        keys, z = key.flatten(0, 2), z.flatten(0, 2).unsqueeze(1)
        right = key.new_empty(b, t, n, s, 2 * d)
        right[..., :d] = value
        divisor = _divisor(torch.bmm(z, keys.mT), epsilon).neg_().mT
        torch.div(key, divisor.view(b, t, n, s, 1), out=right[..., d:])
        ctx.dtype = value.dtype
        ctx.save_for_backward(keys, right, divisor, z)
        return right

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        keys, right, divisor, z = ctx.saved_tensors
        b, t, n, s, d = right.shape[:-1] + keys.shape[-1:]
        of_stored = gradient[..., d:].flatten(0, 2)
        stored = right[..., d:].flatten(0, 2)
        of_normaliser = (of_stored * stored).sum(dim=-1, keepdim=True).div_(divisor)
        of_key = torch.div(of_stored, divisor).addcmul_(of_normaliser, z)
        of_z = torch.bmm(of_normaliser.mT, keys).view(b, t, n, d)
        return of_key.view(b, t, n, s, d), gradient[..., :d].to(ctx.dtype), of_z, None
