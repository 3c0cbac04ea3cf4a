"""The one place where a machine without CUDA differs: which device, which backend, and what Megatron-core needs.

GPU paths are written here and nowhere else. What has run on a GPU is in docs/gpu.md.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence

import torch

CACHE_BLOCK_BYTES = 2**19
"""Of a tensor that a CPU takes through several passes at a time: half of a core's second cache, as most have it."""


def cache_rows(tensor: torch.Tensor, dim: int = 0) -> int:
    """Rows along `dim` that a function of several passes takes at a time. On a CPU they have `CACHE_BLOCK_BYTES`, so
    that every pass but the first finds them in a cache of the core's own: 2.3 ms for 4.4 to rotate 2 million numbers.
    Elsewhere it takes all: a GPU would wait for the launches."""
    rows, size = tensor.shape[dim], tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or size <= CACHE_BLOCK_BYTES:
        return rows
    return max(1, rows * CACHE_BLOCK_BYTES // size)


def cache_blocks(*tensors: torch.Tensor | None) -> Iterator[tuple[torch.Tensor, ...]]:
    """Slices of tensors along their first dim, the same rows of all of them: `cache_rows` of the first tensor."""
    length, rows = len(tensors[0]), cache_rows(tensors[0])
    if rows == length:
        yield tensors
        return
    for first in range(0, length, rows):
        yield tuple(None if x is None else x[first : first + rows] for x in tensors)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of malloc.h."""


def keep_freed_memory(device: torch.device) -> None:
    """From now on this process keeps blocks of up to 32 MiB that are freed, for the next step, where it computes on a
    CPU and glibc allocates; nothing where the environment sets glibc's allocator.

    By itself glibc gives the heap's free end back, and the system clears its pages again: 18,000 to 27,000 page faults,
    40 ms of 2,400, in a step of gated_deltanet with 17 million parameters. 32 MiB is the largest that glibc takes.
    """
    set_by_user = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if device.type == "cpu" and not set_by_user:
        _set_heap(trim=-1, mmap=32 << 20)  # -1: never


def give_memory_back() -> None:
    """From now on this process gives every larger block back to the system when it is freed, where glibc allocates.

    glibc does so from 128 KiB on at first, and raises that to 32 MiB as it goes; what is freed later stays in the heap,
    in pieces. A resident set then says how the heap is broken up (by 4 %, differently at every look, of a process that
    holds the same tensors), and its peak grows with the number of looks. The price is time: pages are cleared again.
    """
    _set_heap(trim=128 << 10, mmap=128 << 10)


def _set_heap(*, trim: int, mmap: int) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, trim)
        libc.mallopt(M_MMAP_THRESHOLD, mmap)


def host_knows(device: torch.device) -> bool:
    """Whether the host can read values on `device` without waiting for anything."""
    return device.type == "cpu"


def default_device(local_rank: int = 0) -> torch.device:
    """The device of this process: its CUDA device when there is one, else the CPU.

    Raises:
        ValueError: the process does not see as many CUDA devices as its node has processes.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= (count := torch.cuda.device_count()):
        raise ValueError(
            f"LOCAL_RANK={local_rank}, but this process sees {count} CUDA device(s): there may be one process per "
            "device, and each must see all devices of its node (CUDA_VISIBLE_DEVICES; under srun leave out "
            "--gpus-per-task and --gpu-bind)"
        )
    return torch.device("cuda", local_rank)


def distributed_backend(device: torch.device) -> str:
    """The torch.distributed backends of a run on `device`: numbers that the host alone needs stay on the host."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def device_name(device: torch.device) -> str | None:
    """What the driver calls it; None for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def rounds_to_tf32() -> bool:
    """Whether float32 matrix products may be made in TF32."""
    return torch.get_float32_matmul_precision() != "highest"


def device_memory_peaks(device: torch.device) -> dict[str, int]:
    """Bytes that tensors took at the most since the last call (`allocated`), and that the allocator had taken for them
    (`reserved`); empty for the CPU, where the process's size says it."""
    if device.type != "cuda":
        return {}
    peaks = {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }
    torch.cuda.reset_peak_memory_stats(device)
    return peaks


class Stopwatch:
    """Adds up the time that `device` works between `start` and `stop`: on CUDA by events in its stream, for which
    nobody waits; on a CPU by the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._pairs: list[list[torch.cuda.Event]] = []
        self._spare: list[list[torch.cuda.Event]] = []
        self._started = self._sum_s = 0.0

    def start(self) -> None:
        if self._on_device:
            pair = self._spare.pop() if self._spare else [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._pairs.append(pair)
            pair[0].record()
        else:
            self._started = time.perf_counter()

    def stop(self) -> None:
        if self._on_device:
            self._pairs[-1][1].record()
        else:
            self._sum_s += time.perf_counter() - self._started

    def read_s(self) -> float:
        """Seconds since the last call. Call it when the device has been waited for anyway."""
        for begin, end in self._pairs:
            end.synchronize()
            self._sum_s += begin.elapsed_time(end) / 1000
        self._spare += self._pairs
        self._pairs = []
        seconds, self._sum_s = self._sum_s, 0.0
        return seconds


def device_memory_bytes(device: torch.device) -> int | None:
    """What the device has in all; None for the CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def page_locked(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor where `device` can copy it from by itself, while the host goes on; for any thread."""
    with torch.cuda.device(device):  # a thread begins with device 0, where it would leave a context
        return tensor.pin_memory()


def on_device(numbers: Sequence[Sequence[int]], device: torch.device) -> list[torch.Tensor]:
    """The host's numbers as int64 vectors on `device`, in one copy that nobody waits for."""
    joined = torch.tensor([x for part in numbers for x in part], dtype=torch.int64)
    if device.type == "cuda":
        joined = page_locked(joined, device)
    return list(joined.to(device, non_blocking=True).split([len(part) for part in numbers]))


class Recording:
    """A function without arguments and without host reads that is called many times. On CUDA its third call and those
    after it start all of its kernels at once, as a CUDA graph, where Python would start them one by one.

    It must read and write the same tensors every time. What it returned is overwritten by the next call.
    """

    def __init__(self, function: Callable[[], torch.Tensor], device: torch.device) -> None:
        self._function, self._on_device = function, device.type == "cuda"
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: torch.Tensor | None = None

    def run(self) -> torch.Tensor:
        self._calls += 1
        if not self._on_device or self._calls < 3:  # the first calls load kernels and take workspaces
            return self._function()
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            # Of this thread alone: NCCL's own thread asks for events at any time.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._result = self._function()
        self._graph.replay()
        return self._result


def prepare_megatron() -> None:
    """Let Megatron-core's layers run without CUDA; does nothing where CUDA exists.

    One thing in the layers in use asks for CUDA: sequence parallelism allocates its gathered activations on
    `torch.cuda.current_device()`.
    """
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")
