"""A small model of every rule on the device against float64 on the CPU: loss, memory carried out, every gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.compiling import compile_block_attention, compile_pieces
from model.device import prepare_megatron
from tests.gpu.target import eps, relative_error
from tests.model.build import random_tokens, small_config, small_stage

pytestmark = pytest.mark.usefixtures("one_process")

RULES = (
    "none",
    "linear",
    "delta",
    "deltanet",
    "gated_deltanet",
    "delta_product",
    "kda",
    "gdn2",
    "delta+sliding",
    "gated_deltanet+sliding",
)
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 96}
TOLERANCE = {"fp32": eps(torch.float32, 128), "bf16": eps(torch.bfloat16, 16)}
"""Two layers forward and backward: in bfloat16 some hundred rounded tensors in a row, with weights that amplify; in
float32 sums of hundreds of products besides."""


def by_module(tensors):
    """Parameters of a module in one vector, those of a rule's decay with the matrix whose numbers they shift and scale:
    the gradient of a gate's bias or rate alone is a sum over all tokens of which most cancels, and its relative error
    says little."""
    parts = {}
    for name, x in tensors.items():
        is_parameter = name.endswith((".weight", ".bias"))
        module = name.rpartition(".")[0] if is_parameter else name
        for of_decay in ("_rate", "_bias"):
            module = module.removesuffix(of_decay) if module.endswith(f"memory_decay{of_decay}") else module
        parts.setdefault(module, []).append(x.detach().double().flatten())
    return {name: torch.cat(found) for name, found in parts.items()}


def measured(config, precision, weights, device, *, compiled=False, packed=False):
    """Loss, memory and gradients by name; of windows in which documents share segments, with `packed`."""
    prepare_megatron()
    stage = small_stage(config, scramble=False, precision=precision).to(device)
    if compiled:
        compile_pieces(stage, device)
    if config.packed_attention == "flex":
        compile_block_attention(stage, device)
    with torch.no_grad():
        for name, parameter in stage.global_parameters():
            parameter.copy_(weights[name])
    lanes, segments, length = 2, 4, config.segment_length
    tokens = random_tokens(lanes, segments, length).to(device)
    reset = torch.tensor([[False, False, True, False], [False] * 4], device=device)
    starts = None
    if packed:
        starts = torch.zeros(lanes, segments, length, dtype=torch.bool, device=device)
        starts[:, :, 0] = reset
        for lane, segment, place in ((0, 0, 5), (0, 1, length - 1), (0, 2, 9), (1, 2, 3), (1, 2, 20)):
            starts[lane, segment, place] = True
    output = stage(tokens, stage.empty_memory(lanes, device), reset, tokens.roll(-1, dims=2), starts=starts)
    loss = output.token_loss.double().mean()
    loss.backward()
    memory = {f"memory/{i}/{n}": x for i, m in enumerate(output.memory) if m for n, x in m._asdict().items()}
    return {"loss": loss} | memory | {n: x.grad for n, x in stage.global_parameters()}


def check(device, within, rule, precision, *, compiled=False, packed=False, length=32, attention="auto"):
    gates = {} if rule.startswith("none") else {"gate": "sigmoid", "mix": "token"}
    config = small_config(rule, segment_length=length, **gates, **SIZES)
    weights = {name: x.detach() for name, x in small_stage(config).global_parameters()}
    expected = measured(config, "fp64", weights, torch.device("cpu"), packed=packed)
    config = replace(config, packed_attention=attention)
    found = measured(config, precision, weights, device, compiled=compiled, packed=packed)
    assert {x.device.type for x in found.values()} == {device.type}
    found, expected = by_module(found), by_module(expected)
    errors = {name: relative_error(found[name], x) for name, x in expected.items() if x.any()}
    within(errors, TOLERANCE[precision])


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("rule", RULES)
def test_model(device, within, rule, precision):
    check(device, within, rule, precision)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("rule", ["none", "none+sliding", "delta", "gated_deltanet+sliding"])
def test_packed_model(device, within, rule, precision):
    """By pieces on the CPU, on a device under a mask."""
    check(device, within, rule, precision, packed=True)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("rule", ["none", "none+sliding", "delta"])
def test_packed_model_by_flex_attention(device, within, rule, precision):
    """In segments of more than one of its blocks of 128 tokens."""
    if device.type == "cpu":
        pytest.skip("PyTorch compiles no backward pass of FlexAttention there; tests/model/test_packing.py has it")
    check(device, within, rule, precision, packed=True, length=160, attention="flex")


@pytest.mark.parametrize(
    ("rule", "precision"),
    [
        ("delta", "bf16"),
        ("delta", "fp32"),
        ("gated_deltanet", "bf16"),
        ("gdn2", "bf16"),
        ("delta_product", "bf16"),
        ("none", "bf16"),
    ],
)
def test_compiled_model(device, within, rule, precision):
    if device.type == "cpu":
        pytest.skip("tests/model/test_compiling.py has it, with all pieces")
    check(device, within, rule, precision, compiled=True)
