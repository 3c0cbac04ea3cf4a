"""Which attention kernel is asked for; what it computes on a GPU is in tests/gpu."""

import contextlib

import pytest
import torch

from model.layers.packed_attention import kept_apart_in_words
from model.layers.sdpa import attention_kernel, is_flash, masked_attention_kernel, masked_in_words


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
    for kernel in (attention_kernel, masked_attention_kernel):
        assert isinstance(kernel(torch.zeros(1, 1, 4, 8)), contextlib.nullcontext)


@pytest.mark.parametrize(
    ("device", "dtype", "told"),
    [
        ("cuda", torch.bfloat16, "memory-efficient"),
        ("cuda", torch.float64, "what PyTorch chooses"),
    ],
)
def test_what_computes_under_a_mask_is_told(device, dtype, told):
    assert told in masked_in_words(device, dtype)


def test_how_documents_are_kept_apart_is_told():
    assert "by itself" in kept_apart_in_words(torch.device("cpu"), torch.float32, "auto")
    assert "memory-efficient" in kept_apart_in_words(torch.device("cuda"), torch.bfloat16, "auto")
    assert "FlexAttention" in kept_apart_in_words(torch.device("cuda"), torch.bfloat16, "flex")
