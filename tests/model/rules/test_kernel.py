"""What writes the delta rules: the choice, and flash-linear-attention against the torch form."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from model.config import MemoryConfig, ModelConfig
from model.rules import kernel
from model.rules.deltanet import scan_delta_rule
from model.rules.kernel import choose_kernel, memory_kernel, scan_by_fla
from tests.model.rules.kernel_cases import gradients_of, relative_errors, scan_inputs

ROOT = Path(__file__).parents[3]


@pytest.fixture
def fla_version(monkeypatch):
    """Pretend that a version of flash-linear-attention is installed, or that none is."""

    def pretend(version: str | None, triton: str = "3.7.1", capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(kernel, "_fla_version", lambda: version)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        versions = {"triton": triton}
        monkeypatch.setattr(kernel.importlib.metadata, "version", versions.__getitem__)
        choose_kernel.cache_clear()

    yield pretend
    choose_kernel.cache_clear()


ON_A_GPU = {"bfloat16": True, "device": "cuda", "dim": 128}


@pytest.mark.parametrize(
    ("asked", "version", "changes", "name", "reason"),
    [
        ("auto", "0.6.0", {}, "fla", "flash-linear-attention 0.6.0, found"),
        ("fla", "0.6.0", {}, "fla", "flash-linear-attention 0.6.0, asked for"),
        ("torch", "0.6.0", {}, "torch", "asked for"),
        ("auto", None, {}, "torch", "not installed"),
        ("auto", "0.6.0", {"device": "cpu"}, "torch", "on cpu"),
        ("auto", "0.6.0", {"bfloat16": False}, "torch", "train.precision=bf16"),
        ("auto", "0.6.0", {"dim": 512}, "torch", "up to 256"),
    ],
)
def test_the_choice_and_its_reason(fla_version, asked, version, changes, name, reason):
    fla_version(version)
    chosen = choose_kernel(asked, **ON_A_GPU | changes)
    assert chosen.name == name and reason in chosen.reason


@pytest.mark.parametrize(
    ("version", "changes", "remedy"),
    [
        (None, {}, "pip install 'infini-pretrain[kernels]'"),
        ("0.6.0", {"device": "cpu"}, "CUDA device"),
        ("0.6.0", {"bfloat16": False}, "train.precision=bf16"),
        ("0.6.0", {"dim": 320}, "256"),
    ],
)
def test_fla_that_cannot_be_had_is_refused(fla_version, version, changes, remedy):
    fla_version(version)
    with pytest.raises(ValueError, match=r"model\.memory\.kernel = fla: ") as refusal:
        choose_kernel("fla", **ON_A_GPU | changes)
    assert remedy in str(refusal.value) and "model.memory.kernel=torch" in str(refusal.value)


@pytest.mark.parametrize(
    ("triton", "capability", "name"),
    [
        ("3.3.1", (9, 0), "fla"),
        ("3.4.0", (9, 0), "torch"),
        ("3.7.0", (9, 0), "torch"),
        ("3.7.1", (9, 0), "fla"),
        ("3.10.0", (9, 0), "fla"),
        ("3.6.0", (8, 0), "fla"),
    ],
)
def test_a_triton_that_is_wrong_on_hopper_is_not_taken(fla_version, triton, capability, name):
    fla_version("0.6.0", triton, capability)
    chosen = choose_kernel("auto", **ON_A_GPU)
    assert chosen.name == name and (f"triton {triton}" in chosen.reason) == (name == "torch")


def test_rules_without_kernels_have_no_choice():
    for rule, has_choice in (("none", False), ("linear", False), ("delta", False), ("deltanet", True)):
        model = ModelConfig(memory=MemoryConfig(rule=rule))
        assert (memory_kernel(model, "bf16", "cpu") is not None) == has_choice


def documented(q, k, v, g, beta, scale, initial_state, output_final_state):
    """`fla.ops.gated_delta_rule.chunk_gated_delta_rule` by its documentation, token by token: keys `[b, s, n, d]`,
    values `[b, s, n, v]`, states `[b, n, d, v]`."""
    assert output_final_state and not q.any()
    state = initial_state
    for i in range(k.shape[1]):
        state = state * g[:, i, :, None, None].exp()
        missing = v[:, i] - (k[:, i].unsqueeze(-2) @ state).squeeze(-2)
        state = state + k[:, i].unsqueeze(-1) * (beta[:, i, :, None] * missing).unsqueeze(-2)
    return None, state


@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize(("gate", "decay"), [(True, True), (False, True), (True, False)])
def test_segments_and_resets_around_the_kernel(monkeypatch, t, gate, decay):
    """What is ours around the kernel, in float64: folded segments, their transitions, the state carried in."""
    module = types.ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = documented
    monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", types.ModuleType("fla.ops"))
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
    inputs, reset = scan_inputs((2, t, 2, 5, 4), gate=gate, decay=decay)

    def scan(*arguments):
        return scan_by_fla(*arguments, products=torch.float64)

    found = gradients_of(scan, inputs, reset, torch.float64)
    expected = gradients_of(scan_delta_rule, inputs, reset, torch.float64)
    assert max(relative_errors(found, expected)) < 1e-12


CASES = [
    {"shape": (2, 3, 2, 64, 16), "decay": True, "gate": True, "resets": True},
    {"shape": (1, 1, 1, 128, 32), "decay": True, "gate": True, "resets": False},
    {"shape": (2, 1, 1, 64, 16), "decay": False, "gate": True, "resets": True},
    {"shape": (1, 2, 1, 40, 80), "decay": True, "gate": False, "resets": False},  # no multiple of a block of either
]
TOLERANCE = {"float32": 16 * torch.finfo(torch.float32).eps, "bfloat16": 2 * torch.finfo(torch.bfloat16).eps}
"""Relative, of the norm. float32: the rounding of sums over a block and its inverse. bfloat16: a gradient passes some
16 roundings of operands, each at most eps / 2, which add up like their root."""


@pytest.fixture(scope="module")
def interpreted():
    """What flash-linear-attention's kernels give for every case and precision, by Triton's interpreter."""
    for package in ("triton", "fla"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -e '.[kernels]'")
    cases = [case | {"products": products} for products in TOLERANCE for case in CASES]
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.rules.interpreted_kernel"],
        input="".join(f"{json.dumps(case)}\n" for case in cases),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    keys = [(products, number) for products in TOLERANCE for number in range(len(CASES))]
    return dict(zip(keys, answers, strict=True))


@pytest.mark.timeout(900)  # the interpreter takes 20 s of an idle machine
@pytest.mark.parametrize("number", range(len(CASES)))
@pytest.mark.parametrize("products", TOLERANCE)
def test_flash_linear_attention_by_tritons_interpreter(interpreted, products, number):
    errors = interpreted[products, number]["errors"]
    assert all(error <= TOLERANCE[products] for error in errors.values()), errors


def test_a_window_is_one_call(interpreted):
    """As many launches for three segments as for one."""
    launches = {interpreted["bfloat16", number]["launches"] for number in (0, 1)}
    assert len(launches) == 1, launches
