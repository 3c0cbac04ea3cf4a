"""The local attention's kernels on the device against float64 on the CPU: flash by name, and what the model takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.layers.sdpa import attention_kernel
from tests.gpu.target import eps, relative_error

SHAPE = {"b": 2, "heads": 8, "groups": 2, "s": 192, "d": 64}


def attend(q, k, v):
    """Output and gradients of causal attention with shared key/value heads."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    output = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    output.sin().sum().backward()
    return {"output": output} | {name: x.grad for name, x in zip("qkv", leaves, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", [None, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], ids=["ours", "flash", "math"])
def test_scaled_dot_product_attention(device, within, backend, dtype):
    if device.type == "cuda" and backend is SDPBackend.FLASH_ATTENTION and dtype == torch.float32:
        pytest.skip("flash attention on CUDA has no float32")
    generator = torch.Generator().manual_seed(0)
    b, heads, groups, s, d = SHAPE.values()
    shapes = [(b, heads, s, d), (b, groups, s, d), (b, groups, s, d)]
    given = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    expected = attend(*(x.double() for x in given))
    with sdpa_kernel(backend) if backend else attention_kernel(given[0].to(device)):
        found = attend(*(x.to(device) for x in given))
    errors = {name: relative_error(found[name], x) for name, x in expected.items()}
    # Outputs and probabilities are rounded, and each gradient passes a handful of such tensors.
    within(errors, eps(dtype, 16 if dtype == torch.float32 else 4))
