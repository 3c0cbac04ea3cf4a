"""A run in a dozen numbers, from its configuration and its metrics: for `infini inspect`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from pipeline.config.derived import tokens_per_step
from pipeline.config.schema import Config
from pipeline.reporting.console import format_bytes, format_count, format_duration
from pipeline.reporting.metrics import layer_metric

Metrics = Mapping[str, float]
"""The newest value of every scalar, by its name; `time` and `step` of the last line among them."""

PROCESS_BYTES = ("system/process_bytes", "memory/process_bytes")
"""Today's name and that of the first version."""


def summary_rows(config: Config | None, metrics: Metrics, began: float | None) -> list[tuple[str, str]]:
    """What a reader asks first, in the units that people use.

    Args:
        config: of the run; None where it cannot be read: what needs it is left out.
        metrics: its newest metrics, not empty.
        began: `time` of the first line.
    """
    rows = [("step", _of(metrics["step"], config.train.steps if config else None))]
    tokens = metrics.get("progress/tokens")
    if tokens is not None and math.isfinite(tokens):
        rows.append(("tokens", f"{format_count(tokens)} ({tokens:,.0f})"))
    rows += _losses(metrics)
    for name, title, show in (
        ("optimizer/learning_rate", "learning rate", lambda value: f"{value:.2e}"),
        ("optimizer/gradient_norm", "gradient norm", lambda value: f"{value:.3g}"),
        ("progress/skipped_steps", "steps skipped", lambda value: f"{value:,.0f}"),
    ):
        if name in metrics:
            rows.append((title, show(metrics[name])))
    for name, title in (
        ("optimizer/zero_gradient_steps", "steps whose gradient was exactly 0"),
        ("optimizer/unmoved_parameters", "parameters that learn but never moved"),
    ):
        if metrics.get(name):
            rows.append((title, f"{metrics[name]:,.0f}"))
    rows += _speed(config, metrics)
    rows += _memory(metrics)
    resident = next((metrics[name] for name in PROCESS_BYTES if name in metrics), None)
    if resident is not None:
        rows.append(("largest process", format_bytes(resident)))
    if reserved := metrics.get("system/device_reserved_bytes"):
        allocated = format_bytes(metrics.get("system/device_allocated_bytes", math.nan))
        rows.append(("fullest device", f"{allocated} in tensors, {format_bytes(reserved)} reserved"))
    if began and metrics.get("time"):
        rows.append(("written", f"{_clock(began)} to {_clock(metrics['time'])}"))
    return rows


def _of(step: float, steps: int | None) -> str:
    return f"{step:,.0f}" if steps is None else f"{step:,.0f} of {steps:,} ({100 * step / max(steps, 1):.0f} %)"


def _losses(metrics: Metrics) -> list[tuple[str, str]]:
    rows = []
    for name, title in (("train", "loss"), ("answer", "loss of answers"), ("probe", "loss of probes' answers")):
        loss = metrics.get(f"loss/{name}")
        if loss is not None:
            perplexity = f" (perplexity {math.exp(loss):,.3g})" if loss < 50 else ""
            rows.append((title, f"{loss:.4f} nats per token{perplexity}"))
    return rows


def _speed(config: Config | None, metrics: Metrics) -> list[tuple[str, str]]:
    per_s = metrics.get("speed/tokens_per_s")
    if not per_s:
        return []
    mfu = metrics.get("speed/mfu")
    shares = [("MFU", mfu), ("of the data sheet's peak", metrics.get("speed/mfu_data_sheet"))]
    told = [f"{name} {100 * share:.3g} %" for name, share in shares if share is not None]
    rows = [("tokens per second", ", ".join([f"{per_s:,.0f}", *told]))]
    if config is not None:
        # Not speed/step_s, which in the first version was the optimizer's part.
        step_s = tokens_per_step(config) / per_s
        rows.append(("seconds per step", f"{step_s:.3g}"))
        if left := max(config.train.steps - metrics["step"], 0):
            rows.append(("time left at this pace", format_duration(left * step_s)))
    return rows


def _memory(metrics: Metrics) -> list[tuple[str, str]]:
    """Least, mean and largest of the layers."""
    found: dict[str, list[float]] = {}
    for name, value in metrics.items():
        if of_layer := layer_metric(name):
            found.setdefault(of_layer[0], []).append(value)
    rows = []
    for quantity, title in (
        ("share_of_output", "memory's part of the output"),
        ("mix_gate", "mixing gate"),
        ("write_gate", "write gate"),
    ):
        if values := found.get(quantity):
            ends = " to ".join(f"{100 * value:.3g}" for value in (min(values), max(values)))
            mean = f"{100 * sum(values) / len(values):.3g} %"
            rows.append((title, f"{mean} ({ends} % over {len(values)} layers)" if len(values) > 1 else mean))
    return rows


def _clock(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):  # no time of this world
        return f"{seconds:g} s"
