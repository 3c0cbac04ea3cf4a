"""`deltanet`: the delta rule token by token, without a normaliser (DeltaNet, arXiv 2406.06484).

    read     A = q^T M, of the state before the segment
    write    per token   M <- M + g k (v - k^T M)^T

with q and k L2-normalised and g the write gate (`model.rules.delta_blocks`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from model.config import LayerShape
from model.rules.base import MemoryRule, Tokens
from model.rules.borders import Borders
from model.rules.context import ContextPart
from model.rules.delta_blocks import block_length, solve_blocks
from model.rules.feature_maps import unit_length_of
from model.rules.kernel import choose_kernel, scan_by_fla
from model.rules.scan import scan_blocks
from model.rules.state import MatrixState


def scan_delta_rule(
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    log_decay: Tensor | None,
    initial: Tensor,
    borders: Borders,
    part: ContextPart | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `M <- a (M - g k (k^T M)) + g k v^T` over all tokens of a window.

    Args:
        key, value, gate, log_decay: see `solve_blocks`.
        initial: M carried in, `[b, n, d, d]`.
        borders: where documents start.
        part: see `scan_pairs`.

    Returns:
        M before every segment `[b, t, n, d, d]`, after its reset, and M carried out `[b, n, d, d]`.
    """
    return scan_blocks(initial, solve_blocks(key, value, gate, log_decay), borders, part)


class DeltaNetRule(MemoryRule):
    """The read sees the state before the segment; the write is token by token.

    Args:
        kernel: what writes, one of `model.config.KERNELS`.
    """

    def __init__(self, kernel: str = "auto") -> None:
        self.kernel = kernel

    def features(
        self,
        q: Tensor,
        k: Tensor | None,
        dtype: torch.dtype,
        blind: Tensor | None = None,
        unwritten: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        return unit_length_of(q, k, dtype, blind, unwritten)

    def write(
        self, tokens: Tokens, weights: Mapping[str, Tensor], state: MatrixState, borders: Borders
    ) -> tuple[MatrixState, MatrixState]:
        return self.write_tokens(tokens, None, state, borders)

    def write_tokens(
        self, tokens: Tokens, log_decay: Tensor | None, state: MatrixState, borders: Borders
    ) -> tuple[MatrixState, MatrixState]:
        """`scan_delta_rule`, by the kernel that the run has."""
        device, dim = tokens.k.device.type, tokens.k.shape[-1]
        kernel = choose_kernel(self.kernel, bfloat16=tokens.bfloat16, device=device, dim=dim)
        scan = scan_by_fla if kernel.name == "fla" else scan_delta_rule
        before, after = scan(tokens.k, tokens.v, tokens.gate, log_decay, state.M, borders, tokens.part)
        return MatrixState(before), MatrixState(after)

    def look(self, query: Tensor, state: MatrixState) -> Tensor:
        return (query.flatten(3, 4) @ state.M).view(query.shape)

    def flops_per_token(self, layer: LayerShape) -> int:
        return 2 * layer.heads * layer.dim**2 + 4 * layer.groups * layer.dim**2

    def saved_bytes(self, layer: LayerShape, length: int, m: int, c: int, *, gated: bool) -> tuple[int, int]:
        _, n, g, d = layer
        block = block_length(length, d)
        # Queries and keys of length one with their lengths, and the reads.
        per_token = n * (2 * d + 1) * m + g * (d + 1) * m
        # [V | -e K] and Y; the inverse, and products where they are multiplied by gates.
        per_token += g * (3 * d + block * (1 + gated)) * m
        pairs = 2 * (length // block) - 1  # of blocks, and of what they are composed to
        return per_token, (1 + 2 * pairs) * g * d * d * m
