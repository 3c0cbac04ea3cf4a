"""Which attention kernel is asked for; what it computes on a GPU is in tests/gpu."""

import contextlib

import pytest
import torch

from model.layers.sdpa import attention_kernel, is_flash


@pytest.mark.parametrize(
    ("device", "dtype", "dim", "flash"),
    [
        ("cuda", torch.bfloat16, 128, True),
        ("cuda", torch.bfloat16, 256, True),
        ("cuda", torch.bfloat16, 320, False),
        ("cuda", torch.float32, 128, False),
        ("cuda", torch.float64, 128, False),
        ("cpu", torch.bfloat16, 128, False),
    ],
)
def test_flash_attention_is_asked_for_where_there_is_one(device, dtype, dim, flash):
    assert is_flash(device, dtype, dim) == flash


def test_elsewhere_pytorch_chooses():
    assert isinstance(attention_kernel(torch.zeros(1, 1, 4, 8)), contextlib.nullcontext)
