"""How many pairs a memory rule holds when nothing has to be learnt: random keys and values, written once and read back.

The rule's own code writes and reads one head. A trained model can at best bring its keys and values into a form that
the rule likes, so this says what a rule holds apart from what training finds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import LayerShape, MemoryConfig
from model.rules import Tokens, build_rule
from model.rules.borders import Borders
from model.rules.state import map_state

CODES = 90
"""Different values, such as the two-digit numbers of `recall`: guessing is right once in 90 times."""
LANES = 64
"""Memories that are filled at a time."""
NO_DECAY = -30.0
"""Bias of a decay of e^-30 per token: none."""


def recalled(
    rule_name: str, dim: int, pairs: int, *, keys: str, sharpness: float, segment_length: int, seed: int
) -> tuple[int, int]:
    """Write `pairs` pairs into one head of `LANES` memories and read all of them back.

    Args:
        dim: d of the d x d memory.
        keys: `random` (Gaussian, of a length around sqrt(dim) x sharpness) or `orthogonal` (as long; at most `dim`).
        sharpness: scale of the keys; only rules that do not normalise them are touched by it.
        segment_length: pairs that are written at once; the last segment is filled with nothing (write gate 0).

    Returns:
        How many values came back right (nearest of `CODES` by the angle), and how many were asked for.

    Raises:
        ValueError: more orthogonal keys than dimensions, or an unknown kind of keys.
    """
    generator = torch.Generator().manual_seed(seed)
    k = _keys(keys, dim, pairs, sharpness, generator)
    codes = torch.randn(CODES, dim, generator=generator)
    chosen = torch.randint(CODES, (LANES, pairs), generator=generator)
    segments = -(-pairs // segment_length)
    rest = segments * segment_length - pairs

    def split(x: Tensor) -> Tensor:  # [b, pairs, ...] -> [b, t, n, s, ...]
        padding = x.new_zeros(LANES, rest, *x.shape[2:])
        return torch.cat([x, padding], dim=1).unflatten(1, (segments, 1, segment_length))

    rule = build_rule(MemoryConfig(rule=rule_name, short_convolution=False))
    layer = LayerShape(dim, 1, 1, dim)
    gate = split(torch.ones(LANES, pairs))
    query = split(k).unsqueeze(3)
    weights = {name: parameter.initial(generator) for name, parameter in rule.parameters(layer).items()}
    if "decay_bias" in weights:
        weights["decay_bias"] = torch.full_like(weights["decay_bias"], NO_DECAY)
    inputs = {}
    for name, numbers in rule.token_inputs(layer).items():
        bias = NO_DECAY if f"{name}.bias" in weights else 0.0  # without one they are features
        inputs[name] = gate.new_full((*gate.shape, numbers), bias)
    tokens = Tokens(query, split(k), split(codes[chosen]), gate, inputs)
    state = rule.empty(LANES, layer, dtype=torch.float32, device=k.device)
    _, after = rule.scan(tokens, weights, state, Borders(torch.zeros(LANES, segments, dtype=torch.bool)))
    last = map_state(after, lambda x: x.unsqueeze(1).expand(-1, segments, *x.shape[1:]))
    read = rule.read(query, weights, last).flatten(1, 4)[:, :pairs]
    angles = F.normalize(read, dim=-1) @ F.normalize(codes, dim=-1).T
    right = (angles.argmax(dim=-1) == chosen) & (read.norm(dim=-1) > 0)
    return int(right.sum()), right.numel()


def _keys(kind: str, dim: int, pairs: int, sharpness: float, generator: torch.Generator) -> Tensor:
    """`[LANES, pairs, dim]`."""
    if kind == "random":
        return sharpness * torch.randn(LANES, pairs, dim, generator=generator)
    if kind != "orthogonal":
        raise ValueError(f"keys {kind!r}: valid are random, orthogonal")
    if pairs > dim:
        raise ValueError(f"{pairs} orthogonal keys do not fit in {dim} dimensions")
    basis = torch.linalg.qr(torch.randn(LANES, dim, dim, generator=generator)).Q
    return sharpness * dim**0.5 * basis[:, :pairs]


def capacity_curve(
    rule_name: str,
    dim: int,
    pairs: Sequence[int],
    *,
    keys: str,
    sharpness: float,
    segment_length: int,
    repetitions: int,
) -> list[tuple[int, int]]:
    """`recalled`, summed over `repetitions` seeds, for each number of pairs."""
    curve = []
    for count in pairs:
        found = [
            recalled(
                rule_name, dim, count, keys=keys, sharpness=sharpness, segment_length=segment_length, seed=repetition
            )
            for repetition in range(repetitions)
        ]
        curve.append((sum(right for right, _ in found), sum(asked for _, asked in found)))
    return curve
