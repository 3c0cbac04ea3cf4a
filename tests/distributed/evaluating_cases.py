"""What the ranks run in the tests of evaluation during training."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from pipeline.evaluation import checkpoints, evaluate
from pipeline.inference import streaming
from pipeline.training import evaluating
from tests.distributed import saving_cases
from tests.distributed.grid import join

FEW_TOKENS = {"cpu": 48}
"""Of a window: three documents make a batch, so that data-parallel ranks have different numbers of them."""


def train(*, stop_in_window: int | None = None, draw: bool = False, **arguments: Any) -> dict[str, Any]:
    """`saving_cases.train`; the ranks agree before every window of an evaluation.

    Args:
        stop_in_window: before this window of its first evaluation rank 0 finds a stop file.
        draw: an evaluation draws a random number, which it must not.
    """
    asked = evaluating._Question.__call__

    def question(self) -> bool:
        if self.windows == stop_in_window and dist.get_rank() == 0:
            Path(arguments["folder"], "stop").touch()
        if draw:
            torch.rand(1)
        return asked(self)

    with (
        mock.patch.object(evaluating, "WINDOWS_BETWEEN_QUESTIONS", 1),
        mock.patch.object(evaluating._Question, "__call__", question),
        mock.patch.object(streaming, "WINDOW_TOKENS", FEW_TOKENS),
    ):
        return saving_cases.train(**arguments)


def evaluate_checkpoints(run: str, **arguments: Any) -> list[dict[str, Any]]:
    """`infini evaluate --all-checkpoints` with the same batches."""
    with (
        mock.patch.object(streaming, "WINDOW_TOKENS", FEW_TOKENS),
        mock.patch.object(evaluate, "initialize", side_effect=join) as joined,
    ):
        results = checkpoints.evaluate_checkpoints(run, **arguments)
    assert joined.call_count == 1  # however many checkpoints there are
    return results
