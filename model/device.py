"""The one place where a machine without CUDA differs: which device, which backend, and what Megatron-core needs.

GPU paths are written here and nowhere else; they have not been run on a GPU yet.
"""

from __future__ import annotations

import torch


def default_device(local_rank: int = 0) -> torch.device:
    """The device of this process: its CUDA device when there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def distributed_backend(device: torch.device) -> str:
    """The torch.distributed backend for `device`."""
    return "nccl" if device.type == "cuda" else "gloo"


def prepare_megatron() -> None:
    """Let Megatron-core's layers run without CUDA; does nothing where CUDA exists.

    Sequence parallelism allocates its gathered activations on `torch.cuda.current_device()`: that is the only thing the
    layers in use ask of CUDA when there is none.
    """
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")
