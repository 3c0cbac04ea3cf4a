"""The loss has Megatron's numbers, and the logits live once."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from model.layers import loss
from pipeline.accounting.live_bytes import LiveBytes

pytestmark = pytest.mark.usefixtures("one_process")

ROWS, LANES, VOCABULARY = 12, 5, 96
SHAPE = (ROWS, LANES, VOCABULARY)


def example(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(*SHAPE, generator=generator)).to(dtype)
    logits[..., 90:] = -torch.inf  # rows that pad the vocabulary
    labels = torch.randint(0, 90, SHAPE[:2], generator=generator)
    return logits, labels, torch.randn(*SHAPE[:2], generator=generator)


def gradient_of(function, logits, labels, weight):
    leaf = logits.detach().clone().requires_grad_()
    # A copy: both functions may write over what they are given.
    losses = function(leaf.clone(), labels)
    (losses * weight.to(losses.dtype)).sum().backward()
    return losses.detach(), leaf.grad


@pytest.mark.parametrize("block", [2**22, 7 * VOCABULARY, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_megatrons_to_the_last_bit(monkeypatch, dtype, block):
    monkeypatch.setattr(loss, "BLOCK_ELEMENTS", block)
    expected_losses, expected = gradient_of(vocab_parallel_cross_entropy, *example(dtype))
    losses, gradient = gradient_of(loss.token_losses, *example(dtype))
    assert losses.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(losses, expected_losses)
    assert torch.equal(gradient, expected)


def test_float64_stays_float64():
    logits, labels, weight = example(torch.float64)
    losses, gradient = gradient_of(loss.token_losses, logits, labels, weight)
    leaf = logits.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf.flatten(0, 1), labels.flatten(), reduction="none")
    (expected * weight.double().flatten()).sum().backward()
    torch.testing.assert_close(losses.flatten(), expected.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_logits_live_once(monkeypatch, dtype, size):
    """From the output matrix to the gradient of its input; small beside them: rows, and one block in float32."""
    monkeypatch.setattr(loss, "BLOCK_ELEMENTS", VOCABULARY)
    logits, labels, weight = example(dtype)
    hidden = torch.randn(*SHAPE[:2], 8).to(dtype).requires_grad_()
    matrix = torch.randn(VOCABULARY, 8).to(dtype)
    once = logits.numel() * size
    with LiveBytes() as live:
        losses = loss.token_losses(torch.nn.functional.linear(hidden, matrix), labels)
        kept = live.bytes
        losses.sum().backward()
    small = 8 * 8 * ROWS * LANES + 4 * VOCABULARY * 4
    assert once <= kept < once + small
    assert once <= live.peak < once + small


def test_a_second_backward_pass_is_refused():
    """The first one has made gradients of the logits."""
    logits, labels, _ = example(torch.float32)
    total = loss.token_losses(logits.requires_grad_().clone(), labels).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
