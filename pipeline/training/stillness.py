"""What does not learn although it should: gradients that are exactly 0, and parameters that never move.

Both are silent otherwise: the loss is a number, the run ends well. The norms come with every step. Parameters are
compared by the sum of their bits, at the end of a log interval and only until each has moved once. What is frozen, or
has a learning rate of 0, is still on purpose.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from data.files import some
from pipeline.config.schema import Config
from pipeline.parallel.optimizer import StepOutcome, ZeroOptimizer

SHORTEST_HORIZON = 10
"""Steps that a kind of parameters learns before it is called still: the first windows may give it nothing to learn."""
NAMES_SHOWN = 4


def horizon(config: Config) -> int:
    """Steps after which what learns nothing is named."""
    return min(max(SHORTEST_HORIZON, config.metrics.interval), config.train.steps)


class StillnessWatch:
    """Collects what stands still; the same on all processes.

    Args:
        optimizer: its parameters are as the run starts with them.
        horizon: steps after which a kind of parameters that learns, but does not, is named.
    """

    def __init__(self, optimizer: ZeroOptimizer, *, horizon: int) -> None:
        self.optimizer, self.horizon = optimizer, horizon
        self.kind_of = optimizer.trained_names()
        self.unmoved = list(self.kind_of)
        self.start = self._bits()
        self.learning = dict.fromkeys(optimizer.kinds, 0)
        """Steps with a learning rate since the start."""
        self.silent = dict.fromkeys(optimizer.kinds, 0)
        """Such steps in a row, up to now, whose gradient was exactly 0."""
        self.norms: dict[str, float] = {}
        self.zero_steps = 0
        self.in_zero = False
        self.said: set[str] = set()

    def after_step(self, step: int, outcome: StepOutcome, rate: float, weight: float) -> str | None:
        """Take in a step; a message where a row of steps begins whose gradient is exactly 0 as a whole.

        Args:
            rate: `optimizer.lr` as scheduled.
            weight: sum of the loss weights in the window.
        """
        if not outcome.applied:
            return None
        self.norms = outcome.norms
        learns = [kind for kind in self.optimizer.kinds if self.optimizer.lr_scale(kind)]
        for kind in learns if rate else ():
            self.learning[kind] += 1
            self.silent[kind] = 0 if outcome.norms[kind.name] else self.silent[kind] + 1
        began, self.in_zero = not self.in_zero, bool(learns) and outcome.gradient_norm == 0
        if not self.in_zero:
            return None
        self.zero_steps += 1
        if not began:
            return None
        why = "no token of this window has a loss weight" if not weight else "nothing learns"
        kinds = ", ".join(kind.name for kind in learns)
        return f"THE GRADIENT NORM IS EXACTLY 0 at step {step}: {why} (trained: {kinds})"

    def at_interval(self, rate: float) -> tuple[list[str], dict[str, float]]:
        """What stands still, each thing said once, and numbers for the metrics; collective."""
        messages = []
        silent = [kind for kind in self.optimizer.kinds if self.silent[kind] >= self.horizon]
        for kind in self.optimizer.kinds:
            if self._is_news(kind.name, kind in silent):
                names = [name for name, own in self.kind_of.items() if own == kind]
                steps = self.silent[kind]
                messages.append(
                    f"THE GRADIENT OF {kind.name} IS EXACTLY 0 in {steps} steps: "
                    f"{some(names, NAMES_SHOWN)} learn nothing"
                )
        self._see_what_moved()
        still = [name for name in self.unmoved if self.learning[self.kind_of[name]] >= self.horizon]
        news = [name for name in still if self.kind_of[name] not in silent and self._is_news(name, True)]
        for kind in sorted({self.kind_of[name] for name in news}):
            names = [name for name in news if self.kind_of[name] == kind]
            messages.append(
                f"PARAMETERS HAVE NOT MOVED in {self.learning[kind]} steps: {some(names, NAMES_SHOWN)} "
                f"(gradient norm of {kind.name} {self.norms.get(kind.name, 0.0):.3g}, "
                f"learning rate {rate * kind.lr_scale:.3g})"
            )
        values = {f"gradient_norm/{name}": norm for name, norm in self.norms.items()}
        return messages, values | {
            "optimizer/zero_gradient_steps": self.zero_steps,
            "optimizer/unmoved_parameters": len(still),
        }

    def _is_news(self, what: str, holds: bool) -> bool:
        """Whether `what` holds and did not when it was last asked."""
        news = holds and what not in self.said
        (self.said.add if holds else self.said.discard)(what)
        return news

    def _see_what_moved(self) -> None:
        if not self.unmoved:
            return
        bits = self._bits()
        moved = [float(bits.get(name) != self.start.get(name)) for name in self.unmoved]
        flags = self.optimizer.topology.all_reduce(moved, op=dist.ReduceOp.MAX)
        self.unmoved = [name for name, flag in zip(self.unmoved, flags, strict=True) if not flag]

    def _bits(self) -> dict[str, int]:
        """A number per parameter of this process that changes when any of its elements does."""
        unmoved = set(self.unmoved)
        own = {name: tensor for name, tensor in self.optimizer.own_tensors() if name in unmoved}
        sums = [_sum_of_bits(tensor) for tensor in own.values()]
        return dict(zip(own, torch.stack(sums).tolist(), strict=True)) if sums else {}


def _sum_of_bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int64 if tensor.dtype == torch.float64 else torch.int32).sum(dtype=torch.int64)
