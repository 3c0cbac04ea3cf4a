"""A rank for the launcher's tests: `rank_program MODE RUN_DIR`, its processes joined by gloo like a real run's."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from launch.processes.worker import run_rank, told
from launch.processes.world import join_world
from pipeline.training import stopping
from pipeline.training.stopping import STOPPED


def fail(reason: str) -> None:
    raise ValueError(reason)


def main() -> int:
    mode, run_dir = sys.argv[1], Path(sys.argv[2])
    world_size = join_world()
    rank = int(os.environ["RANK"])
    stop = threading.Event()
    if mode == "starting":
        (run_dir / f"up-{rank}").touch()
        while not (run_dir / "go").exists():
            time.sleep(0.02)
    if mode in ("signals", "starting"):
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        signal.signal(signal.SIGUSR1, lambda *_: (run_dir / f"usr1-{rank}").touch())

    stopping.unblock()

    def work() -> int:
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        ones = torch.ones(1)
        dist.all_reduce(ones)
        assert ones.item() == world_size
        if rank == 1:
            if mode == "bad-data":
                raise ValueError("shard train-000003.tar is truncated")
            if mode in ("bug", "blocked"):
                raise RuntimeError("wrong number")
            if mode == "interrupted-early":
                raise KeyboardInterrupt
            if mode == "bad-thread":
                threading.Thread(target=fail, args=("the writer's thread failed",)).start()
                stop.wait()
            if mode == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        if mode == "everywhere":
            raise ValueError("same mistake on every rank")
        if mode == "blocked":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as in a collective that never returns
            threading.Event().wait()
        if mode in ("signals", "starting", "wait"):
            (run_dir / f"ready-{rank}").touch()
            stop.wait()
        elif mode != "fine":
            dist.all_reduce(ones)  # a peer is gone: fails with 'connection closed'
        else:
            (run_dir / f"fine-{rank}-of-{world_size}-threads-{os.environ.get('OMP_NUM_THREADS')}").touch()
        # Left to the interpreter's exit, gloo's threads now and then abort the process.
        dist.destroy_process_group()
        return STOPPED if mode == "starting" else 0

    return told(run_rank(work, None if mode == "interrupted-early" else run_dir))


if __name__ == "__main__":
    sys.exit(main())
