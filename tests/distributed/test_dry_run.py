"""`infini train --dry-run`: the largest step and a save, on the run's processes, and nothing of the run begun."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import dry_run_cases
from tests.distributed.runs import Run
from tests.prepared import write_set

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    # Short documents: their windows have padding, the largest has none.
    return write_set(tmp_path_factory.mktemp("dry") / "set", [137, 90], questions=True)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder, hidden ones included: when it was changed, and what is in it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


LAYOUTS = {
    "one process": (1, ["train.precision=bf16"]),
    "stages, probes, window": (
        2,
        ["parallel.pipeline=2", "bptt.chunks_per_window=2", "bptt.recompute=window", "train.probes_per_window=2"],
    ),
    "zero 3, context, evaluation": (
        2,
        [
            *("parallel.zero_stage=3", "parallel.context=2"),
            *("evaluate.interval=2", "evaluate.documents=2", "evaluate.max_segments=2"),
        ],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_is_measured_and_nothing_is_left(pools, data, tmp_path, name):
    world, settings = LAYOUTS[name]
    place = tmp_path / "runs" / "mine"
    ranks = pools.run(world, dry_run_cases.measure, folder=str(place), data=str(data), overrides=settings)
    assert [rank["error"] for rank in ranks] == [None] * world
    peaks = ranks[0]["peaks"]
    assert [peak["rank"] for peak in peaks] == list(range(world))
    assert all(
        0 < peak["planned"] and peak["steps"] <= peak["evaluation"] <= peak["save"] <= peak["taken"] for peak in peaks
    )
    # The save is a whole one: masters and both moments of every parameter, and the memory of every lane.
    kinds = {tensor.split("/")[0] for rank in ranks for tensors in rank["saved"] for tensor in tensors}
    assert kinds >= {"master", "exp_avg", "exp_avg_sq", "memory"}
    assert "THE PLAN IS OFF" in ranks[0]["printed"]  # next to Python and its libraries the tiny model is nothing
    evaluates = "evaluate.interval=2" in settings
    assert ("one every 2 steps takes" in ranks[0]["printed"]) == evaluates
    assert all((peak["evaluation"] > peak["steps"]) <= evaluates for peak in peaks)
    assert "nothing of it was begun" in ranks[0]["printed"]
    assert list(tmp_path.iterdir()) == []


def test_out_of_memory_is_told_with_the_rank_s_work_and_the_plan(pools, data, tmp_path):
    told = (
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    )
    for message, error in (
        (told, "OutOfMemoryError: out of memory in forward and backward passes of step 1"),
        ("no", ""),
    ):
        (rank,) = pools.run(
            1, dry_run_cases.measure, folder=str(tmp_path / "run"), data=str(data), overrides=[], broken=(0, message)
        )
        assert rank["error"].startswith(error or "RuntimeError: no")
        assert not error or "planned for this rank" in rank["error"] and "--search" in rank["error"]
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_exists_is_not_touched(pools, data, tmp_path):
    """Over the command line, with real processes, in a folder where training without --resume is refused."""
    run = Run(tmp_path / "runs" / "run", data, "train.steps=2", "optimizer.warmup_steps=1")
    run.train_in(pools)
    before = contents(tmp_path)
    run.output, own = tmp_path.with_suffix(".log"), run.folder.with_suffix(".yaml")
    run.start("--dry-run")
    assert run.wait() == 0, run.text()[-2000:]
    assert "2 of the largest steps, and a save" in run.text() and "0 (" in run.text() and "1 (" in run.text()
    after = contents(tmp_path)
    assert after.pop(str(own.relative_to(tmp_path))) and after == before
