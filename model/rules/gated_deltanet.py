"""`gated_deltanet`: the delta rule with a decay, behind short convolutions (Gated Delta Networks, arXiv 2412.06464).

    q, k, v  SiLU of a causal depthwise convolution over 4 tokens; q and k then L2-normalised
    decay    a = exp(-exp(R) softplus(w x + b)), per token and key/value head, x the layer's normalised input
    write    per token   M <- a (M - g k (k^T M)^T) + g k v^T
    read     A = q^T M, of the state before the segment

with g the write gate (the paper's beta is `write_gate=sigmoid`). The convolutions run through segment borders inside a
document, so the last 3 tokens' q, k and v are part of the state. Only the memory sees convolved tokens.

Initial values. R = 0 and w = 0; b spreads the heads' decays per token geometrically from 1 - 1e-5 to 1 - 1e-3, half
lives of 69,000 to 690 tokens: the paper's own (exp(-0.001) and less) forget within one segment, before training could
find out what to keep. In log space a step of b changes a half life by the same factor wherever it is. Convolutions
start with the variance of PyTorch's default, as in the paper's code: keys hold something of the tokens before them
from the start. Where queries and keys start tied, both begin as the plain sum of 4 tokens: places that follow the same
tokens match, whichever they are.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.rules.base import LayerShape, MemoryRule, RuleParameter, Tokens
from model.rules.deltanet import block_length, scan_delta_rule, unit_length

WIDTH = 4
"""Tokens that the convolutions see, their own included."""
SLOWEST_DECAY, FASTEST_DECAY = 1e-5, 1e-3
"""Initial -log a of the first and the last key/value head."""

logger = logging.getLogger(__name__)


class ConvolvedState(NamedTuple):
    """M `[b, n, d, d]`, and the last tokens before the convolution `[b, n, r + 2, 3, d]`: of the head's r query heads,
    its key and its value."""

    M: Tensor
    tail: Tensor


class GatedDeltaNetRule(MemoryRule):
    """The rule; with flash-linear-attention installed, its kernel writes on a GPU under bfloat16."""

    token_inputs = ("decay",)

    def parameters(self, layer: LayerShape) -> dict[str, RuleParameter]:
        def decays(_: torch.Generator) -> Tensor:
            step = torch.logspace(math.log10(SLOWEST_DECAY), math.log10(FASTEST_DECAY), layer.groups)
            return torch.log(torch.expm1(step))  # softplus backwards

        def taps(generator: torch.Generator) -> Tensor:
            return torch.randn(rows, WIDTH, generator=generator) * (3 * WIDTH) ** -0.5

        def tied_taps(generator: torch.Generator) -> Tensor:
            drawn = taps(generator)
            drawn.view(layer.groups, layer.ratio + 2, -1)[:, : layer.ratio + 1] = WIDTH**-0.5
            return drawn

        rows = (layer.heads + 2 * layer.groups) * layer.dim
        return {
            "decay.weight": RuleParameter(
                (layer.groups, layer.hidden), lambda _: torch.zeros(layer.groups, layer.hidden), is_gate=True
            ),
            "decay.bias": RuleParameter((layer.groups,), decays, is_gate=True),
            "decay_rate": RuleParameter((layer.groups,), lambda _: torch.zeros(layer.groups), is_gate=True),
            # Rows as those of the q, k, v projection: per key/value head its query heads, its key, its value.
            "convolution": RuleParameter((rows, WIDTH), taps, is_gate=False, tied=tied_taps),
        }

    def init(self, lanes: int, layer: LayerShape, *, dtype: torch.dtype, device: torch.device) -> ConvolvedState:
        empty = super().init(lanes, layer, dtype=dtype, device=device)
        shape = (lanes, layer.groups, layer.ratio + 2, WIDTH - 1, layer.dim)
        return ConvolvedState(empty.M, torch.zeros(shape, dtype=dtype, device=device))

    def scan(
        self, tokens: Tokens, weights: Mapping[str, Tensor], state: ConvolvedState, keep: Tensor
    ) -> ConvolvedState:
        tail = _tails(tokens, state.tail, keep)
        taps = _taps(weights, tail)
        key = unit_length(_convolve(tail[:, :-1, :, -2], tokens.k, taps[:, -2]))
        value = _convolve(tail[:, :-1, :, -1], tokens.v, taps[:, -1])
        log_decay = -weights["decay_rate"].exp().unsqueeze(-1) * F.softplus(tokens.inputs["decay"])
        scan = _kernel_scan if _uses_kernel(tokens.bfloat16, key.device.type) else scan_delta_rule
        return ConvolvedState(scan(key, value, tokens.gate, log_decay, state.M, keep), tail)

    def read(self, q: Tensor, weights: Mapping[str, Tensor], state: ConvolvedState) -> Tensor:
        query = _convolve(state.tail[:, :, :, :-2], q, _taps(weights, state.tail)[:, :-2])
        return (unit_length(query).flatten(3, 4) @ state.M).view(q.shape)

    def inside(self, state: ConvolvedState, q: Tensor, start: Tensor) -> ConvolvedState:
        behind_tail = torch.cat([state.tail[:, :, :-2], q], dim=3)
        before = start[:, None] + torch.arange(WIDTH - 1, device=start.device)
        last = torch.take_along_dim(behind_tail, before[:, None, None, :, None], dim=3)
        return state._replace(tail=torch.cat([last, state.tail[:, :, -2:]], dim=2))

    def flops_per_token(self, layer: LayerShape) -> int:
        delta_rule = 2 * layer.heads * layer.dim**2 + 4 * layer.groups * layer.dim**2
        convolutions = 2 * WIDTH * (layer.heads + 2 * layer.groups) * layer.dim
        return delta_rule + convolutions + 2 * layer.hidden * layer.groups

    def saved_bytes(self, layer: LayerShape, length: int, m: int, c: int) -> tuple[int, int]:
        n, g, d = layer.heads, layer.groups, layer.dim
        block = block_length(length)
        per_token = n * d * (5 * m + c) + g * d * 10 * m + 3 * block * g * m + layer.hidden * c
        return per_token, (1 + 2 * length // block) * g * d * d * m


def _taps(weights: Mapping[str, Tensor], tail: Tensor) -> Tensor:
    """The convolutions' weights as `[n, r + 2, d, WIDTH]`."""
    parts, dim = tail.shape[-3], tail.shape[-1]
    return weights["convolution"].view(-1, parts, dim, WIDTH)


def _convolve(tail: Tensor, x: Tensor, taps: Tensor) -> Tensor:
    """SiLU of the causal convolution of `[..., s, d]` behind its tail `[..., 3, d]`, taps `[..., d, WIDTH]`."""
    padded, length = torch.cat([tail, x], dim=-2), x.shape[-2]
    return F.silu(sum(padded[..., i : i + length, :] * taps[..., None, :, i] for i in range(WIDTH)))


def _tails(tokens: Tokens, initial: Tensor, keep: Tensor) -> Tensor:
    """The last tokens before every segment and after the last one, `[b, t + 1, n, r + 2, 3, d]`; 0 where a document
    starts."""
    parts = (tokens.q[:, : tokens.k.shape[1]], tokens.k.unsqueeze(3), tokens.v.unsqueeze(3))
    last = torch.cat([x[..., -(WIDTH - 1) :, :] for x in parts], dim=3)
    tails, current = [], initial
    for t in range(last.shape[1]):
        current = current.where(keep[:, t].view(-1, 1, 1, 1, 1), 0)
        tails.append(current)
        # A segment shorter than the tail leaves some of the tail before it.
        current = torch.cat([current, last[:, t]], dim=-2)[..., -(WIDTH - 1) :, :]
    tails.append(current)
    return torch.stack(tails, dim=1)


@functools.cache
def _uses_kernel(bfloat16: bool, device: str) -> bool:
    """Whether flash-linear-attention's kernel writes; said once per process and setting.

    Its products are bfloat16, so a float32 run keeps to the torch form.
    """
    use = bfloat16 and device == "cuda" and importlib.util.find_spec("fla") is not None
    if use:
        logger.warning("gated_deltanet writes by flash-linear-attention's kernel, which this project has not tested")
    else:
        logger.info("gated_deltanet writes by the torch form")
    return use


def _kernel_scan(
    key: Tensor, value: Tensor, gate: Tensor | None, log_decay: Tensor, initial: Tensor, keep: Tensor
) -> Tensor:
    """`scan_delta_rule` by flash-linear-attention's chunked kernel, a call per segment; the state stays float32.

    Not tested: no GPU was at hand. Written against the interface of `chunk_gated_delta_rule` as of version 0.4.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    states, current = [], initial
    gate = torch.ones_like(log_decay) if gate is None else gate
    for t in range(key.shape[1]):
        current = current.where(keep[:, t].view(-1, 1, 1, 1), 0)
        states.append(current)
        k, v, g, beta = (x[:, t].transpose(1, 2).contiguous() for x in (key, value, log_decay, gate))
        k, v = k.bfloat16(), v.bfloat16()
        # Only the final state is wanted: the queries are zero.
        _, current = chunk_gated_delta_rule(
            torch.zeros_like(k), k, v, g, beta, initial_state=current, output_final_state=True
        )
    states.append(current)
    return torch.stack(states, dim=1)
