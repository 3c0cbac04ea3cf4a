"""What the numbers of a memory say, in words: what is seen, what it usually means, which setting to try.

The numbers are those that a run writes every `metrics.memory_interval` steps to `metrics.jsonl`. Each rule below is a
function of them alone; its threshold stands beside it with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.config import MemoryConfig
from pipeline.reporting.metrics import METRICS_FILE, layer_metric, read_metrics

MIN_STEPS = 200
"""Before so many steps nothing is said: gates move slowly, and warm-up alone takes 50."""
STILL = 0.005
"""A gate in 0..1 that has moved less than this has not moved: with a backbone's learning rate of 1e-5 on beta, 1,000
steps of Adam move it by 0.0025."""
CLOSED = 1e-3
"""A mean write gate below this writes less than a token in 1,000."""
UNUSED = 0.01
"""A share of the output below this changes nothing."""
CONSTANT = 0.05
"""Reads that vary by less than 5 % of their size over the tokens of a segment answer every query alike."""
GROWN, SHRUNK = 2.0, 0.5
"""z that has doubled while the memory's share of the output has halved."""
COLLAPSED = 1.5
"""An effective rank below this: all that was written points in one direction."""
MANY = 0.1
"""A write gate that lets so many of the tokens through should give M more than one direction. Where fewer are written a
low rank is no illness: a model that answered passkeys had 1.3 in two layers that wrote 2 % of the tokens."""


@dataclass(frozen=True)
class LayerNumbers:
    """What was measured in one layer at one step; None where it was not."""

    mix_gate_range: tuple[float, float] | None = None
    """Smallest and largest of the heads."""
    share_of_output: float | None = None
    write_gate: float | None = None
    """Mean over tokens; None without a write gate."""
    norm_M: float | None = None
    norm_z: float | None = None
    effective_rank: float | None = None
    read_variation: float | None = None


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    name: str
    layers: list[int]
    """Empty where all layers are meant."""
    seen: str
    means: str
    try_: str

    def __str__(self) -> str:
        plural = "s" * (len(self.layers) > 1)
        which = f"layer{plural} {', '.join(map(str, self.layers))}" if self.layers else "all layers"
        return f"{self.name} ({which}): {self.seen}. Usually: {self.means}. Try: {self.try_}."


History = list[tuple[int, dict[int, LayerNumbers]]]
"""Steps in order, each with the layers measured at it."""


def read_history(records: Sequence[Mapping[str, Any]], until: int | None = None) -> History:
    """The memory's numbers in the records of a `metrics.jsonl`, up to and including step `until`."""
    steps: dict[int, dict[int, LayerNumbers]] = {}
    for record in records:
        if until is None or record["step"] <= until:
            add_record(steps, record)
    return sorted(steps.items())


def add_record(steps: dict[int, dict[int, LayerNumbers]], record: Mapping[str, Any]) -> None:
    """Add the memory's numbers in a record, if there are any, to what is known of its step."""
    for name, value in record.items():
        if (found := layer_metric(name)) is None:
            continue
        quantity, layer = found
        numbers = steps.setdefault(record["step"], {}).setdefault(layer, LayerNumbers())
        if quantity == "mix_gate_histogram" and isinstance(value, dict) and value["min"] is not None:
            changed = {"mix_gate_range": (value["min"], value["max"])}
        elif quantity in LayerNumbers.__dataclass_fields__ and isinstance(value, int | float):
            changed = {quantity: float(value)}
        else:
            continue
        steps[record["step"]][layer] = replace(numbers, **changed)


def diagnose_run(run_dir: Path, memory: MemoryConfig, until: int | None = None) -> list[Finding] | None:
    """What the metrics of a run say; None where they say nothing about the memory (yet).

    Raises:
        ValueError: `metrics.jsonl` is broken.
    """
    path = run_dir / METRICS_FILE
    history = read_history(read_metrics(path), until) if path.is_file() else []
    return diagnose(history, memory) if history else None


def diagnose(history: History, memory: MemoryConfig) -> list[Finding]:
    """What is wrong with a memory, nothing where nothing is seen.

    Args:
        history: at least one step. Layers of which nothing is known are left out: they have no memory.
        memory: the run's settings.
    """
    step, now = history[-1]
    now = {layer: numbers for layer, numbers in now.items() if numbers != LayerNumbers()}
    if memory.rule == "none" or step < MIN_STEPS:
        return []
    return [finding for rule in RULES for finding in rule(history, now, memory)]


def _layers(now: Mapping[int, LayerNumbers], holds: Callable[[LayerNumbers], bool]) -> list[int]:
    return [layer for layer, numbers in sorted(now.items()) if holds(numbers)]


def _named(layers: list[int], now: Mapping[int, LayerNumbers]) -> list[int]:
    """No numbers where all layers are meant."""
    return [] if len(layers) == len(now) and len(now) > 1 else layers


def _still_gates(history: History, now: Mapping[int, LayerNumbers], memory: MemoryConfig) -> Iterator[Finding]:
    initial = memory.gate_floor + (1 - memory.gate_floor) / (1 + math.exp(-memory.beta_init))

    def still(numbers: LayerNumbers) -> bool:
        ends = numbers.mix_gate_range
        return ends is not None and max(abs(end - initial) for end in ends) < STILL

    layers = _layers(now, still)
    if layers and len(layers) >= len(now) / 2:  # single layers may have nothing to gain
        yield Finding(
            "gates do not move",
            _named(layers, now),
            f"after {history[-1][0]:,} steps every head's share of the memory is within {STILL} of the initial "
            f"{initial:.3f}",
            "beta's learning rate is too small, or no gradient reaches the memory (detached reads, data that never "
            "asks for an earlier segment)",
            "optimizer.beta_lr_scale 10 times as large, bptt.gradient=full, more documents whose answers lie in "
            "earlier segments",
        )


def _closed(history: History, now: Mapping[int, LayerNumbers], memory: MemoryConfig) -> Iterator[Finding]:
    layers = _layers(now, lambda numbers: numbers.write_gate is not None and numbers.write_gate < CLOSED)
    if layers and len(layers) == len(now):
        yield Finding(
            "nothing is written",
            _named(layers, now),
            f"the write gates let less than {CLOSED:g} of the tokens through",
            "the penalty on writing closed them before there was anything to keep",
            "train.write_gate_penalty_from later (once answers are found) or a smaller train.write_gate_penalty",
        )


def _unused(history: History, now: Mapping[int, LayerNumbers], memory: MemoryConfig) -> Iterator[Finding]:
    layers = _layers(now, lambda numbers: numbers.share_of_output is not None and numbers.share_of_output < UNUSED)
    if layers and len(layers) == len(now):
        yield Finding(
            "memory is not used",
            _named(layers, now),
            f"it makes up less than {UNUSED:.0%} of every layer's attention output",
            "the text can be predicted without it, or it has faded to nothing",
            "data with dependencies across segments (synthetic ones: docs/synthetic_data.md), a larger "
            "model.memory.beta_init or model.memory.gate_floor",
        )


def _constant(history: History, now: Mapping[int, LayerNumbers], memory: MemoryConfig) -> Iterator[Finding]:
    layers = _layers(
        now,
        lambda numbers: (
            numbers.read_variation is not None
            and numbers.read_variation < CONSTANT
            and (numbers.share_of_output or 0) >= UNUSED
        ),
    )
    if layers:
        yield Finding(
            "reads are near constant",
            _named(layers, now),
            f"what is read varies by less than {CONSTANT:.0%} over the tokens of a segment: every query gets the same",
            "the memory holds an average of everything: each token adds to it, and single facts are diluted",
            "model.memory.write_gate=hard with a train.write_gate_penalty, or model.memory.rule=deltanet, which has no "
            "normaliser to dilute",
        )


def _fading(history: History, now: Mapping[int, LayerNumbers], memory: MemoryConfig) -> Iterator[Finding]:
    def fades(layer: int) -> bool:
        known = [(n.norm_z, n.share_of_output) for _, step in history if (n := step.get(layer))]
        known = [(z, share) for z, share in known if z and share is not None]
        if len(known) < 3:
            return False
        # From the largest share on: reads grow first, while the memory is learnt.
        peak = max(range(len(known)), key=lambda i: known[i][1])
        return known[-1][0] > GROWN * known[peak][0] and known[-1][1] < SHRUNK * known[peak][1]

    layers = [layer for layer in sorted(now) if fades(layer)]
    if layers:
        yield Finding(
            "z grows while reads shrink",
            _named(layers, now),
            f"the normaliser has more than doubled since the memory's part of the output was largest, and that part is "
            f"less than {SHRUNK:g} of what it was",
            "dilution: phi is never zero, so every token adds to z, and what was written long ago is divided by more "
            "and more",
            "model.memory.write_gate=hard, so that filler is not written, or model.memory.rule=deltanet",
        )


def _collapsed(history: History, now: Mapping[int, LayerNumbers], memory: MemoryConfig) -> Iterator[Finding]:
    layers = _layers(
        now,
        lambda numbers: (
            numbers.effective_rank is not None
            and numbers.effective_rank < COLLAPSED
            and (numbers.norm_M or 0) > 0
            and (memory.write_gate == "none" or (numbers.write_gate or 0) >= MANY)
        ),
    )
    if layers:
        yield Finding(
            "M has collapsed",
            _named(layers, now),
            f"its effective rank is below {COLLAPSED}: everything is written in the same direction",
            "keys of all tokens are nearly alike, so one value overwrites or drowns the other",
            "a smaller optimizer.lr, model.memory.rule=deltanet or gated_deltanet (keys of length one), or fewer "
            "writes through model.memory.write_gate=hard",
        )


RULES = (_still_gates, _closed, _unused, _constant, _fading, _collapsed)
