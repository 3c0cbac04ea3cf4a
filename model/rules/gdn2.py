"""`gdn2`: the delta rule with gates per channel (Gated DeltaNet-2, arXiv 2605.22791), and `kda`, the same without two
of them (Kimi Delta Attention of Kimi Linear, arXiv 2510.26692).

    decay    a = exp(-exp(R) softplus(f(x))), per channel of the key
    erase    b = sigmoid(f(x)), per channel of the key; `kda`: 1
    write    w = sigmoid(f(x)), per channel of the value; `kda`: 1
    write    per token   M <- (I - g k (b * k)^T) Diag(a) M + g k (w * v)^T
    read     A = q^T M, of the state before the segment

with q and k L2-normalised, x the layer's normalised input and g the write gate: KDA's scalar beta is
`write_gate=sigmoid`, Gated DeltaNet-2 has none (`write_gate=none`). Equal decays in all channels make `kda`
`gated_deltanet`, b = w = 1 make `gdn2` `kda`. The papers' short convolutions are in `model.rules.convolution`.

Every f is of low rank and has numbers of its own: r = 16 features per key/value head, linear in x, and of these, in the
head, a number per channel with a bias, f(x) = U (W x) + c. KDA has one bottleneck of d features for the decays of all
heads, Gated DeltaNet-2 that and full matrices for its two gates. Features per head need no sum over tensor-parallel
ranks, are kept for a segment that is being written (r numbers per token in place of d), and cost as much as KDA's where
there are d / 16 heads.

Initial values. U = 0, so a head's channels begin alike: decays where those of `gated_deltanet` do, erase and write
gates at sigmoid(2) = 0.88.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from model.config import LayerShape
from model.rules.base import RuleParameter, Tokens
from model.rules.borders import Borders
from model.rules.channel_blocks import solve_channel_blocks
from model.rules.delta_blocks import block_length
from model.rules.deltanet import DeltaNetRule
from model.rules.gated_deltanet import LogDecay, initial_decays
from model.rules.scan import scan_blocks
from model.rules.state import MatrixState

RANK = 16
"""Features per key/value head that the channels of a gate are made of, at most: not more than it has channels."""
OPEN = 2.0
"""Initial bias of erase and write gates."""


class GatedDeltaNet2Rule(DeltaNetRule):
    """`gdn2`, or `kda`.

    Args:
        gates: erase and write gates per channel.
    """

    def __init__(self, *, gates: bool) -> None:
        super().__init__(kernel="torch")
        self.gates = ("decay", "erase", "write") if gates else ("decay",)

    def token_inputs(self, layer: LayerShape) -> dict[str, int]:
        return dict.fromkeys(self.gates, _rank(layer))

    def parameters(self, layer: LayerShape) -> dict[str, RuleParameter]:
        rank, rows = _rank(layer), layer.groups * layer.dim

        def features(generator: torch.Generator) -> Tensor:
            return torch.randn(layer.groups * rank, layer.hidden, generator=generator) * layer.hidden**-0.5

        biases = {
            "decay": lambda _: initial_decays(layer).repeat_interleave(layer.dim),
            "erase": lambda _: torch.full((rows,), OPEN),
            "write": lambda _: torch.full((rows,), OPEN),
        }
        found = {"decay_rate": RuleParameter((layer.groups,), lambda _: torch.zeros(layer.groups), is_gate=True)}
        for name in self.gates:
            found |= {
                f"{name}.weight": RuleParameter((layer.groups * rank, layer.hidden), features, is_gate=True),
                f"{name}_up": RuleParameter((rows, rank), lambda _: torch.zeros(rows, rank), is_gate=True),
                f"{name}_bias": RuleParameter((rows,), biases[name], is_gate=True),
            }
        return found

    def write(
        self, tokens: Tokens, weights: Mapping[str, Tensor], state: MatrixState, borders: Borders
    ) -> tuple[MatrixState, MatrixState]:
        logits = {
            name: _channels(tokens.inputs[name], weights[f"{name}_up"], weights[f"{name}_bias"]) for name in self.gates
        }
        log_decay = borders.of_written(LogDecay.apply(weights["decay_rate"], logits["decay"]))
        erase_key, value = None, tokens.v
        if "erase" in logits:
            erase_key = _Gated.apply(logits["erase"], tokens.k)
            value = _Gated.apply(logits["write"], tokens.v)
        blocks = solve_channel_blocks(tokens.k, erase_key, value, tokens.gate, log_decay)
        before, after = scan_blocks(state.M, blocks, borders, tokens.part)
        return MatrixState(before), MatrixState(after)

    def flops_per_token(self, layer: LayerShape) -> int:
        of_gate = 2 * layer.groups * _rank(layer) * (layer.hidden + layer.dim)
        return super().flops_per_token(layer) + len(self.gates) * of_gate

    def saved_bytes(self, layer: LayerShape, length: int, m: int, c: int, *, gated: bool) -> tuple[int, int]:
        per_token, per_segment = super().saved_bytes(layer, length, m, c, gated=gated)
        g, d, rank = layer.groups, layer.dim, _rank(layer)
        # What becomes log a, log a, its sums, and keys that lie block by block.
        numbers = 3 * d + (d if block_length(length, d) < length else 0)
        if "erase" in self.gates:
            numbers += 4 * d  # both gates, and what is gated
        numbers += len(self.gates) * rank
        of_up = len(self.gates) * g * rank * d * m  # U beside the features of every segment
        return per_token + g * numbers * m, per_segment + of_up


class _Gated(Function):
    """y = sigmoid(x) v, in the precision of x. Backward: dv = sigmoid(x) dy, dx = (1 - sigmoid(x)) y dy. v itself is
    not kept: behind convolutions it is part of a buffer with all queries."""

    @staticmethod
    def forward(ctx, x: Tensor, v: Tensor) -> Tensor:
        gate = torch.sigmoid(x)
        gated = gate * v
        ctx.dtype = v.dtype
        ctx.save_for_backward(gate, gated)
        return gated

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, gated = ctx.saved_tensors
        return torch.addcmul(gated, gated, gate, value=-1).mul_(gradient), (gate * gradient).to(ctx.dtype)


def _rank(layer: LayerShape) -> int:
    return min(RANK, layer.dim)


def _channels(features: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """Numbers per channel `[b, t, n, s, d]` of features `[b, t, n, s, r]`, with U `[n d, r]` and c `[n d]`."""
    n, rank = features.shape[2], features.shape[-1]
    return features @ up.view(n, -1, rank).mT + bias.view(n, 1, -1)
