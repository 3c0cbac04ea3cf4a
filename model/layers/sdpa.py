"""Which of PyTorch's attention kernels the local attention runs on.

On CUDA, in bfloat16, it is flash attention, asked for by name: left to choose, PyTorch falls back without a word to a
kernel that holds all scores of a segment at once, where a shape or a stride does not suit it. Asked by name it raises.
float32 and float64 have no flash attention on CUDA, and on a CPU PyTorch has one kernel for all: there it chooses.
"""

from __future__ import annotations

import contextlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

WIDEST_HEAD = 256
"""Of flash attention on CUDA."""


def is_flash(device: str, dtype: torch.dtype, dim: int) -> bool:
    """Whether flash attention is asked for: on a type of device, with heads of `dim` numbers."""
    return device == "cuda" and dtype in (torch.bfloat16, torch.float16) and dim <= WIDEST_HEAD


def attention_kernel(query: torch.Tensor) -> contextlib.AbstractContextManager:
    """Around `F.scaled_dot_product_attention` of `query`, without a mask of its own."""
    if is_flash(query.device.type, query.dtype, query.shape[-1]):
        return sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    return contextlib.nullcontext()
