"""Every memory rule on the device against golden values, and at a real size; on a CPU part of the ordinary suite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.rules import build_rule
from model.rules.borders import Borders
from model.rules.kernel import RULES_WITH_KERNELS, choose_kernel
from model.rules.window import remember, write_gate
from tests.gpu.golden import GATE, PATH, golden
from tests.gpu.target import eps, relative_error
from tests.model.rules.test_memory import (
    RULES,
    is_convolved,
    memory_config,
    random_window,
    state_type,
    tokens_of,
    weights_of,
)

TOLERANCE = {torch.float64: 64, torch.float32: 64, torch.bfloat16: 4}
"""Roundings: sums over 8 to 64 tokens and 16 to 64 numbers of a head, three segments one after the other, a triangular
system, quotients of such sums: some thousands in a row, which add up like their root. bfloat16 is what the kernels
that compute so are held to: operands are rounded once, sums are float32."""


@pytest.fixture(scope="module")
def arrays():
    with np.load(PATH) as file:
        return dict(file)


def test_the_golden_values_are_of_the_rules_token_by_token(arrays):
    fresh = golden()
    assert fresh.keys() == arrays.keys()
    for key, expected in arrays.items():
        np.testing.assert_allclose(fresh[key], expected, rtol=1e-12, atol=1e-12, err_msg=key)


def computed(rule, window, reset, weights, *, kernel="torch", bfloat16=False):
    """Outputs and gradients under the keys of the golden file."""
    leaves = {name: x.clone().requires_grad_() for name, x in window.items()}
    memory = memory_config(rule, kernel=kernel)
    fields = state_type(rule)._fields
    tokens = tokens_of(rule, leaves, write_gate(GATE, leaves["a"]))._replace(bfloat16=bfloat16)
    state = state_type(rule)(*(leaves[name] for name in fields))
    own, borders = weights_of(leaves), Borders(reset)
    read, _, after = remember(build_rule(memory), tokens, own, state, borders, detach_reads=False)
    outputs = {"read": read} | dict(zip(fields, after, strict=True))
    sum((x * weights[name]).sum() for name, x in outputs.items()).backward()
    found = {"read" if name == "read" else f"after/{name}": x for name, x in outputs.items()}
    return found | {f"gradient/{name}": x.grad for name, x in leaves.items() if x.grad is not None}


def errors_of(found, expected):
    """Relative errors. The gradient of `rate` is one number a head, a sum over all tokens of which most cancels: it is
    compared together with that of what it scales."""
    assert found.keys() == expected.keys()
    found, expected = dict(found), dict(expected)
    for tensors in (found, expected):
        if "gradient/rate" in tensors:
            scaled = "x" if "gradient/x" in tensors else "x_decay"
            rate, x = (tensors.pop(f"gradient/{name}").detach().double().cpu() for name in ("rate", scaled))
            tensors["gradient/x, rate"] = torch.cat([rate.flatten(), x.flatten()])
    return {key: relative_error(found[key], x) for key, x in expected.items() if x.any()}


def golden_case(arrays, rule, device, dtype):
    """Window, reset, weights of the outputs, and what is expected."""
    window, weights = (
        {
            key.partition("/")[2]: torch.from_numpy(x).to(device, dtype)
            for key, x in arrays.items()
            if key.startswith(of)
        }
        for of in ("inputs/", "weights/")
    )
    expected = {
        key.removeprefix(f"{rule}/"): torch.from_numpy(x) for key, x in arrays.items() if key.startswith(f"{rule}/")
    }
    return window, torch.from_numpy(arrays["reset"]).to(device), weights, expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("rule", RULES)
def test_golden_values(device, within, arrays, rule, dtype):
    window, reset, weights, expected = golden_case(arrays, rule, device, dtype)
    found = computed(rule, window, reset, weights)
    assert all(x.device.type == device.type and x.dtype == dtype for x in found.values())
    within(errors_of(found, expected), eps(dtype, TOLERANCE[dtype]))


def real_size(rule, device):
    """A window of four blocks a segment in float32, and the rule's float64 outputs and gradients on the CPU."""
    window, _ = random_window(7, b=1, t=3, n=2, r=2, s=256, d=64)
    window = {name: x.detach().bfloat16().double() for name, x in window.items()}
    for name in ("x", "bias_decay"):
        window[name] -= 5  # decays that a trained model has
    reset = torch.tensor([[False, False, True]])
    generator = torch.Generator().manual_seed(8)
    shapes = {"read": window["q"].shape} | {name: window[name].shape for name in state_type(rule)._fields}
    weights = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    expected = computed(rule, window, reset, weights)
    window, weights = ({name: x.to(device, torch.float32) for name, x in given.items()} for given in (window, weights))
    return window, reset.to(device), weights, expected


@pytest.mark.parametrize("rule", [rule for rule in RULES if not is_convolved(rule)])
def test_real_size(device, within, rule):
    window, reset, weights, expected = real_size(rule, device)
    found = computed(rule, window, reset, weights)
    within(errors_of(found, expected), eps(torch.float32, TOLERANCE[torch.float32]))


@pytest.mark.parametrize("rule", RULES_WITH_KERNELS)
def test_flash_linear_attention(device, within, rule):
    try:
        choose_kernel("fla", bfloat16=True, device=device.type, dim=64)
    except ValueError as reason:
        pytest.skip(str(reason))
    window, reset, weights, expected = real_size(rule, device)
    found = computed(rule, window, reset, weights, kernel="fla", bfloat16=True)
    within(errors_of(found, expected), eps(torch.bfloat16, TOLERANCE[torch.bfloat16]))
