"""One rank of a benchmark that needs several processes; started by `infini bench`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from launch.processes.worker import run_rank
from launch.processes.world import join_world


def main() -> int:
    """Arguments: a file for the results, and the settings of `pipeline.benchmarks.pipeline.measure` as JSON."""
    path, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    join_world()
    return run_rank(lambda: _measure(path, settings), path.parent)


def _measure(path: Path, settings: dict) -> int:
    import torch

    from pipeline.benchmarks.pipeline import measure, write_results
    from pipeline.parallel.topology import shutdown

    torch.set_num_threads(1)
    results = measure(**settings)
    if torch.distributed.get_rank() == 0:
        write_results(path, results)
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
