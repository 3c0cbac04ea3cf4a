"""One rank of a benchmark that needs several processes; started by `infini bench`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from launch.processes.worker import run_rank
from launch.processes.world import join_world
from pipeline.training import stopping


def main() -> int:
    """Arguments: a module of `pipeline.benchmarks` with `measure` and `write_results`, a file for the results, and the
    settings of `measure` as JSON."""
    stopping.unblock()
    module, path, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    join_world()
    return run_rank(lambda: _measure(module, path, settings), path.parent)


def _measure(module: str, path: Path, settings: dict) -> int:
    import torch

    from pipeline.parallel.topology import shutdown

    benchmark = importlib.import_module(f"pipeline.benchmarks.{module}")
    torch.set_num_threads(1)
    results = benchmark.measure(**settings)
    if torch.distributed.get_rank() == 0:
        benchmark.write_results(path, results)
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
