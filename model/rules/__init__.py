"""The memory rules: one file each, the table of their names, and what a layer carries before anything is read.

Adding one is a file and a line here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from model.config import LayerShape, MemoryConfig, ModelConfig
from model.rules.base import (
    MemoryRule,
    RuleParameter,
    Tokens,
)
from model.rules.convolution import ConvolvedRule
from model.rules.delta_product import DeltaProductRule
from model.rules.deltanet import DeltaNetRule
from model.rules.gated_deltanet import GatedDeltaNetRule
from model.rules.gdn2 import GatedDeltaNet2Rule
from model.rules.normalized import NormalizedRule, NormalizedState
from model.rules.state import LocalContext, State, join_state

__all__ = [
    "RULES",
    "MemoryRule",
    "NormalizedState",
    "RuleParameter",
    "Tokens",
    "build_rule",
    "empty_state",
    "has_convolution",
]

RULES: dict[str, Callable[[MemoryConfig], MemoryRule | None]] = {
    "none": lambda memory: None,
    "linear": lambda memory: NormalizedRule(delta=False, epsilon=memory.epsilon),
    "delta": lambda memory: NormalizedRule(delta=True, epsilon=memory.epsilon),
    "deltanet": lambda memory: DeltaNetRule(memory.kernel),
    "gated_deltanet": lambda memory: GatedDeltaNetRule(memory.kernel),
    "delta_product": lambda memory: DeltaProductRule(memory.kernel, steps=memory.num_householder),
    "kda": lambda memory: GatedDeltaNet2Rule(gates=False),
    "gdn2": lambda memory: GatedDeltaNet2Rule(gates=True),
}
"""By the name that `memory.rule` gives them. `none` is the plain transformer."""


CONVOLVED_BY_DEFAULT = ("gated_deltanet", "delta_product", "kda", "gdn2")
"""Rules that stand behind short convolutions where `memory.short_convolution` is null."""


def has_convolution(memory: MemoryConfig) -> bool:
    """Whether q, k and v pass short convolutions on their way to the memory."""
    if memory.short_convolution is None:
        return memory.rule in CONVOLVED_BY_DEFAULT
    return memory.short_convolution


def build_rule(memory: MemoryConfig) -> MemoryRule | None:
    """The rule that `memory` describes; None for `none`.

    Raises:
        ValueError: no such rule.
    """
    if memory.rule not in RULES:
        raise ValueError(f"memory.rule: no rule {memory.rule!r}; valid: {', '.join(RULES)}")
    rule = RULES[memory.rule](memory)
    return ConvolvedRule(rule, memory.convolution_width) if rule is not None and has_convolution(memory) else rule


def empty_state(
    config: ModelConfig,
    layer: LayerShape,
    lanes: int,
    *,
    dtype: torch.dtype,
    context_dtype: torch.dtype,
    device: torch.device,
) -> State | None:
    """What a layer carries when nothing has been read: the memory's state and the local context's, where there are
    such; None where there is neither.

    Args:
        dtype: of the memory.
        context_dtype: of the local context's keys and values: theirs, so that carrying them costs no digit and no byte.
    """
    rule = build_rule(config.memory)
    memory = None if rule is None else rule.empty(lanes, layer, dtype=dtype, device=device)
    if config.local_context == "segment":
        return memory
    shape = (lanes, layer.groups, config.segment_length, layer.dim)
    key, value = (torch.zeros(shape, dtype=context_dtype, device=device) for _ in range(2))
    return join_state(memory, LocalContext(key, value, key.new_zeros(*shape[:2], 1, dtype=dtype)))
