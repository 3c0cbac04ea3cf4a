"""What one training step has come to, as a value: the trainer makes it, and whoever watches the run reads it."""

from __future__ import annotations

from dataclasses import dataclass

from data.lanes.loader import SetShare, WindowBatch
from pipeline.parallel.optimizer import StepOutcome
from pipeline.schedule.executor import StepResult


@dataclass(frozen=True)
class StepRecord:
    """A step of this process, skipped or not."""

    step: int
    """Its number, from 1."""
    batch: WindowBatch
    result: StepResult
    """Of this rank."""
    sums: dict[str, float]
    """Of the whole global batch, the same on all ranks: see `Trainer.update`."""
    outcome: StepOutcome
    rate: float
    """`optimizer.lr` as scheduled for this step."""
    tokens: int
    """Of the run so far, this step's included."""
    skipped_documents: int
    """Documents that this process could not read and has left out, so far."""
    mixture: list[SetShare]
    """Of its lanes, so far."""

    @property
    def loss(self) -> float:
        """Mean over the global batch, by loss weight."""
        return self.sums["loss"] / max(self.sums["weight"], 1e-30)

    def documents(self) -> list[str]:
        """Per lane of this process, which documents the window was made of."""
        lanes = zip(self.batch.lane_ids, self.batch.documents, strict=True)
        return [f"lane {int(lane)}: {', '.join(names)}" for lane, names in lanes]
