"""Steps in a row that moved nothing, because a number in them was wrong."""

from __future__ import annotations

from collections import deque

import torch.distributed as dist

from pipeline.training.step_record import StepRecord


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that was not finite."""


class SkippedSteps:
    """The last steps, as long as none of them was applied.

    Args:
        most: that a run may skip in a row.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.steps: deque[tuple[int, list[str]]] = deque(maxlen=most)
        """Number, and documents by lane."""

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, record: StepRecord) -> None:
        """One more."""
        self.steps.append((record.step, record.documents()))

    def clear(self) -> None:
        """A step was applied."""
        self.steps.clear()

    @property
    def too_many(self) -> bool:
        """The run must not go on so."""
        return len(self.steps) == self.most

    def stop(self) -> None:
        """End the run, naming what it read last; collective.

        Raises:
            NonFiniteError: always.
        """
        documents: list[list[str]] = [None] * dist.get_world_size()
        dist.all_gather_object(documents, self.steps[-1][1])
        lines = sorted({line for rank in documents for line in rank}, key=lambda line: int(line[5 : line.index(":")]))
        raise NonFiniteError(
            f"loss or gradient norm was not finite in {len(self.steps)} steps in a row, since step {self.steps[0][0]}; "
            f"the last checkpoint before that can be resumed. In the last window: " + "; ".join(lines)
        )
