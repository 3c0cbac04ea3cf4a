"""Short convolutions in front of a memory rule (`model.memory.short_convolution`), as Gated Delta Networks have them
(arXiv 2412.06464, section 3.4).

    q, k, v  a causal depthwise convolution over 4 tokens, SiLU, then what the rule does with them

Rules with a feature map of their own (phi of `linear` and `delta`) get what is convolved without SiLU, which would push
all keys into one corner of phi: nothing below -0.28 is left, and phi is then 0.75 and more everywhere.

Keys then hold something of the tokens before them, which is what binds a value to its name. Only the memory sees
convolved tokens; the local attention gets them as they are. The convolutions run through segment borders inside a
document, so the last 3 tokens' q, k and v are part of the state.

Initial values have the variance of PyTorch's default, as in the paper's code. Where queries and keys start tied, both
begin as the plain sum of 4 tokens: places that follow the same tokens match, whichever they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import LayerShape
from model.rules.base import MemoryRule, RuleParameter, Tokens
from model.rules.state import State, extended_state

WIDTH = 4
"""Tokens that the convolutions see, their own included."""


class ConvolvedRule(MemoryRule):
    """Any rule behind short convolutions.

    The state is the rule's own and `tail`, the last tokens before the convolution `[b, n, r + 2, 3, d]`: of the head's
    r query heads, its key and its value.
    """

    def __init__(self, rule: MemoryRule) -> None:
        self.rule = rule
        self.activation = nn.Identity() if rule.has_feature_map else F.silu
        self.token_inputs = rule.token_inputs

    def parameters(self, layer: LayerShape) -> dict[str, RuleParameter]:
        def taps(generator: torch.Generator) -> Tensor:
            return torch.randn(rows, WIDTH, generator=generator) * (3 * WIDTH) ** -0.5

        def tied_taps(generator: torch.Generator) -> Tensor:
            drawn = taps(generator)
            drawn.view(layer.groups, layer.ratio + 2, -1)[:, : layer.ratio + 1] = WIDTH**-0.5
            return drawn

        rows = (layer.heads + 2 * layer.groups) * layer.dim
        return self.rule.parameters(layer) | {
            # Rows as those of the q, k, v projection: per key/value head its query heads, its key, its value.
            "convolution": RuleParameter((rows, WIDTH), taps, is_gate=False, tied=tied_taps),
        }

    def empty(self, lanes: int, layer: LayerShape, *, dtype: torch.dtype, device: torch.device) -> State:
        shape = (lanes, layer.groups, layer.ratio + 2, WIDTH - 1, layer.dim)
        empty = self.rule.empty(lanes, layer, dtype=dtype, device=device)
        return _join(empty, torch.zeros(shape, dtype=dtype, device=device))

    def scan(self, tokens: Tokens, weights: Mapping[str, Tensor], state: State, keep: Tensor) -> State:
        inner, tail = _split(state)
        tails = _tails(tokens, tail, keep)
        taps = _taps(weights, tails)
        convolved = tokens._replace(  # queries are read with, not written
            k=self._convolve(tails[:, :-1, :, -2], tokens.k, taps[:, -2]),
            v=self._convolve(tails[:, :-1, :, -1], tokens.v, taps[:, -1]),
        )
        return _join(self.rule.scan(convolved, weights, inner, keep), tails)

    def read(self, q: Tensor, weights: Mapping[str, Tensor], state: State) -> Tensor:
        inner, tail = _split(state)
        query = self._convolve(tail[:, :, :, :-2], q, _taps(weights, tail)[:, :-2])
        return self.rule.read(query, weights, inner)

    def inside(self, state: State, q: Tensor, start: Tensor) -> State:
        inner, tail = _split(state)
        behind_tail = torch.cat([tail[:, :, :-2], q], dim=3)
        before = start[:, None] + torch.arange(WIDTH - 1, device=start.device)
        last = torch.take_along_dim(behind_tail, before[:, None, None, :, None], dim=3)
        return _join(self.rule.inside(inner, q, start), torch.cat([last, tail[:, :, -2:]], dim=2))

    def present(self, state: State) -> Tensor:
        return self.rule.present(_split(state)[0])

    def flops_per_token(self, layer: LayerShape) -> int:
        return self.rule.flops_per_token(layer) + 2 * WIDTH * (layer.heads + 2 * layer.groups) * layer.dim

    def saved_bytes(self, layer: LayerShape, length: int, m: int, c: int) -> tuple[int, int]:
        per_token, per_segment = self.rule.saved_bytes(layer, length, m, c)
        n, g, d = layer.heads, layer.groups, layer.dim
        # The padded q, k, v instead of k's and v's copies; with SiLU also what it is applied to.
        kept = n * d * m + g * d * (4 * m - 2 * c) if self.rule.has_feature_map else n * d * 2 * m + g * d * (6 * m - c)
        return per_token + kept, per_segment

    def _convolve(self, tail: Tensor, x: Tensor, taps: Tensor) -> Tensor:
        """The causal convolution of `[..., s, d]` behind its tail `[..., 3, d]`, taps `[..., d, WIDTH]`, activated."""
        padded, length = torch.cat([tail, x], dim=-2), x.shape[-2]
        return self.activation(sum(padded[..., i : i + length, :] * taps[..., None, :, i] for i in range(WIDTH)))


def _join(inner: State, tail: Tensor) -> State:
    return extended_state(type(inner), ("tail",))(*inner, tail)


def _split(state: State) -> tuple[State, Tensor]:
    return type(state).inner(*state[:-1]), state[-1]


def _taps(weights: Mapping[str, Tensor], tail: Tensor) -> Tensor:
    """The convolutions' weights as `[n, r + 2, d, WIDTH]`."""
    parts, dim = tail.shape[-3], tail.shape[-1]
    return weights["convolution"].view(-1, parts, dim, WIDTH)


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
