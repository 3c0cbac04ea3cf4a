"""The memory rules written token by token, to be believed at sight: what `model.memory` is tested against.

One lane, one key/value head, plain loops, any dtype. `model.memory` must give the same outputs and gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _phi(x: Tensor) -> Tensor:
    return torch.nn.functional.elu(x) + 1


def _empty(dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    return like.new_zeros(dim, dim), like.new_zeros(dim)


def read_normalized(q: Tensor, M: Tensor, z: Tensor, epsilon: float) -> Tensor:
    """A_mem of one query `[d]` (equation 3)."""
    normaliser = _phi(q) @ z
    if normaliser <= epsilon:
        return torch.zeros_like(q)
    return (_phi(q) @ M) / normaliser


def window_normalized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    M: Tensor,
    z: Tensor,
    reset: list[bool],
    *,
    delta: bool,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear` and `delta` over a window.

    Args:
        q: `[t, r, s, d]`, the query heads that share this key/value head.
        k, v: `[t, s, d]`.
        gate: `[t, s]`.
        M, z: memory carried in, `[d, d]` and `[d]`.
        reset: per segment, whether a document starts there.

    Returns:
        Reads `[t, r, s, d]` and the memory carried out.
    """
    segments, queries, tokens, dim = q.shape
    reads = []
    for t in range(segments):
        if reset[t]:
            M, z = _empty(dim, q)
        for r in range(queries):
            for i in range(tokens):
                reads.append(read_normalized(q[t, r, i], M, z, epsilon))
        # All tokens of a segment are written against the memory before the segment.
        M_new, z_new = M, z
        for i in range(tokens):
            value = v[t, i]
            if delta:
                value = value - read_normalized(k[t, i], M, z, epsilon)
            M_new = M_new + gate[t, i] * torch.outer(_phi(k[t, i]), value)
            z_new = z_new + gate[t, i] * _phi(k[t, i])
        M, z = M_new, z_new
    return torch.stack(reads).view(segments, queries, tokens, dim), M, z


def window_deltanet(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, M: Tensor, reset: list[bool]
) -> tuple[Tensor, Tensor]:
    """`deltanet` over a window; arguments as in `window_normalized`, without z."""
    segments, queries, tokens, dim = q.shape
    reads = []
    for t in range(segments):
        if reset[t]:
            M, _ = _empty(dim, q)
        for r in range(queries):
            for i in range(tokens):
                query = q[t, r, i]
                reads.append((query / query.norm()) @ M)
        for i in range(tokens):
            key = k[t, i] / k[t, i].norm()
            M = M + gate[t, i] * torch.outer(key, v[t, i] - key @ M)
    return torch.stack(reads).view(segments, queries, tokens, dim), M
