"""One device for all tests here, and a report of what they measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.gpu import target
from tests.model.conftest import one_process

__all__ = ["one_process"]

MEASURED: dict[str, dict[str, float]] = {}
"""By test: the largest error, what it is of, and what was allowed."""


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test."""
    if reason := target.obstacle():
        pytest.skip(reason)
    return torch.device(target.NAME, *([0] if target.NAME == "cuda" else []))


@pytest.fixture
def within(request):
    """`within(errors, tolerance)`: every error is a number and at most the tolerance; the largest is reported."""

    def within(errors: dict[str, float], tolerance: float) -> None:
        name, error = target.worst({k: math.inf if math.isnan(x) else x for k, x in errors.items()})
        MEASURED[request.node.name] = {"largest": name, "error": error, "allowed": tolerance}
        assert error <= tolerance, f"{name}: {error:.2e}, allowed {tolerance:.2e}; all: {errors}"

    return within


def pytest_terminal_summary(terminalreporter):
    if target.REPORT is None:
        return
    described = target.described()
    reports = {outcome: terminalreporter.stats.get(outcome, []) for outcome in ("passed", "failed", "error", "skipped")}
    outcomes = {outcome: [report.nodeid for report in found] for outcome, found in reports.items()}
    reasons = {report.nodeid: str(report.longrepr[-1]) for report in reports["skipped"] if report.longrepr}
    terminalreporter.section("ran on")
    for name, value in described.items():
        terminalreporter.line(f"{name:20} {value}")
    for outcome, found in outcomes.items():
        terminalreporter.line(f"{outcome:20} {len(found)}")
    summary = {"ran_on": described, "outcomes": outcomes, "skipped_because": reasons, "measured": MEASURED}
    Path(target.REPORT).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    terminalreporter.line(f"{'written to':20} {target.REPORT}")
