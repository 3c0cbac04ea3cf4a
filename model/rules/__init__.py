"""The memory rules: one file each, and the table of their names. Adding one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable

from model.config import MemoryConfig
from model.rules.base import (
    MemoryRule,
    RuleParameter,
    Tokens,
)
from model.rules.convolution import ConvolvedRule
from model.rules.deltanet import DeltaNetRule
from model.rules.gated_deltanet import GatedDeltaNetRule
from model.rules.normalized import NormalizedRule, NormalizedState

__all__ = [
    "RULES",
    "MemoryRule",
    "NormalizedState",
    "RuleParameter",
    "Tokens",
    "build_rule",
    "has_convolution",
]

RULES: dict[str, Callable[[MemoryConfig], MemoryRule | None]] = {
    "none": lambda memory: None,
    "linear": lambda memory: NormalizedRule(delta=False, epsilon=memory.epsilon),
    "delta": lambda memory: NormalizedRule(delta=True, epsilon=memory.epsilon),
    "deltanet": lambda memory: DeltaNetRule(),
    "gated_deltanet": lambda memory: GatedDeltaNetRule(),
}
"""By the name that `memory.rule` gives them. `none` is the plain transformer."""


CONVOLVED_BY_DEFAULT = ("gated_deltanet",)
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
    return ConvolvedRule(rule) if rule is not None and has_convolution(memory) else rule
