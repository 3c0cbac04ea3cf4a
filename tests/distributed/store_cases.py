"""What the ranks run in the tests of stores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from data.files import store
from tests.distributed import saving_cases
from tests.s3_server import FAULTS


def train(
    environment: dict[str, str], server: str, faults: dict[int, str] | None = None, **arguments
) -> dict[str, Any]:
    """`saving_cases.train` with a store.

    Args:
        environment: names the store's server, and the patience with it.
        server: the server's folder.
        faults: what the server does from after the step on, as `tests.s3_server` takes it.
    """
    make_trainer = saving_cases.make_trainer

    def made(*settings):
        trainer = make_trainer(*settings)
        train_step = trainer.train_step

        def step():
            train_step()
            if dist.get_rank() == 0 and trainer.progress.step in (faults or {}):
                Path(server, FAULTS).write_text(faults[trainer.progress.step])

        trainer.train_step = step
        return trainer

    store._filesystem.cache_clear()  # another server than the last case's
    with mock.patch.dict(os.environ, environment), mock.patch.object(saving_cases, "make_trainer", made):
        return saving_cases.train(**arguments)
