"""A rank under the watchdog: `hanging_rank RUN_DIR`. Rank 1 stops moving in step 3."""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from launch.processes.worker import run_rank
from launch.processes.world import join_world
from pipeline.training.resilience import Watchdog


def read_slowly(run_dir: Path) -> None:
    (run_dir / "hangs").touch()
    time.sleep(600)


def main() -> int:
    run_dir = Path(sys.argv[1])
    join_world()

    def work() -> int:
        dist.init_process_group("gloo")
        watchdog = Watchdog(2.0, 600.0, run_dir)
        watchdog.start()
        for step in range(1, 9):
            watchdog.progress(step, "data")
            if dist.get_rank() == 1 and step == 3:
                read_slowly(run_dir)
            watchdog.progress(step, "forward_backward")
            dist.all_reduce(torch.ones(1))
            watchdog.warm = True
        return 0

    return run_rank(work, run_dir)


if __name__ == "__main__":
    sys.exit(main())
