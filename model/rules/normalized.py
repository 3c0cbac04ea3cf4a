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
from torch import Tensor

from model.config import LayerShape
from model.rules.base import MemoryRule, Tokens, affine_scan


class NormalizedState(NamedTuple):
    """M `[b, n, d, d]` and z `[b, n, d]`."""

    M: Tensor
    z: Tensor


def phi(x: Tensor) -> Tensor:
    """ELU + 1, written so that it stays positive: `elu(x) + 1` rounds to 0 in low precision for x < -6."""
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


def _divide(numerator: Tensor, denominator: Tensor, epsilon: float) -> Tensor:
    """`numerator / denominator`, and 0 where the denominator says that nothing is stored."""
    stored = denominator > epsilon
    return numerator * (stored.to(denominator.dtype) / denominator.clamp_min(epsilon))


class NormalizedRule(MemoryRule):
    """`linear`, or `delta` when `delta`."""

    has_feature_map = True

    def __init__(self, delta: bool, epsilon: float) -> None:
        self.delta = delta
        self.epsilon = epsilon

    def empty(self, lanes: int, layer: LayerShape, *, dtype: torch.dtype, device: torch.device) -> NormalizedState:
        return NormalizedState(
            torch.zeros(lanes, layer.groups, layer.dim, layer.dim, dtype=dtype, device=device),
            torch.zeros(lanes, layer.groups, layer.dim, dtype=dtype, device=device),
        )

    def scan(
        self, tokens: Tokens, weights: Mapping[str, Tensor], state: NormalizedState, keep: Tensor
    ) -> NormalizedState:
        key = phi(tokens.k)
        written = key if tokens.gate is None else key * tokens.gate.unsqueeze(-1)
        z = affine_scan(state.z, None, written.sum(dim=-2), keep)
        write = written.transpose(-1, -2) @ tokens.v
        transition = None
        if self.delta:
            # The value that the memory already returns for each key is taken off before writing.
            stored = key @ z[:, :-1].unsqueeze(-1)
            transition = -(written.transpose(-1, -2) @ _divide(key, stored, self.epsilon))
        return NormalizedState(affine_scan(state.M, transition, write, keep), z)

    def read(self, q: Tensor, weights: Mapping[str, Tensor], state: NormalizedState) -> Tensor:
        query = phi(q.flatten(3, 4))
        return _divide(query @ state.M, query @ state.z.unsqueeze(-1), self.epsilon).view(q.shape)

    def present(self, state: NormalizedState) -> Tensor:
        # z is a sum of positive numbers.
        return (state.z.detach().sum(dim=-1) > 0).to(state.z.dtype)

    def flops_per_token(self, layer: LayerShape) -> int:
        writes = 2 if self.delta else 1  # delta also multiplies by what is stored
        return 2 * layer.heads * layer.dim**2 + writes * 2 * layer.groups * layer.dim**2

    def saved_bytes(self, layer: LayerShape, length: int, m: int, c: int) -> tuple[int, int]:
        n, g, d = layer.heads, layer.groups, layer.dim
        per_token = n * d * (5 * m + 1 + c) + g * d * (2 * m + 1 + 2 * c)
        states = 1
        if self.delta:
            per_token += g * d * m
            states = 3
        return per_token, states * g * d * d * m
