"""`gated_deltanet`: the delta rule with a decay (Gated Delta Networks, arXiv 2412.06464).

    decay    a = exp(-exp(R) softplus(w x + b)), per token and key/value head, x the layer's normalised input
    write    per token   M <- a (M - g k (k^T M)^T) + g k v^T
    read     A = q^T M, of the state before the segment

with q and k L2-normalised and g the write gate (the paper's beta is `write_gate=sigmoid`). The paper's short
convolutions are in `model.rules.convolution`.

Initial values. R = 0 and w = 0; b spreads the heads' decays per token geometrically from 1 - 1e-5 to 1 - 1e-3, half
lives of 69,000 to 690 tokens: the paper's own (exp(-0.001) and less) forget within one segment, before training could
find out what to keep. In log space a step of b changes a half life by the same factor wherever it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from model.config import LayerShape
from model.rules.base import RuleParameter, Tokens
from model.rules.borders import Borders
from model.rules.delta_blocks import block_length
from model.rules.deltanet import DeltaNetRule
from model.rules.state import MatrixState

SLOWEST_DECAY, FASTEST_DECAY = 1e-5, 1e-3
"""Initial -log a of the first and the last key/value head."""


def initial_decays(layer: LayerShape) -> Tensor:
    """The bias that every key/value head's decays begin with, `[groups]`."""
    step = torch.logspace(math.log10(SLOWEST_DECAY), math.log10(FASTEST_DECAY), layer.groups)
    return torch.log(torch.expm1(step))  # softplus backwards


class GatedDeltaNetRule(DeltaNetRule):
    """`DeltaNetRule` with a decay."""

    def token_inputs(self, layer: LayerShape) -> dict[str, int]:
        return {"decay": 1}

    def parameters(self, layer: LayerShape) -> dict[str, RuleParameter]:
        return {
            "decay.weight": RuleParameter(
                (layer.groups, layer.hidden), lambda _: torch.zeros(layer.groups, layer.hidden), is_gate=True
            ),
            "decay.bias": RuleParameter((layer.groups,), lambda _: initial_decays(layer), is_gate=True),
            "decay_rate": RuleParameter((layer.groups,), lambda _: torch.zeros(layer.groups), is_gate=True),
        }

    def write(
        self, tokens: Tokens, weights: Mapping[str, Tensor], state: MatrixState, borders: Borders
    ) -> tuple[MatrixState, MatrixState]:
        log_decay = LogDecay.apply(weights["decay_rate"], tokens.inputs["decay"].squeeze(-1))
        return self.write_tokens(tokens, borders.of_written(log_decay), state, borders)

    def flops_per_token(self, layer: LayerShape) -> int:
        return super().flops_per_token(layer) + 2 * layer.hidden * layer.groups

    def saved_bytes(self, layer: LayerShape, length: int, m: int, c: int, *, gated: bool) -> tuple[int, int]:
        # Products are multiplied by decays, with a write gate or without.
        per_token, per_segment = super().saved_bytes(layer, length, m, c, gated=True)
        block = block_length(length, layer.dim)
        of_decay = layer.groups * (layer.dim + block + 4) * m  # -K, ratios, and what becomes log a
        return per_token + of_decay, per_segment


class LogDecay(Function):
    """log a = -exp(R) softplus(x) of R `[n]` and x `[b, t, n, s]` or `[b, t, n, s, d]`. Backward: dx = -exp(R)
    sigmoid(x) da, and dR is the sum of da log a."""

    @staticmethod
    def forward(ctx, rate: Tensor, x: Tensor) -> Tensor:
        factor = rate.exp().neg_().view(-1, *(1,) * (x.dim() - 3))
        log_decay = factor * F.softplus(x)
        ctx.save_for_backward(factor, x, log_decay)
        return log_decay

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        factor, x, log_decay = ctx.saved_tensors
        of_rate = (gradient * log_decay).sum(dim=[i for i in range(log_decay.dim()) if i != 2])
        return of_rate, torch.ops.aten.softplus_backward(gradient * factor, x, 1, 20)
