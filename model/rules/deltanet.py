"""`deltanet`: the delta rule token by token, without a normaliser (DeltaNet, arXiv 2406.06484).

    read     A = q^T M, of the state before the segment
    write    per token   M <- M + g k (v - k^T M)^T

with q and k L2-normalised and g the write gate. Inside a block of tokens the sequence of rank-one updates is one
triangular solve (the WY form, section 3 of the paper); blocks are scanned.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from model.config import LayerShape
from model.rules.base import MemoryRule, Tokens, affine_scan
from model.rules.kernel import choose_kernel, scan_by_fla
from model.rules.state import MatrixState

SMALLEST_SQUARE = 1e-24
"""Vectors whose square is smaller are not stretched to length one."""
WRITE_BLOCK = 64
"""Tokens that are solved for at once: the triangular systems stay [64, 64] however long a segment is."""


def unit_length(x: Tensor) -> Tensor:
    """`x` divided by its Euclidean norm over the last dim; zeros stay zeros.

    `F.normalize` by hand: torch's vector norm is slow over the strided heads of a projection (on a CPU, forward and
    backward, 3.5 ms against 1.2 ms for 8,192 heads of 32).
    """
    return x * x.square().sum(dim=-1, keepdim=True).clamp_min(SMALLEST_SQUARE).rsqrt()


def block_length(segment_length: int) -> int:
    """Tokens of a block; a segment that blocks do not divide is solved as one."""
    return WRITE_BLOCK if segment_length % WRITE_BLOCK == 0 else segment_length


def scan_delta_rule(
    key: Tensor, value: Tensor, gate: Tensor | None, log_decay: Tensor | None, initial: Tensor, keep: Tensor
) -> Tensor:
    """Run `M <- a (M - g k (k^T M)) + g k v^T` over all tokens of a window.

    With c_i the sum of log a up to token i of a block, a block's updates are u in

        (I + L) u = g v - g e^{c} k M,    L_ij = g_i e^{c_i - c_j} k_i k_j for j < i,

    and its end is e^{c_B} M + sum_j e^{c_B - c_j} k_j u_j.

    Args:
        key, value: `[b, t, n, s, d]`, keys of length one.
        gate: g, `[b, t, n, s]`; None for 1.
        log_decay: log a, `[b, t, n, s]`; None for 0.
        initial: M carried in, `[b, n, d, d]`.
        keep: bool `[b, t]`, False where a document starts.

    Returns:
        M at the segment borders, `[b, t + 1, n, d, d]`.
    """
    t, s, d = key.shape[1], key.shape[3], key.shape[4]
    block = block_length(s)
    blocks = s // block

    def split(x: Tensor) -> Tensor:  # [b, t, n, s, ...] -> [b, t * blocks, n, block, ...]
        return x.unflatten(3, (blocks, block)).transpose(2, 3).flatten(1, 2)

    gated_key, gated_value = (key, value) if gate is None else (key * gate.unsqueeze(-1), value * gate.unsqueeze(-1))
    key, gated_key, gated_value = split(key), split(gated_key), split(gated_value)
    products = gated_key @ key.transpose(-1, -2)
    last_key, decay = key, None
    if log_decay is not None:
        total = split(log_decay).cumsum(dim=-1)
        after_or_self = torch.ones(block, block, dtype=torch.bool, device=key.device).triu()
        # Exponents above the diagonal are positive and may overflow: masked before, not after.
        ratio = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(after_or_self, -torch.inf).exp()
        products = products * ratio
        gated_key = gated_key * total.exp().unsqueeze(-1)
        last_key = key * (total[..., -1:] - total).exp().unsqueeze(-1)
        decay = torch.expm1(total[..., -1])
    lower = torch.tril(products, diagonal=-1) + torch.eye(block, dtype=key.dtype, device=key.device)
    solved = torch.linalg.solve_triangular(
        lower, torch.cat([gated_key, gated_value], dim=-1), upper=False, unitriangular=True
    )
    w, u = solved.split(d, dim=-1)
    transition = -(last_key.transpose(-1, -2) @ w)
    if decay is not None:
        transition = transition + torch.diag_embed(decay.unsqueeze(-1).expand(*decay.shape, d))
    write = last_key.transpose(-1, -2) @ u
    if blocks > 1:  # only a segment's first block can start a document
        first = torch.arange(t * blocks, device=keep.device) % blocks == 0
        keep = torch.where(first, keep.repeat_interleave(blocks, dim=1), torch.ones_like(keep[:, :1]))
    return affine_scan(initial, transition, write, keep)[:, ::blocks]


class DeltaNetRule(MemoryRule):
    """The read sees the state before the segment; the write is token by token.

    Args:
        kernel: what writes, one of `model.config.KERNELS`.
    """

    def __init__(self, kernel: str = "auto") -> None:
        self.kernel = kernel

    def scan(self, tokens: Tokens, weights: Mapping[str, Tensor], state: MatrixState, keep: Tensor) -> MatrixState:
        key = unit_length(tokens.k)
        return MatrixState(self.write(key, tokens, None, state.M, keep))

    def write(self, key: Tensor, tokens: Tokens, log_decay: Tensor | None, initial: Tensor, keep: Tensor) -> Tensor:
        """`scan_delta_rule`, by the kernel that the run has."""
        device, dim = key.device.type, key.shape[-1]
        kernel = choose_kernel(self.kernel, bfloat16=tokens.bfloat16, device=device, dim=dim)
        scan = scan_by_fla if kernel.name == "fla" else scan_delta_rule
        return scan(key, tokens.v, tokens.gate, log_decay, initial, keep)

    def read(self, q: Tensor, weights: Mapping[str, Tensor], state: MatrixState) -> Tensor:
        return (unit_length(q.flatten(3, 4)) @ state.M).view(q.shape)

    def flops_per_token(self, layer: LayerShape) -> int:
        return 2 * layer.heads * layer.dim**2 + 4 * layer.groups * layer.dim**2

    def saved_bytes(self, layer: LayerShape, length: int, m: int, c: int) -> tuple[int, int]:
        n, g, d = layer.heads, layer.groups, layer.dim
        block = block_length(length)
        per_token = n * d * (3 * m + c) + g * d * (4 * m + c) + block * g * m
        return per_token, (1 + 2 * length // block) * g * d * d * m
