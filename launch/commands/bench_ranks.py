"""Benchmarks that need several processes at once: start them, wait, and read what rank 0 has written."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def run_ranks(module: str, processes: int, settings: dict[str, Any]) -> Any:
    """Call `measure(**settings)` of a module of `pipeline.benchmarks` on so many processes; its results.

    Args:
        module: also has `write_results(path, results)` and `read_results(path)`.

    Raises:
        ValueError: a process failed; it has said why.
    """
    from launch.processes.agent import launch_workers

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # torchrun gives each rank its own
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        arguments = [module, str(path), json.dumps(settings)]
        code = launch_workers("launch.processes.bench_worker", arguments, processes)
        if code:
            raise ValueError(f"the {processes} processes of the benchmark ended with exit code {code}")
        return importlib.import_module(f"pipeline.benchmarks.{module}").read_results(path)
