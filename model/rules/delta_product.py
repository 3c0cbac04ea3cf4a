"""`delta_product`: several steps of the delta rule per token (Gated DeltaProduct, arXiv 2502.10297).

    decay    a, per token and key/value head: that of `gated_deltanet`
    write    per token   M <- a M, then for j = 1 .. n    M <- M - g_j k_j (k_j^T M)^T + g_j k_j v_j^T
    read     A = q^T M, of the state before the segment

with n = `model.memory.num_householder`, and q and all k_j L2-normalised. A token's own key, value and write gate g are
its last step, so that what is stored under its key in the end is what it wrote there. The n - 1 steps before it have
linear functions of x, the layer's normalised input, for themselves:

    k_j = K_j x,    v_j = V_j x,    g_j = g sigmoid(w_j x + c_j)

A token that the write gate closes so takes no step. n = 1 is `gated_deltanet`: where that can take off what is stored
along one key per token, this takes it off along n. Gates stay within 1. The paper's variant with gates up to 2, whose
steps reflect and whose tokens so rotate the state, is not here.

K_j and V_j are whole matrices, d numbers per key/value head, as in the paper, and split by head. Short convolutions
(`model.rules.convolution`) are in front of a token's own key and value alone.

A token is n tokens of the delta rule, of which only the first decays: a segment has n times the steps, and all that
solves and scans them is `gated_deltanet`'s.

Initial values. K_j and V_j are drawn so that what they make has variance 1. w_j = 0 and c_j = -2: a step begins with a
gate of 0.12, near `gated_deltanet`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import LayerShape
from model.rules.base import RuleParameter, Tokens
from model.rules.borders import Borders
from model.rules.gated_deltanet import GatedDeltaNetRule
from model.rules.state import MatrixState

CLOSED = -2.0
"""Initial bias of the gates of a token's steps before its own."""


class DeltaProductRule(GatedDeltaNetRule):
    """`GatedDeltaNetRule` with several steps per token.

    Args:
        steps: n, of which n - 1 come before a token's own.
    """

    def __init__(self, kernel: str = "auto", *, steps: int) -> None:
        super().__init__(kernel)
        self.steps = steps

    def token_inputs(self, layer: LayerShape) -> dict[str, int]:
        before = self.steps - 1
        widths = {"step_key": before * layer.dim, "step_value": before * layer.dim, "step_gate": before}
        return super().token_inputs(layer) | (widths if before else {})

    def parameters(self, layer: LayerShape) -> dict[str, RuleParameter]:
        found = super().parameters(layer)
        if self.steps == 1:
            return found
        gates, rows = (layer.groups * (self.steps - 1) * x for x in (1, layer.dim))

        def drawn(generator: torch.Generator) -> Tensor:
            return torch.randn(rows, layer.hidden, generator=generator) * layer.hidden**-0.5

        return found | {
            "step_key.weight": RuleParameter((rows, layer.hidden), drawn, is_gate=False),
            "step_value.weight": RuleParameter((rows, layer.hidden), drawn, is_gate=False),
            "step_gate.weight": RuleParameter(
                (gates, layer.hidden), lambda _: torch.zeros(gates, layer.hidden), is_gate=True
            ),
            "step_gate.bias": RuleParameter((gates,), lambda _: torch.full((gates,), CLOSED), is_gate=True),
        }

    def write_tokens(
        self, tokens: Tokens, log_decay: Tensor, state: MatrixState, borders: Borders
    ) -> tuple[MatrixState, MatrixState]:
        if self.steps > 1:
            tokens = self._all_steps(tokens, borders)
            log_decay = F.pad(log_decay.unsqueeze(-1), (0, self.steps - 1)).flatten(-2)
        return super().write_tokens(tokens, log_decay, state, borders)

    def flops_per_token(self, layer: LayerShape) -> int:
        of_step = 4 * layer.groups * layer.dim**2 + 2 * layer.hidden * layer.groups * (2 * layer.dim + 1)
        return super().flops_per_token(layer) + (self.steps - 1) * of_step

    def saved_bytes(self, layer: LayerShape, length: int, m: int, c: int, *, gated: bool) -> tuple[int, int]:
        per_step, per_segment = super().saved_bytes(layer, self.steps * length, m, c, gated=gated)
        of_queries = layer.heads * (2 * layer.dim + 1) * m
        return self.steps * (per_step - of_queries) + of_queries, per_segment

    def _all_steps(self, tokens: Tokens, borders: Borders) -> Tokens:
        """Keys, values and gates of segments of n s steps. Keys are features already."""
        key, value = (
            tokens.inputs[name].unflatten(-1, (self.steps - 1, -1)) for name in ("step_key", "step_value")
        )  # [b, t, n, s, steps before, d]
        key, _ = self.features(key.transpose(3, 4), None, tokens.k.dtype, borders.unwritten)
        gate = torch.sigmoid(tokens.inputs["step_gate"])
        own = torch.ones_like(gate[..., :1])
        if tokens.gate is not None:
            own = tokens.gate.unsqueeze(-1)
            gate = gate * own
        return tokens._replace(
            k=torch.cat([key.transpose(3, 4), tokens.k.unsqueeze(4)], dim=4).flatten(3, 4),
            v=torch.cat([value, tokens.v.unsqueeze(4)], dim=4).flatten(3, 4),
            gate=torch.cat([gate, own], dim=-1).flatten(-2),
        )
