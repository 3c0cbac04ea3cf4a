"""What the ranks run in the tests of stores."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from data.files import ranges, store
from tests.distributed import saving_cases
from tests.s3_server import FAULTS


def within(environment: dict[str, str], case: Callable[..., Any], **arguments) -> Any:
    """`case` with an environment that names a store's server."""
    # Another server than the last case's, with other files under the same names.
    store._filesystem.cache_clear()
    ranges._shared.clear()
    with mock.patch.dict(os.environ, environment):
        return case(**arguments)


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

    with mock.patch.object(saving_cases, "make_trainer", made):
        return within(environment, saving_cases.train, **arguments)
