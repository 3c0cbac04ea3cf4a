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


def is_efficient(device: str, dtype: torch.dtype) -> bool:
    """Whether memory-efficient attention is asked for, under a mask."""
    return device == "cuda" and dtype in (torch.bfloat16, torch.float16, torch.float32)


def attention_kernel(query: torch.Tensor) -> contextlib.AbstractContextManager:
    """Around `F.scaled_dot_product_attention` of `query`, without a mask of its own."""
    if is_flash(query.device.type, query.dtype, query.shape[-1]):
        return sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    return contextlib.nullcontext()


def masked_attention_kernel(query: torch.Tensor) -> contextlib.AbstractContextManager:
    """Around `F.scaled_dot_product_attention` of `query` with a mask of its own, which flash attention does not take:
    on CUDA memory-efficient attention, by name as well, in the precisions that it has."""
    if is_efficient(query.device.type, query.dtype):
        return sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION)
    return contextlib.nullcontext()


def masked_in_words(device: str, dtype: torch.dtype) -> str:
    """What computes attention under a mask, for the start of a run."""
    if is_efficient(device, dtype):
        return "PyTorch's memory-efficient attention"
    return "what PyTorch chooses"
