"""Gates and what rules ask of a token in one product: what each layer gives by itself."""

import pytest
import torch

from model.layers.token_linears import TokenLinears
from tests.model.build import small_config, small_stage

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def attention():
    """With a write gate (2 heads), a mix gate (4) and a decay (2)."""
    stage = small_stage(small_config("gated_deltanet", "sigmoid", mix="token"))
    return stage.layers["0"].attention


def test_features_without_a_bias():
    """Two of three layers of `kda` have biases."""
    attention = small_stage(small_config("kda", "sigmoid", mix="token")).layers["0"].attention
    layers, hidden = dict(attention.named_children()), torch.randn(6, 3, 24, dtype=torch.float64)
    found = attention.token_numbers(hidden)
    assert layers["memory_decay"].bias is None and found["memory_decay"].shape == (6, 3, 2 * 6)
    for name, x in found.items():
        expected = hidden @ layers[name].weight.T
        expected = expected if layers[name].bias is None else expected + layers[name].bias
        torch.testing.assert_close(x, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("frozen", [(), ("mix_gate",), ("write_gate", "mix_gate", "memory_decay")])
def test_joint_product(attention, frozen):
    layers = dict(attention.named_children())
    names = attention.token_linears.names
    assert set(names) == {"write_gate", "mix_gate", "memory_decay"}
    for name in frozen:
        layers[name].requires_grad_(False)
    hidden = torch.randn(6, 3, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    expected = {name: hidden @ layers[name].weight.T + layers[name].bias for name in names}
    found = attention.token_numbers(hidden)
    assert list(found) == list(names)
    trained = [p for name in names if name not in frozen for p in layers[name].parameters()]
    gradients = [
        torch.autograd.grad(sum((i + 1) * x[name].square().sum() for i, name in enumerate(names)), [hidden, *trained])
        for x in (found, expected)
    ]
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_it_has_no_parameters(attention):
    """Names, seeds, learning rates and checkpoints are those of the layers."""
    assert not list(attention.token_linears.parameters())
    assert TokenLinears(24, {}, None)(torch.zeros(1, 1, 24), {}, torch.float64) == {}
