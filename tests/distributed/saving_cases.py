"""What the ranks run in the tests of saving, going back and spikes."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from pipeline.training import trainer as trainer_module
from tests.distributed.cases import finish, full_memory, full_weights, make_trainer


def train(
    folder: str,
    data: str,
    overrides: list[str],
    resume: str | None = None,
    hold_writing_until: int | None = None,
    spikes: dict[int, float] | None = None,
    skip_after: dict[int, tuple[int, int]] | None = None,
    stop_at: tuple[int, int, str] | None = None,
) -> dict[str, Any]:
    """Train to the end of the configuration.

    Args:
        hold_writing_until: no checkpoint is written before the run has come to this step (or to its end).
        spikes: window number (from 1) to the factor by which its loss is measured too large.
        skip_after: step to (windows to leave out, steps to count for them) right after it.
        stop_at: (rank, step, signal or path): during this step that rank gets the signal, or makes that file.

    Returns:
        Error and printed text; steps, whether all is done, windows and the lanes' state; on rank 0 weights, moments and
        memory.
    """
    trainer = make_trainer(folder, data, overrides)
    printed, error = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        trainer.start(resume)
        train_step, sums_of = trainer.train_step, trainer_module.named
        writing = threading.Event()
        run = trainer.saver._run

        def step():
            if stop_at and stop_at[:2] == (dist.get_rank(), trainer.progress.step + 1):
                if hasattr(signal, stop_at[2]):
                    os.kill(os.getpid(), getattr(signal, stop_at[2]))
                else:
                    Path(stop_at[2]).touch()
            train_step()
            if hold_writing_until is None or trainer.progress.step >= hold_writing_until:
                writing.set()
            windows, steps = (skip_after or {}).get(trainer.progress.step, (0, 0))
            if windows:
                trainer.skip_windows(windows)
                trainer.progress.step += steps

        def sums(numbers):
            found = sums_of(numbers)
            found["loss"] *= (spikes or {}).get(trainer.progress.windows + 1, 1.0)
            return found

        def held_run(snapshot):
            writing.wait(60)
            return run(snapshot)

        trainer.train_step, trainer.saver._run = step, held_run
        try:
            with mock.patch.object(trainer_module, "named", sums):
                trainer.train()
        except (RuntimeError, OSError) as problem:
            error = f"{type(problem).__name__}: {problem}"
    tensors = full_weights(trainer) | full_memory(trainer)
    state = {
        "step": trainer.progress.step,
        "done": trainer.is_done,
        "windows": trainer.progress.windows,
        "lanes": trainer.loader.state_dict()["lanes"],
    }
    finish(trainer)
    folders = (Path(folder) / "checkpoints").glob("step_*")
    return state | {
        "error": error,
        "printed": " ".join(printed.getvalue().split()),
        "checkpoints": sorted(int(path.name.removeprefix("step_")) for path in folders),
        "tensors": tensors if dist.get_rank() == 0 else {},
    }
