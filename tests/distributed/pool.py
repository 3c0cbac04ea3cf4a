"""Processes that stay alive for the whole test session and run test cases as ranks of one process group.

Importing torch, Megatron and DeepSpeed takes more than five seconds of CPU: one process does it, and all ranks are
forked from that. They join their process group once. A case is a module-level function that every rank calls with the
same arguments; it lays out its own parallel groups. When a rank fails the pool is thrown away, and the next case gets a
fresh one.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import io
import multiprocessing.connection
import multiprocessing.forkserver
import os
import socket
import traceback
from typing import Any
from unittest import mock

TIMEOUT_S = 240

PRELOADED = ["pipeline.training.trainer", "pipeline.evaluation.evaluate", "torch._inductor.compile_fx"]
"""What most cases need. PyTorch's optimizers load its compiler when the first of them is made, and each rank would."""


class CaseFailed(AssertionError):
    """A rank raised; the message has its traceback."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _forking() -> multiprocessing.context.ForkServerContext:
    """The process that ranks are forked from, started when first asked for. No accelerator is seen there: whoever has
    used one cannot be forked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""):
        multiprocessing.forkserver.ensure_running()
    return context


def _share_gloo_device() -> None:
    """Let one thread poll the sockets of all process groups of this process, and not one for each of them: the cases
    lay out a hundred groups, and the threads of idle ones would take a core of their own.

    Connections are made with the group, as by gloo's default: lazily made ones do not find each other on a device that
    several groups share (torch 2.13).
    """
    from torch.distributed import ProcessGroupGloo, distributed_c10d

    device = ProcessGroupGloo.create_default_device(lazy_init=False)

    class SharedDevice(ProcessGroupGloo):
        def __init__(self, store, rank: int, size: int, timeout: datetime.timedelta) -> None:
            options = ProcessGroupGloo._Options()
            options._devices, options._timeout, options._threads = [device], timeout, 2
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = SharedDevice


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
    _share_gloo_device()
    while True:
        try:
            module, function, arguments = pipe.recv()
        except EOFError:  # the tests are over, or were killed
            os._exit(0)
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
        context = _forking()
        port = _free_port()
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, port, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        self.broken = False

    def run(self, function: Any, **arguments: Any) -> list[Any]:
        """Call `function(**arguments)` on every rank; returns the results in rank order.

        Raises:
            CaseFailed: with the traceback of the first rank that reported one.
        """
        try:
            return self._run(function, arguments)
        except BaseException:  # pytest's time limit among them: what comes late would be taken for the next case's
            self.close()
            raise

    def _run(self, function: Any, arguments: dict[str, Any]) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__name__, arguments))
        results: list[Any] = [None] * len(self.pipes)
        waiting = dict(enumerate(self.pipes))
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting.values()), timeout=self.timeout_s)
            if not ready:
                raise CaseFailed(f"ranks {sorted(waiting)} of {len(self.pipes)} hang in {function.__name__}")
            for rank, pipe in list(waiting.items()):
                if pipe not in ready:
                    continue
                try:
                    status, value = pipe.recv()
                except EOFError:
                    status, value = "failed", f"rank {rank} died"
                if status != "ok":
                    raise CaseFailed(f"rank {rank}: {value}")
                results[rank] = value
                del waiting[rank]
        return results

    def close(self) -> None:
        self.broken = True
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
