"""Segments shared by 2 and 4 ranks: outputs, gradients and memory of one rank, in float64 to 1e-10."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from model.rules import RULES
from model.rules.kernel import RULES_WITH_KERNELS
from tests.distributed import context_cases

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-10
WITH_MEMORY = tuple(name for name in RULES if name != "none")
RECENT = ("delta_product", "kda", "gdn2")
"""Rules whose pairs are composed over 4 ranks as those of `gated_deltanet` are."""
AROUND = ("", "+sliding", "+convolution", "+sliding+convolution")


def grid(rule: str) -> list[dict[str, Any]]:
    """All write gates and surroundings of a rule, with probes, detached reads and `skip_empty` in turn."""
    cases = []
    for i, (gate, around) in enumerate(itertools.product(("none", "hard", "sigmoid"), AROUND)):
        model = {"rule": rule + around, "gate": gate, "skip_empty": i % 3 > 0, "mix": ("head", "token")[i % 2]}
        cases.append({"model": model, "probes": (0, 8, 4)[i % 3], "options": {"detach_reads": i % 4 == 2 or i == 8}})
    return cases


def chunked(rule: str) -> list[dict[str, Any]]:
    """Chunks, with the ways to compute again what was not kept; and the forms for a GPU."""
    model = {"rule": rule + "+sliding+convolution", "gate": "sigmoid", "skip_empty": False}
    cases = [
        {"model": model, "chunks": 2},
        {"model": model, "chunks": 2, "probes": 8, "replay": True},
        {"model": model, "chunks": 2, "probes": 8, "options": {"recompute": "selective"}},
        {"model": model, "chunks": 2, "options": {"recompute": "layer"}},
    ]
    forms = ("pairs", "kernel") if rule in RULES_WITH_KERNELS else ("pairs",)
    return cases + [{"model": model, "form": form, "chunks": chunks} for form in forms for chunks in (1, 2)]


def packed(rule: str) -> list[dict[str, Any]]:
    """Documents that share segments: gates and surroundings, probes, chunks, detached reads and forms in turn."""
    return [
        {"model": {"rule": rule, "gate": "hard"}, "probes": 8, "packed": True},
        {"model": {"rule": rule + "+sliding", "gate": "none"}, "options": {"detach_reads": True}, "packed": True},
        {"model": {"rule": rule + "+convolution"}, "chunks": 2, "form": "pairs", "packed": True},
        {
            "model": {"rule": rule + "+sliding+convolution", "gate": "sigmoid", "skip_empty": False},
            "probes": 8,
            "chunks": 2,
            "options": {"recompute": "layer"},
            "packed": True,
        },
    ]


OTHERS = [
    {"model": {"rule": "none"}},
    {"model": {"rule": "none+sliding"}, "chunks": 2},
    {"model": {"rule": "none+sliding"}, "options": {"detach_reads": True}},
    # Segments shorter than a convolution's tail, and so long that they have several blocks.
    *(
        {"model": {"rule": "deltanet+convolution", "segment_length": length}, "packed": packed}
        for length in (2, 3)
        for packed in (False, True)
    ),
    *({"model": {"rule": "gated_deltanet+wide", "segment_length": 4}, "packed": packed} for packed in (False, True)),
    *({"model": {"rule": rule, "segment_length": 128}, "probes": 4} for rule in ("deltanet", "gated_deltanet")),
    {"model": {"rule": "gated_deltanet", "segment_length": 128}, "form": "pairs"},
    {"model": {"rule": "delta", "qkv_bias": True, "qk_norm": True, "floor": 0.1, "beta": -1.0}},
]


MIXED = [
    {"model": {"rule": rule + "+sliding+convolution", "gate": "sigmoid", "qkv_bias": True}, "options": {"precision": p}}
    for rule in ("linear", "gated_deltanet")
    for p in ("fp32", "bf16")
]
"""Under bf16 the biases make keys and values float32, and what is carried of them is bfloat16."""


def assert_same(
    cases: list[dict[str, Any]], per_rank: list[list[dict[str, float]]], tolerance: float = TOLERANCE
) -> None:
    for rank, found in enumerate(per_rank):
        for case, distances in zip(cases, found, strict=True):
            far = {name: f"{x:.1e}" for name, x in distances.items() if not x <= tolerance}
            assert not far, f"rank {rank}, {case}: {far}"


@pytest.mark.parametrize(
    ("ranks", "rule", "step"),
    [
        # `kda` is `gdn2` without two gates.
        pytest.param(2, rule, 1, marks=[pytest.mark.slow] * (rule == "kda"))
        for rule in WITH_MEMORY
    ]
    + [pytest.param(4, rule, 5, marks=[pytest.mark.slow] * (rule in RECENT)) for rule in WITH_MEMORY]
    + [pytest.param(4, rule, 1, marks=pytest.mark.slow) for rule in WITH_MEMORY],
)
def test_ranks_that_share_a_window_are_one(pools, ranks, rule, step):
    """On 4 ranks every fifth case of the grid, which is its diagonal, has all gates and surroundings once."""
    cases = grid(rule)[::step] + chunked(rule)
    assert_same(cases, pools.run(ranks, context_cases.compare, cases=cases))


@pytest.mark.parametrize("rule", ["none", *WITH_MEMORY])
def test_documents_that_share_segments(pools, rule):
    cases = packed(rule) if rule in WITH_MEMORY else [{"model": {"rule": "none+sliding"}, "chunks": 2, "packed": True}]
    assert_same(cases, pools.run(2, context_cases.compare, cases=cases))


@pytest.mark.parametrize("ranks", [2, 4])
def test_other_surroundings(pools, ranks):
    assert_same(OTHERS, pools.run(ranks, context_cases.compare, cases=OTHERS))


@pytest.mark.parametrize("ranks", [2, 4])
def test_lower_precision(pools, ranks):
    """To the rounding of bfloat16 gradients."""
    assert_same(MIXED, pools.run(ranks, context_cases.compare, cases=MIXED), tolerance=0.02)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_scans_alone(pools, ranks, packed):
    """With a gradient of every state: what is cleared is empty, and most rules give its reads none."""
    for found in pools.run(ranks, context_cases.scans, packed=packed):
        assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("ranks", [2, 4])
def test_what_overflowed_before_a_reset_reaches_nobody_behind_it(pools, ranks, blocks, packed):
    pools.run(ranks, context_cases.overflow, blocks=blocks, packed=packed)
