"""What a process on a CPU does with memory that it frees."""

import multiprocessing
import resource

import pytest
import torch

from model.device import give_memory_back, keep_freed_memory


def faults_of_a_step(answer, keep: bool, environment: dict[str, str]) -> None:
    """Page faults of taking and freeing 64 MiB in blocks of 4, after a first time."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        give_memory_back()
        if keep:
            keep_freed_memory(torch.device("cpu"))

    def step() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(2**20) for _ in range(16)]
        del blocks
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    step()
    answer.send(min(step() for _ in range(3)))


def measured(keep: bool, **environment: str) -> int:
    ours, theirs = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=faults_of_a_step, args=(theirs, keep, environment))
    process.start()
    process.join()
    assert process.exitcode == 0
    return ours.recv()


def test_what_is_freed_is_kept_for_the_next_step():
    """16,384 pages of 4 KiB are taken each time, or once."""
    assert measured(keep=True) < 1000
    assert measured(keep=False) > 10000


def test_settings_of_the_user_win():
    assert measured(keep=True, MALLOC_TOP_PAD_="131072") > 10000
