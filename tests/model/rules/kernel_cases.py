"""Windows for the kernels of the delta rules, and what is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.rules.borders import Borders

NAMES = ("key", "value", "gate", "log_decay", "initial")
"""Arguments of `scan_delta_rule` with a gradient, in order."""


def scan_inputs(
    shape: Sequence[int], *, decay: bool = True, gate: bool = True, resets: bool = True, seed: int = 0
) -> tuple[list[Tensor | None], Tensor]:
    """Arguments of `scan_delta_rule` in float32 for (b, t, n, s, d), and reset. Some tokens' gates are closed; with
    `resets` a document starts in the last lane's middle segment."""
    b, t, n, s, d = shape
    generator = torch.Generator().manual_seed(seed)
    key = F.normalize(torch.randn(b, t, n, s, d, generator=generator), dim=-1)
    value = torch.randn(b, t, n, s, d, generator=generator)
    gates = torch.rand(b, t, n, s, generator=generator)
    gates[..., :3] = 0
    log_decay = -0.02 * torch.rand(b, t, n, s, generator=generator)
    initial = torch.randn(b, n, d, d, generator=generator)
    reset = torch.zeros(b, t, dtype=torch.bool)
    reset[-1, t // 2] = resets
    return [key, value, gates if gate else None, log_decay if decay else None, initial], reset


def gradients_of(
    scan: Callable[..., tuple[Tensor, Tensor]], inputs: Sequence[Tensor | None], reset: Tensor, dtype: torch.dtype
) -> list[Tensor | None]:
    """The states at the borders, and the gradients of a random projection of all of them."""
    leaves = [None if x is None else x.to(dtype).requires_grad_() for x in inputs]
    before, after = scan(*leaves, Borders(reset))
    states = torch.cat([before, after.unsqueeze(1)], dim=1)
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1)).to(states)
    (states * weights).sum().backward()
    return [states.detach(), *(None if x is None else x.grad for x in leaves)]


def relative_errors(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> list[float]:
    """Norm of the difference over norm of what is expected, per tensor; 0 where there is none."""
    pairs = zip(found, expected, strict=True)
    return [0.0 if y is None else ((x.double() - y.double()).norm() / y.norm()).item() for x, y in pairs]
