"""Ranks of a real run killed at random moments, again and again: what comes out is the run that nobody touched."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.distributed.runs import Run, wait_for
from tests.prepared import write_set

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


@dataclass
class Kill:
    """One kill, and what was seen right after it."""

    moment: str
    rank: int
    partial: list[str]
    """Saves that it cut short."""
    whole: int
    """Checkpoints at that moment, all verified."""
    others_gone_s: float

    def __str__(self) -> str:
        saving = f"inside a save ({', '.join(self.partial)} left), " if self.partial else ""
        return (
            f"SIGKILL to rank {self.rank} while {self.moment}: {saving}{self.whole} checkpoints, all whole; the other "
            f"ranks were gone after {self.others_gone_s:.1f} s"
        )


def await_moment(run: Run, moment: str, delays: random.Random) -> None:
    """Wait until the ranks, which have just been started, come to a moment of this kind."""
    before = run.newest()
    if moment == "starting":
        time.sleep(delays.uniform(0, 3))
        return
    wait_for(lambda: run.newest() > before, "the first checkpoint after a restart", pause_s=0.005)
    if moment == "training":
        time.sleep(delays.uniform(0, 0.5))
    else:
        left = run.partial()
        wait_for(lambda: run.partial() - left, "a save", pause_s=0.0002)
        time.sleep(delays.uniform(0, 0.004))


def kill_again_and_again(run: Run, moments: list[str], seed: int) -> list[Kill]:
    """Start `run`, kill a random rank at every moment, and let it come to its end."""
    choice = random.Random(seed)
    run.start("--max-restarts", str(len(moments)))
    kills = []
    dead: set[psutil.Process] = set()
    for moment in moments:

        def fresh_ranks():
            assert run.process.poll() is None, f"the run ended before kill {len(kills) + 1}: {run.text()[-2000:]}"
            ranks = run.ranks()
            return ranks if len(ranks) == run.nproc and not dead.intersection(ranks) else None

        ranks = wait_for(fresh_ranks, "the ranks to start")
        earlier = run.partial()
        await_moment(run, moment, choice)
        rank = choice.randrange(run.nproc)
        ranks[rank].send_signal(signal.SIGKILL)
        start = time.monotonic()
        psutil.wait_procs(ranks, timeout=60)
        dead.update(ranks)
        gone_s = time.monotonic() - start
        assert not any(process.is_running() for process in ranks), "ranks outlive a killed one"
        # Nothing is written now: the next ranks take seconds to start.
        partial = sorted(name for name, _ in run.partial() - earlier)
        kills.append(Kill(moment, rank, partial, run.verify_all(), gone_s))
        print(f"kill {len(kills)} of {len(moments)}: {kills[-1]}", flush=True)
    assert run.wait(600) == 0, run.text()[-2000:]
    return kills


def check(pools, tmp_path: Path, moments: list[str], seed: int, nproc: int, *overrides: str) -> list[Kill]:
    data = write_set(tmp_path / "set", [37, 500, 130, 64, 250, 90, 17, 400])
    overrides = ("checkpoint.interval=1", "checkpoint.keep=2", "metrics.interval=1", *overrides)
    calm = Run(tmp_path / "calm", data, *overrides, nproc=nproc)
    killed = Run(tmp_path / "killed", data, *overrides, nproc=nproc)
    try:
        if pools is not None:
            calm.train_in(pools)
        else:
            calm.start()
            assert calm.wait(600) == 0, calm.text()[-2000:]
        kills = kill_again_and_again(killed, moments, seed)
    finally:
        calm.kill()
        killed.kill()
    assert killed.result() == calm.result()
    assert killed.losses() == calm.losses()
    assert f"restart {len(moments)} after a failure" in killed.text()
    return kills


def test_killed_ranks_cost_nothing_but_time(pools, tmp_path):
    """A few kills of two processes, each holding half of the optimizer's state and half of the lanes."""
    moments = ["saving", "starting", "saving"]  # killed while it trains: test_elastic, tests/cluster/test_jobs
    kills = check(pools, tmp_path, moments, 1, 2, "train.steps=60", "parallel.zero_stage=2")
    assert all(kill.others_gone_s < 20 for kill in kills)
    assert any(kill.partial for kill in kills)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thirty_kills_of_four_processes(tmp_path):
    """Tensor, pipeline stage and moment at random; the kills stand in the test's output (`pytest -s`)."""
    moments = random.Random(7).choices(["starting", "training", "saving"], weights=[1, 2, 2], k=32)
    kills = check(None, tmp_path, moments, 7, 4, "train.steps=400", "parallel.pipeline=2", "bptt.chunks_per_window=2")
    assert len(kills) >= 30
    assert sum(bool(kill.partial) for kill in kills) >= 5
    assert all(kill.others_gone_s < 20 for kill in kills)
