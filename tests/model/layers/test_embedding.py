"""The embedding's gradient, against a float64 sum."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.model.build import VOCAB, small_config, small_stage

pytestmark = pytest.mark.usefixtures("one_process")


def embed(precision: str, gradient: torch.Tensor, tokens: torch.Tensor, *, grad_dtype: bool = False):
    stage = small_stage(small_config("none", num_layers=1), precision=precision)
    weight = stage.embedding.weight
    if grad_dtype:
        weight.grad_dtype = None
    rows = stage.embedding(tokens)
    assert torch.equal(rows, F.embedding(tokens, weight))
    rows.backward(gradient.to(rows.dtype).expand_as(rows))
    return weight.grad


def test_many_tiny_gradients_of_a_frequent_token_add_up():
    """One of 1, then 4,000 of 1/1000: a bfloat16 sum stays at 1."""
    tokens = torch.zeros(1, 4001, dtype=torch.int64)
    gradient = torch.full((1, 4001, 1), 2.0**-10)
    gradient[:, 0] = 1
    grad = embed("bf16", gradient, tokens, grad_dtype=True)
    assert grad.dtype == torch.float32 and grad[0].eq(1 + 4000 * 2**-10).all() and not grad[1:].any()
    rounded = embed("bf16", gradient, tokens)  # a parameter without float32 sums gets the same, rounded once
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, grad.bfloat16())
    plain = torch.zeros(VOCAB, 1, dtype=torch.bfloat16, requires_grad=True)
    F.embedding(tokens, plain).backward(gradient.bfloat16())
    assert plain.grad[0] == 1, "why it is not left to PyTorch"


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_gradient_is_pytorchs(precision):
    tokens = torch.randint(0, VOCAB, (2, 30), generator=torch.Generator().manual_seed(1))
    gradient = torch.randn(2, 30, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = embed(precision, gradient, tokens)
    weight = torch.zeros_like(found, requires_grad=True)
    rows = F.embedding(tokens, weight)
    rows.backward(gradient.to(rows.dtype).expand_as(rows))
    assert torch.equal(found, weight.grad)
