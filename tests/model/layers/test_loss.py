"""The loss has the numbers of a dense product and Megatron's cross entropy, and few logits exist at once."""

from __future__ import annotations

import pytest
import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch.nn.functional import cross_entropy, linear

from model.layers import loss
from pipeline.accounting.live_bytes import LiveBytes

pytestmark = pytest.mark.usefixtures("one_process")

ROWS, LANES, HIDDEN, VOCABULARY, KNOWN = 12, 5, 8, 96, 90
TOKENS = ROWS * LANES


def example(dtype):
    """Hidden states, matrix, labels, and the weight of each token's loss."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, LANES, HIDDEN, generator=generator).to(dtype)
    matrix = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype)
    labels = torch.randint(0, KNOWN, (ROWS, LANES), generator=generator)
    return hidden.requires_grad_(), matrix.requires_grad_(), labels, torch.randn(ROWS, LANES, generator=generator)


def layer(matrix):
    """An output layer whose matrix is given with every call."""
    return loss.OutputMatrix(
        HIDDEN,
        len(matrix),
        config=ModelParallelConfig(use_cpu_initialization=True),
        init_method=None,
        bias=False,
        skip_weight_param_allocation=True,
    )


def blockwise(keep_logits):
    def losses(hidden, matrix, labels):
        return layer(matrix)(hidden, matrix, labels=labels, known=KNOWN, keep_logits=keep_logits).token_loss

    return losses


def megatrons(hidden, matrix, labels):
    logits = linear(hidden, matrix)
    with torch.no_grad():
        logits[..., KNOWN:] = -torch.inf
    return vocab_parallel_cross_entropy(logits, labels)


def dense(hidden, matrix, labels):
    logits = linear(hidden, matrix)[..., :KNOWN]
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def run(losses_of, dtype):
    """Losses, and the gradients of the hidden states and of the matrix."""
    hidden, matrix, labels, weight = example(dtype)
    losses = losses_of(hidden, matrix, labels)
    (losses * weight.to(losses.dtype)).sum().backward()
    return losses.detach(), hidden.grad, matrix.grad


@pytest.fixture(params=[(2048, 2**22), (7, 3 * VOCABULARY), (1, 1)], ids=["whole", "blocks", "rows"])
def block(request, monkeypatch):
    monkeypatch.setattr(loss, "BLOCK_ROWS", request.param[0])
    monkeypatch.setattr(loss, "WIDE_ELEMENTS", request.param[1])
    return request.param[0]


KEEP = pytest.mark.parametrize("keep_logits", [True, False], ids=["keep", "recompute"])


@KEEP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_megatrons(block, dtype, keep_logits):
    """To the last bit where all rows are one block; others are products of other shapes, and sums in another order."""
    found, expected = run(blockwise(keep_logits), dtype), run(megatrons, dtype)
    assert [x.dtype for x in found] == [x.dtype for x in expected] == [torch.float32, dtype, dtype]
    if block > TOKENS:
        assert all(map(torch.equal, found, expected))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@KEEP
def test_in_float64_they_are_the_dense_models(block, keep_logits):
    for x, y in zip(run(blockwise(keep_logits), torch.float64), run(dense, torch.float64), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


def test_the_matrix_gradient_is_summed_in_float32(monkeypatch):
    """In bfloat16 a sum stops growing where a block's part is below half of its last digit."""
    monkeypatch.setattr(loss, "BLOCK_ROWS", 1)
    hidden = torch.full((1024, 1, 1), 1.0, dtype=torch.bfloat16)
    matrix = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(1024, 1, dtype=torch.int64)
    layer(matrix)(hidden, matrix, labels=labels, keep_logits=False).token_loss.sum().backward()
    assert matrix.grad.flatten().tolist() == [-512, 512]


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_not_trained_gets_no_gradient(frozen):
    hidden, matrix, labels, _ = example(torch.float64)
    (hidden, matrix)[frozen].requires_grad_(False)
    blockwise(False)(hidden, matrix, labels).sum().backward()
    assert (hidden, matrix)[frozen].grad is None and (matrix, hidden)[frozen].grad is not None


def test_greedy_hits(block):
    hidden, matrix, labels, _ = example(torch.float64)
    best = linear(hidden, matrix)[..., :KNOWN].argmax(dim=-1)
    labels[::2] = best[::2]
    found = layer(matrix)(hidden, matrix, labels=labels, known=KNOWN)
    assert torch.equal(found.token_correct, labels == best)
    assert not found.token_correct.requires_grad


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("keep_logits", [True, False, None], ids=["keep", "recompute", "evaluate"])
def test_logits_that_exist_at_once(monkeypatch, dtype, size, keep_logits):
    """All of them, once, or one block; small beside them: a few numbers per token, and a row in float32."""
    tokens, vocabulary, rows = 512, 4096, 16
    monkeypatch.setattr(loss, "WIDE_ELEMENTS", vocabulary)
    monkeypatch.setattr(loss, "BLOCK_ROWS", rows)
    hidden = torch.randn(tokens, 1, HIDDEN).to(dtype).requires_grad_()
    matrix = torch.randn(vocabulary, HIDDEN).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens, 1))
    output, logits = layer(matrix), tokens * vocabulary * size
    with LiveBytes() as live, torch.set_grad_enabled(keep_logits is not None):
        losses = output(hidden, matrix, labels=labels, keep_logits=bool(keep_logits)).token_loss
        kept = live.bytes
        if keep_logits is not None:
            losses.sum().backward()
    small = 100 * tokens + 2 * tokens * HIDDEN * size + 4 * vocabulary * (3 * HIDDEN + 4)
    held, at_once = (logits, logits) if keep_logits else (0, logits * rows // tokens)
    assert small < logits / 4
    assert held <= kept < held + small
    assert at_once <= live.peak < at_once + small


def test_a_second_backward_pass_is_refused_where_logits_were_kept():
    """The first one has made gradients of them. What makes them again can do so as often as one likes."""
    hidden, matrix, labels, _ = example(torch.float32)
    total = blockwise(True)(hidden, matrix, labels).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    hidden.grad = None
    total = blockwise(False)(hidden, matrix, labels).sum()
    total.backward(retain_graph=True)
    once = hidden.grad.clone()
    total.backward()
    assert torch.equal(hidden.grad, 2 * once)


def test_a_number_that_is_not_finite_is_not_hidden():
    hidden, matrix, labels, _ = example(torch.float32)
    with torch.no_grad():
        hidden[3, 2] = torch.nan
        losses = blockwise(False)(hidden, matrix, labels)
    assert losses.isnan().sum() == 1 and losses[3, 2].isnan()
