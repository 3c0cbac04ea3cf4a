"""Processes that stay alive for the whole test session and run test cases as ranks of one process group.

Importing torch, Megatron and DeepSpeed takes seconds of CPU; a pool pays for it once per world size, and joins its
process group once. Between cases the processes are stopped (SIGSTOP): gloo's threads poll, and the idle ranks of a few
pools would take a core from the tests that need none of them. A case is a module-level function that every rank calls
with the same arguments; it lays out its own parallel groups. When a rank fails the pool is thrown away, and the next
case gets a fresh one.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
import multiprocessing
import os
import signal
import socket
import traceback
from typing import Any

TIMEOUT_S = 240


class CaseFailed(AssertionError):
    """A rank raised; the message has its traceback."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(rank: int, world: int, port: int, pipe) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    import warnings

    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    while True:
        request = pipe.recv()
        if request is None:
            return
        module, function, arguments = request
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output):
                result = getattr(importlib.import_module(module), function)(**arguments)
            pipe.send(("ok", result))
        except BaseException:
            pipe.send(("failed", traceback.format_exc() + output.getvalue()))
            return


class Pool:
    """`world` ranks on this machine; a case that takes longer than `timeout_s` hangs."""

    def __init__(self, world: int, timeout_s: float = TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, port, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        self.broken = False
        atexit.register(self.close)  # a stopped process cannot be asked to end, only killed

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            os.kill(process.pid, number)

    def run(self, function: Any, **arguments: Any) -> list[Any]:
        """Call `function(**arguments)` on every rank; returns the results in rank order.

        Raises:
            CaseFailed: with the traceback of the first rank that reported one.
        """
        self._signal(signal.SIGCONT)
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__name__, arguments))
        results: list[Any] = [None] * len(self.pipes)
        waiting = dict(enumerate(self.pipes))
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting.values()), timeout=self.timeout_s)
            if not ready:
                self.close()
                raise CaseFailed(f"ranks {sorted(waiting)} of {len(self.pipes)} hang in {function.__name__}")
            for rank, pipe in list(waiting.items()):
                if pipe not in ready:
                    continue
                try:
                    status, value = pipe.recv()
                except EOFError:
                    status, value = "failed", f"rank {rank} died"
                if status != "ok":
                    self.close()
                    raise CaseFailed(f"rank {rank}: {value}")
                results[rank] = value
                del waiting[rank]
        self._signal(signal.SIGSTOP)
        return results

    def close(self) -> None:
        self.broken = True
        atexit.unregister(self.close)
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


class Pools:
    """One pool per world size, made when first asked for."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self.pools: dict[int, Pool] = {}
        self.timeout_s = timeout_s

    def run(self, world: int, function: Any, **arguments: Any) -> list[Any]:
        """`Pool.run` with `world` ranks."""
        if world not in self.pools or self.pools[world].broken:
            self.pools[world] = Pool(world, self.timeout_s)
        return self.pools[world].run(function, **arguments)

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()
