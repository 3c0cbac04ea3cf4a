"""Memory rules of Infini-attention and their kin: what a segment leaves behind, and what queries find in it.

b rows, n key/value heads, r query heads per key/value head, s tokens of a segment, d head dimension. A memory is a
tuple of tensors that begin with `[b, n]`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

WRITE_BLOCK = 64
"""Tokens that the token-by-token delta rule solves for at once."""


def phi(x: Tensor) -> Tensor:
    """ELU + 1 in a form that stays positive."""
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


def divide(numerator: Tensor, denominator: Tensor, epsilon: float) -> Tensor:
    """`numerator / denominator`, and 0 where the denominator says that nothing is stored."""
    stored = denominator > epsilon
    return numerator * (stored.to(denominator.dtype) / denominator.clamp_min(epsilon))


class NormalizedRule:
    """`linear` and `delta`: M `[b, n, d, d]` with a normaliser z `[b, n, d]`."""

    def __init__(self, delta: bool, epsilon: float):
        self.delta, self.epsilon = delta, epsilon

    def init(self, like: Tensor) -> tuple[Tensor, ...]:
        """An empty memory for keys `like [b, n, s, d]`."""
        b, n, _, d = like.shape
        return like.new_zeros(b, n, d, d), like.new_zeros(b, n, d)

    def read(self, query: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        """Read `[b, n, r*s, d]` for queries of that shape."""
        matrix, z = state
        query = phi(query)
        return divide(query @ matrix, query @ z.unsqueeze(-1), self.epsilon)

    def write(self, key: Tensor, value: Tensor, gate: Tensor | None, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The memory after a whole segment: key, value `[b, n, s, d]`, gate `[b, n, s]` or None."""
        matrix, z = state
        key = phi(key)
        if self.delta:
            value = value - divide(key @ matrix, key @ z.unsqueeze(-1), self.epsilon)
        written = key if gate is None else key * gate.unsqueeze(-1)
        return matrix + written.transpose(-1, -2) @ value, z + written.sum(dim=-2)

    def present(self, state: tuple[Tensor, ...]) -> Tensor:
        """`[b, n]`: 1 where anything has been written, else 0."""
        return (state[1].detach().sum(dim=-1) > 0).to(state[1].dtype)


class DeltaNetRule:
    """`deltanet`: the delta rule token by token, keys and queries L2-normalised; M `[b, n, d, d]` alone."""

    def init(self, like: Tensor) -> tuple[Tensor, ...]:
        b, n, _, d = like.shape
        return (like.new_zeros(b, n, d, d),)

    def read(self, query: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        return F.normalize(query, dim=-1) @ state[0]

    def write(self, key: Tensor, value: Tensor, gate: Tensor | None, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (matrix,) = state
        key = F.normalize(key, dim=-1)
        if gate is None:
            gate = torch.ones_like(key[..., 0])
        blocks = zip(*(x.split(WRITE_BLOCK, dim=2) for x in (key, value, gate.unsqueeze(-1))), strict=True)
        for k, v, g in blocks:  # WY form: the updates of a block are one triangular solve
            lower = torch.tril(g * k @ k.transpose(-1, -2), diagonal=-1)
            lower = lower + torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
            change = g * (v - k @ matrix)
            matrix = matrix + k.transpose(-1, -2) @ torch.linalg.solve_triangular(
                lower, change, upper=False, unitriangular=True
            )
        return (matrix,)

    def present(self, state: tuple[Tensor, ...]) -> Tensor:
        return (state[0].detach().abs().amax(dim=(-1, -2)) > 0).to(state[0].dtype)


RULES = {
    "linear": lambda config: NormalizedRule(False, config.memory_epsilon),
    "delta": lambda config: NormalizedRule(True, config.memory_epsilon),
    "deltanet": lambda config: DeltaNetRule(),
}

WRITE_GATES = {
    "none": None,
    "hard": lambda a: ((a + 2) / 4).clamp(0, 1),
    "sigmoid": torch.sigmoid,
}
