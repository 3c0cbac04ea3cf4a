"""What a checkpoint or a run holds, read by one process without a model: for `infini inspect`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from data.files import Place
from data.prepared.shards import PreparedSet
from model.layers.statistics import effective_rank
from pipeline.checkpoint.folder import (
    CheckpointError,
    checkpoint_folders,
    file_damage,
    linked,
    read_latest,
    read_summary,
)
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.schema import Summary
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.reporting.diagnosis import Finding, LayerNumbers, diagnose, read_history
from pipeline.reporting.metrics import METRICS_FILE, layer_metric, metric_lines, read_metrics


@dataclass
class Lane:
    """Where one lane stands."""

    number: int
    document: str
    """Name of its document, `between documents`, or the document's number where the set cannot be opened."""
    segment: int
    """Next segment of the document; with `data.packing`, the next token."""
    begun: int
    """Documents begun so far."""


@dataclass
class Layer:
    """What one layer's memory has come to. Norms are Frobenius norms, means over lanes and heads."""

    name: str
    gate: tuple[float, float, float] | None
    """Smallest, mean and largest sigmoid(beta) of the query heads; of the biases with `mix_gate=token`."""
    write_gate_bias: float | None
    """Mean over the key/value heads; None without a write gate."""
    norms: dict[str, float]
    """By field of the memory: M, and z where the rule has it."""
    effective_rank: float | None = None
    """Of M, see `model.layers.statistics.effective_rank`; mean over lanes and heads."""


@dataclass
class CheckpointContents:
    """A checkpoint, as far as it can be read."""

    folder: Place
    damage: list[str]
    """One message per damaged file; nothing below is filled in when there are any."""
    summary: Summary | None = None
    config: Config | None = None
    bytes: int = 0
    parameters: int = 0
    lanes: list[Lane] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    """What is wrong with the memory, from the run's metrics up to here and the checkpoint itself."""


def find_damage(folder: Place, *, contents: bool) -> list[str]:
    """What is wrong with a checkpoint, one message per damaged file; with `contents` every byte is read."""
    try:
        summary = read_summary(folder)
        damage = [file_damage(folder, name, facts, contents=contents) for name, facts in sorted(summary.files.items())]
        if not any(damage):
            CheckpointReader(folder).check_headers()
    except CheckpointError as error:
        return [str(error)]
    return [message for message in damage if message]


def read_contents(folder: Place, *, verify: bool) -> CheckpointContents:
    """Look into a checkpoint; `verify` compares all hashes."""
    found = CheckpointContents(folder, find_damage(folder, contents=verify))
    if found.damage:
        return found
    try:
        reader = CheckpointReader(folder)
        found.summary, found.config = reader.summary, reader.config
        found.bytes = sum(facts.bytes for facts in reader.summary.files.values())
        found.lanes = _lanes(reader, found.notes)
        found.layers, found.parameters = _layers(reader)
        found.findings = _findings(found)
    except CheckpointError as error:
        found.damage = [str(error)]
    return found


def _lanes(reader: CheckpointReader, notes: list[str]) -> list[Lane]:
    sets: list[PreparedSet | None] = []
    for entry in reader.config.data.sets:
        try:
            sets.append(PreparedSet(entry.path))
        except (ValueError, OSError) as error:
            sets.append(None)
            notes.append(f"documents of {entry.path} go by number, the set cannot be opened: {error}")
    lanes = []
    for number, cursor in sorted((int(number), cursor) for number, cursor in reader.lanes.items()):
        if cursor["set"] is None:
            document = "between documents"
        elif (prepared := dict(enumerate(sets)).get(cursor["set"])) is None or cursor["document"] >= len(prepared):
            document = f"document {cursor['document']} of set {cursor['set']}"
        else:
            document = prepared.document_name(cursor["document"])
        lanes.append(Lane(number, document, cursor["segment"], sum(cursor["taken"])))
    for prepared in sets:
        if prepared is not None:
            prepared.close()
    return lanes


def _layers(reader: CheckpointReader) -> tuple[list[Layer], int]:
    """The layers, and the number of parameters."""
    weights = {key.removeprefix("master/"): key for key in reader.keys() if key.startswith("master/")}
    count = sum(math.prod(reader.shape(key)) for key in weights.values())
    layers = []
    # Those that are there, not as many as the configuration claims.
    matches = (re.match(r"(?:master/layers\.|memory/)([0-9]{1,6})[./]", key) for key in reader.keys())
    for number in sorted({int(match[1]) for match in matches if match}):
        prefix = f"layers.{number}.attention."
        gate = bias = None
        beta = next((weights[prefix + key] for key in ("beta", "mix_gate.bias") if prefix + key in weights), None)
        if beta is not None:
            share = torch.sigmoid(reader.whole_tensor(beta))
            gate = (float(share.min()), float(share.mean()), float(share.max()))
        if prefix + "write_gate.bias" in weights:
            bias = float(reader.whole_tensor(weights[prefix + "write_gate.bias"]).mean())
        norms, rank = {}, None
        for key in reader.keys():
            if key.startswith(f"memory/{number}/"):
                name = key.rsplit("/", 1)[1]
                state = reader.whole_memory(key)
                norms[name] = float(state.flatten(2).norm(dim=2).mean())
                if name == "M":
                    rank = float(effective_rank(state).mean())
        layers.append(Layer(str(number), gate, bias, norms, rank))
    return layers, count


def _findings(found: CheckpointContents) -> list[Finding]:
    memory = found.config.model.memory
    folder = found.folder.resolve() if isinstance(found.folder, Path) else found.folder
    metrics = folder.parent.parent / METRICS_FILE
    history = read_history(read_metrics(metrics), found.summary.step) if metrics.is_file() else []
    measured = history[-1][1] if history else {}
    now = {}
    for layer in found.layers:
        numbers = measured.get(int(layer.name), LayerNumbers())
        if layer.gate is not None:
            least, _, most = (memory.gate_floor + (1 - memory.gate_floor) * gate for gate in layer.gate)
            numbers = replace(numbers, mix_gate_range=(least, most))
        if layer.effective_rank is not None:
            numbers = replace(numbers, effective_rank=layer.effective_rank, norm_M=layer.norms["M"])
        now[int(layer.name)] = numbers
    return diagnose([*history[:-1], (found.summary.step, now)], memory)


@dataclass
class RunContents:
    """A run's folder."""

    checkpoints: list[tuple[Path, list[str]]]
    """Oldest first, each with its damage."""
    latest: str | None
    """What `latest` names."""
    damage: list[str]
    """Of all checkpoints, and a `latest` that points nowhere."""
    metrics: dict[str, float]
    """The newest value of every scalar in metrics.jsonl; NaN where that is no number."""
    config: Config | None = None
    """None where it cannot be read."""
    began: float | None = None
    """Time of the first line of metrics.jsonl."""
    findings: list[Finding] = field(default_factory=list)
    """What the metrics say about the memory."""
    notes: list[str] = field(default_factory=list)
    """What was left out."""

    @property
    def newest_whole(self) -> Path | None:
        return next((path for path, damage in reversed(self.checkpoints) if not damage), None)


def read_run(folder: Place, *, verify: bool) -> RunContents:
    """Look at a run's checkpoints and metrics; `verify` compares all hashes."""
    checkpoints = folder / "checkpoints"
    found = [(path, find_damage(path, contents=verify)) for path in checkpoint_folders(checkpoints)]
    damage = [message for _, messages in found for message in messages]
    named, problem = read_latest(checkpoints)
    if problem is not None and not any(name.name == named and messages for name, messages in found):
        damage.append(problem)
    contents = RunContents(found, named, damage, {}, notes=linked(checkpoints))
    of_layers = _read_last_metrics(folder / METRICS_FILE, contents)
    path = folder / "config.yaml"
    try:
        contents.config = load_config(path, [], own=False)
    except FileNotFoundError:
        contents.notes.append(f"there is no {path}: what it would say is left out")
    except (ValueError, OSError) as error:
        contents.damage.append(f"{path}: {error}")
    if contents.config is not None and (history := read_history(of_layers)):
        contents.findings = diagnose(history, contents.config.model.memory)
    return contents


def _read_last_metrics(path: Path, contents: RunContents) -> list[dict[str, Any]]:
    """Put the newest metrics into `contents`; returns the records of layers' memories."""
    broken, of_layers = 0, []
    try:
        for _, record in metric_lines(path):
            if isinstance(record, str):
                broken += 1
                continue
            contents.began = record.get("time") if contents.began is None else contents.began
            for name, value in record.items():
                if isinstance(value, int | float):
                    contents.metrics[name] = value
                elif value is None:  # not a number: the one before it would not be the newest
                    contents.metrics[name] = math.nan
            if any(layer_metric(name) for name in record):
                of_layers.append(record)
    except FileNotFoundError:
        return []
    except (ValueError, OSError) as error:
        contents.damage.append(str(error))
    if broken:
        contents.notes.append(f"{path}: {broken} lines are no records and were left out")
    return of_layers
