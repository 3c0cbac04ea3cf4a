"""The memory rules written token by token, to be believed at sight: what `model.rules` is tested against.

One lane, one key/value head, plain loops, any dtype. `model.rules` must give the same outputs and gradients.
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


def _reads(q: Tensor, M: Tensor) -> list[Tensor]:
    """A_mem of a segment's queries `[r, s, d]`, one after the other: what the rules without a normaliser read."""
    return [(query / query.norm()) @ M for head in q for query in head]


def window_deltanet(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, M: Tensor, reset: list[bool], log_decay: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`deltanet` over a window, and `gated_deltanet` with log a, `[t, s]`; the other arguments as in
    `window_normalized`, without z."""
    segments, queries, tokens, dim = q.shape
    reads = []
    for t in range(segments):
        if reset[t]:
            M, _ = _empty(dim, q)
        reads += _reads(q[t], M)
        for i in range(tokens):
            key = k[t, i] / k[t, i].norm()
            if log_decay is not None:
                M = log_decay[t, i].exp() * M
            M = M + gate[t, i] * torch.outer(key, v[t, i] - key @ M)
    return torch.stack(reads).view(segments, queries, tokens, dim), M


def window_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    M: Tensor,
    reset: list[bool],
    log_decay: Tensor,
    step_key: Tensor,
    step_value: Tensor,
    step_gate: Tensor,
) -> tuple[Tensor, Tensor]:
    """`delta_product` over a window; keys and values of the steps before a token's own `[t, s, n - 1, d]`, their gates
    `[t, s, n - 1]`, of which g is no part, the other arguments as in `window_deltanet`."""
    segments, queries, tokens, dim = q.shape
    identity = torch.eye(dim, dtype=q.dtype)
    reads = []
    for t in range(segments):
        if reset[t]:
            M, _ = _empty(dim, q)
        reads += _reads(q[t], M)
        for i in range(tokens):
            M = log_decay[t, i].exp() * M
            steps = [*zip(step_key[t, i], step_value[t, i], gate[t, i] * step_gate[t, i], strict=True)]
            for key, value, g in [*steps, (k[t, i], v[t, i], gate[t, i])]:
                key = key / key.norm()
                M = (identity - g * torch.outer(key, key)) @ M + g * torch.outer(key, value)
    return torch.stack(reads).view(segments, queries, tokens, dim), M


def window_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    M: Tensor,
    reset: list[bool],
    log_decay: Tensor,
    erase: Tensor | None = None,
    write: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`gdn2` over a window, and `kda` without erase and write gates; log a and the gates `[t, s, d]`, the other
    arguments as in `window_deltanet`."""
    segments, queries, tokens, dim = q.shape
    erase, write = (torch.ones_like(v) if x is None else x for x in (erase, write))
    identity = torch.eye(dim, dtype=q.dtype)
    reads = []
    for t in range(segments):
        if reset[t]:
            M, _ = _empty(dim, q)
        reads += _reads(q[t], M)
        for i in range(tokens):
            key = k[t, i] / k[t, i].norm()
            erased = identity - gate[t, i] * torch.outer(key, erase[t, i] * key)
            M = erased @ torch.diag(log_decay[t, i].exp()) @ M + gate[t, i] * torch.outer(key, write[t, i] * v[t, i])
    return torch.stack(reads).view(segments, queries, tokens, dim), M


def window_convolution(
    q: Tensor, k: Tensor, v: Tensor, taps: Tensor, tail: Tensor, reset: list[bool], *, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The short convolutions before a rule, over a window.

    Args:
        q, k, v, reset: as in `window_normalized`.
        taps: `[r + 2, d, width]`, of the query heads, the key and the value, oldest token first.
        tail: the width - 1 tokens before the window, `[r + 2, width - 1, d]`.
        silu: what is convolved passes SiLU.

    Returns:
        q, k and v as the rule gets them, and the tail carried out.
    """
    past = list(tail.unbind(dim=1))  # every token so far, [r + 2, d] each
    convolved = []
    for t in range(q.shape[0]):
        if reset[t]:
            past = [torch.zeros_like(past[0]) for _ in past]
        for i in range(q.shape[2]):
            past.append(torch.cat([q[t, :, i], k[t, i][None], v[t, i][None]]))
            summed = sum(taps[:, :, -1 - back] * past[-1 - back] for back in range(taps.shape[-1]))
            convolved.append(summed / (1 + (-summed).exp()) if silu else summed)
    by_segment = torch.stack(convolved).unflatten(0, (q.shape[0], -1)).transpose(1, 2)  # [t, r + 2, s, d]
    return by_segment[:, :-2], by_segment[:, -2], by_segment[:, -1], torch.stack(past[-tail.shape[1] :], dim=1)
