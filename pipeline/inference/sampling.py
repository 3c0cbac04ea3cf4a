"""Choosing the next token from its logits: greedy, or drawn after temperature, top-k and top-p, in this order.

Every prompt draws from a generator of its own, one number per token: what it is given does not depend on the rest of
the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NO_TOKEN = -1
"""What is chosen where there is nothing to choose from: scores that are NaN or infinite."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Raises:
        ValueError: a setting is outside of its range.
    """

    temperature: float = 0.0
    """0 takes the likeliest token; else logits are divided by it."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have at least this probability (nucleus sampling,
    arXiv 1904.09751)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature}: must be at least 0 (0 takes the likeliest token)")
        if self.temperature == 0 and (self.top_k is not None or self.top_p != 1):
            given = f"top-p {self.top_p}" if self.top_k is None else f"top-k {self.top_k}"
            raise ValueError(
                f"{given} chooses what is drawn from, but temperature 0 draws nothing, it takes the likeliest token: "
                "give a temperature, such as 1, or leave it out"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k {self.top_k}: must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p {self.top_p}: must be above 0 and at most 1")


def distribution(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities `[k]` in float64, largest first, and their tokens `[k]`; for a temperature above 0.

    Args:
        logits: `[vocabulary]`.
    """
    # The largest is 0 then, whatever the temperature: a quotient by 1e-310 would be infinite, and what follows NaN.
    scaled = (logits.double() - logits.max().double()) / sampling.temperature
    k = len(scaled) if sampling.top_k is None else min(sampling.top_k, len(scaled))
    largest, tokens = torch.topk(scaled, k)
    probabilities = torch.softmax(largest, dim=0)
    before = probabilities.cumsum(0) - probabilities
    kept = before < sampling.top_p  # the likeliest always
    probabilities = probabilities[kept]
    return probabilities / probabilities.sum(), tokens[kept]


def choose(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of every lane, int64 `[B]`: `NO_TOKEN` where a score is not finite.

    The likeliest tokens stay on the logits' device, and nobody waits for them. Drawn ones are on the host, which has
    the scores of all lanes in one copy.

    Args:
        logits: `[B, vocabulary]`.
        generators: one per lane, on the CPU; one number is taken from each, and none when the choice is greedy.
    """
    if sampling.temperature > 0:
        logits = logits.cpu()
    finite = torch.isfinite(logits).all(dim=1)
    if sampling.temperature == 0:
        return torch.where(finite, logits.argmax(dim=1), NO_TOKEN)
    lanes = zip(logits, finite.tolist(), generators, strict=True)
    return torch.tensor([_draw(row, sampling, own) if whole else NO_TOKEN for row, whole, own in lanes])


def _draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token by the `distribution` of its logits `[vocabulary]`, on the CPU."""
    probabilities, tokens = distribution(logits, sampling)
    drawn = torch.rand((), generator=generator, dtype=torch.float64)
    index = int(torch.searchsorted(probabilities.cumsum(0), drawn, right=True))
    return int(tokens[min(index, len(tokens) - 1)])
