"""How long a device works, without anybody's waiting for it; on a CPU part of the ordinary suite."""

from __future__ import annotations

import time

import torch

from model.device import Stopwatch
from pipeline.benchmarks.alternating import wait_for


def test_what_lies_between_start_and_stop_counts_and_nothing_else(device):
    size = 256 if device.type == "cpu" else 2048
    stopwatch, matrix = Stopwatch(device), torch.randn(size, size, device=device)

    def work(times: int) -> None:
        for _ in range(times):
            matrix @ matrix

    work(2)
    wait_for(device)
    begin = time.perf_counter()
    for _ in range(2):
        stopwatch.start()
        work(8)
        stopwatch.stop()
        work(32)  # somebody else's
    wait_for(device)
    all_s, own_s = time.perf_counter() - begin, stopwatch.read_s()
    assert 0 < own_s < 0.7 * all_s
    assert stopwatch.read_s() == 0
    stopwatch.start()
    stopwatch.stop()
    assert stopwatch.read_s() < own_s
