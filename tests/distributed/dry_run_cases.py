"""What the ranks run in the tests of `infini train --dry-run`."""

from __future__ import annotations

import contextlib
import io
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from pipeline.config.load import load_config
from pipeline.config.validate import validate
from pipeline.training import dry_run
from tests.distributed.cases import TINY
from tests.distributed.grid import join


def measure(folder: str, data: str, overrides: list[str], broken: tuple[int, str] | None = None) -> dict[str, Any]:
    """A dry run of the tiny model.

    Args:
        broken: a rank, and the message with which its first backward pass ends.
    """
    config = load_config(None, [*TINY, f"data.sets=[{{path: {data}}}]", f"run_dir={folder}", *overrides])
    parallel = config.parallel
    layout = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context}
    topology = join(**layout, timeout_s=parallel.timeout_s)
    validate(config, dist.get_world_size())
    saved: list[dict[str, torch.Size]] = []
    snapshot = dry_run.take_snapshot

    def seen(*arguments, **options):
        taken = snapshot(*arguments, **options)
        saved.append({name: tensor.shape for name, tensor in taken.tensors.items()})
        return taken

    printed, error = io.StringIO(), None
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(dry_run, "take_snapshot", seen))
        patches.enter_context(contextlib.redirect_stdout(printed))
        if broken and broken[0] == dist.get_rank():
            refusing = mock.Mock(side_effect=RuntimeError(broken[1]))
            patches.enter_context(mock.patch.object(dry_run.Trainer, "forward_backward", refusing))
        try:
            found = dry_run.measure(config, topology)
            dry_run.report(config, found)
        except (RuntimeError, ValueError, OSError) as problem:
            error, found = f"{type(problem).__name__}: {problem}", None
    return {
        "error": error,
        "peaks": found and [peak._asdict() for peak in found.peaks],
        "printed": " ".join(printed.getvalue().split()),
        "saved": saved,
    }
