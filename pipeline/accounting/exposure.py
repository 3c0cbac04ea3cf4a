"""How long a step waits for data-parallel traffic, and how long it would if reductions ran behind backward passes.

A gradient is complete when the step's last chunk has gone back through its layer: all chunks add to it. So what there
is to hide behind is that one backward pass, from the layer on down to the embedding, and in a pipeline the time for
which a later stage waits for the first one. Today a stage reduces everything after its last backward; overlapped, it
would reduce layer after layer, one behind the other on the link. The parameters are gathered after the update, which
needs the norm of all gradients, in both cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LastBackward:
    """A stage's backward pass of its last chunk."""

    end_s: float
    """On the step's clock."""
    parts: Sequence[tuple[float, float]]
    """In the order of the pass: seconds of a part of it, and seconds to reduce the gradients that are complete then."""

    @property
    def reduction_s(self) -> float:
        return sum(reduce_s for _, reduce_s in self.parts)

    def reduced_s(self, *, overlapped: bool) -> float:
        """When all gradients of the stage are summed, on the step's clock."""
        if not overlapped:
            return self.end_s + self.reduction_s
        clock = self.end_s - sum(compute_s for compute_s, _ in self.parts)
        link_free = clock
        for compute_s, reduce_s in self.parts:
            clock += compute_s
            link_free = max(clock, link_free) + reduce_s
        return link_free


def exposed_s(stages: Sequence[LastBackward], makespan_s: float, *, overlapped: bool) -> float:
    """Seconds from the end of the last backward of all stages to the end of the last reduction."""
    return max(0.0, max(stage.reduced_s(overlapped=overlapped) for stage in stages) - makespan_s)
