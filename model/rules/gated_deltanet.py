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

import functools
import importlib.util
import logging
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import LayerShape
from model.rules.base import RuleParameter, Tokens
from model.rules.deltanet import DeltaNetRule, block_length, scan_delta_rule, unit_length
from model.rules.state import MatrixState

SLOWEST_DECAY, FASTEST_DECAY = 1e-5, 1e-3
"""Initial -log a of the first and the last key/value head."""

logger = logging.getLogger(__name__)


class GatedDeltaNetRule(DeltaNetRule):
    """The rule; with flash-linear-attention installed, its kernel writes on a GPU under bfloat16."""

    token_inputs = ("decay",)

    def parameters(self, layer: LayerShape) -> dict[str, RuleParameter]:
        def decays(_: torch.Generator) -> Tensor:
            step = torch.logspace(math.log10(SLOWEST_DECAY), math.log10(FASTEST_DECAY), layer.groups)
            return torch.log(torch.expm1(step))  # softplus backwards

        return {
            "decay.weight": RuleParameter(
                (layer.groups, layer.hidden), lambda _: torch.zeros(layer.groups, layer.hidden), is_gate=True
            ),
            "decay.bias": RuleParameter((layer.groups,), decays, is_gate=True),
            "decay_rate": RuleParameter((layer.groups,), lambda _: torch.zeros(layer.groups), is_gate=True),
        }

    def scan(self, tokens: Tokens, weights: Mapping[str, Tensor], state: MatrixState, keep: Tensor) -> MatrixState:
        key = unit_length(tokens.k)
        log_decay = -weights["decay_rate"].exp().unsqueeze(-1) * F.softplus(tokens.inputs["decay"])
        scan = _kernel_scan if _uses_kernel(tokens.bfloat16, key.device.type) else scan_delta_rule
        return MatrixState(scan(key, tokens.v, tokens.gate, log_decay, state.M, keep))

    def flops_per_token(self, layer: LayerShape) -> int:
        return super().flops_per_token(layer) + 2 * layer.hidden * layer.groups

    def saved_bytes(self, layer: LayerShape, length: int, m: int, c: int) -> tuple[int, int]:
        per_token, per_segment = super().saved_bytes(layer, length, m, c)
        return per_token + 2 * block_length(length) * layer.groups * m + layer.hidden * c, per_segment


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
