"""What a longer window costs with and without recomputation, and gradients through a document of a million tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.accounting.footprint import per_rank_bytes
from pipeline.benchmarks.measuring import in_fresh_process, peak_rss_bytes, timed, tracked_peak
from pipeline.benchmarks.repeated_step import Step, random_batch
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.parallel.topology import initialize

WINDOW_MODEL = [
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.ffn_hidden_size=172",
    "model.vocab_size=256",
    "model.segment_length=128",
    "model.memory.rule=delta",
    "train.lanes=1",
]
CHUNK_SEGMENTS = 4
"""Segments per chunk with window recomputation."""
METHODS = {"plain": "none", "layer": "layer", "window": "window"}
"""`bptt.recompute` of each way to backpropagate through a window."""

MILLION_MODEL = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "model.ffn_hidden_size=86",
    "model.vocab_size=64",
    "model.segment_length=64",
    "model.memory.rule=delta",
    "model.init_std=0.1",
    "train.lanes=1",
    "train.precision=fp64",
    "bptt.recompute=window",
]


@dataclass(frozen=True)
class WindowCost:
    """One cell of the table."""

    method: str
    segments: int
    peak_bytes: int
    """Live tensors at most, counted by `LiveBytes`."""
    rss_bytes: int
    """Growth of the process's resident set at most."""
    cpu_s_per_token: float


def measure_window(method: str, segments: int) -> WindowCost:
    """Forward and backward through one window; to be called in a fresh process."""
    chunks = segments // CHUNK_SEGMENTS if method == "window" else 1
    config = load_config(
        None,
        [
            *WINDOW_MODEL,
            f"train.segments_per_window={segments}",
            f"bptt.recompute={METHODS[method]}",
            f"bptt.chunks_per_window={chunks}",
        ],
    )
    step = Step(config, initialize(tensor=1, pipeline=1, timeout_s=60))
    # A small window first: it makes the gradients and fills the library's caches.
    small = replace(config, bptt=replace(config.bptt, chunks_per_window=1))
    step.run(random_batch(config, segments=CHUNK_SEGMENTS), small)
    batch = random_batch(config)
    took = timed(lambda: step.run(batch, config))
    peak = tracked_peak(lambda: step.run(batch, config))
    tokens = batch.tokens.numel()
    return WindowCost(method, segments, peak, int(took["rss_bytes"]), took["cpu_s"] / tokens)


def window_table(lengths: Sequence[int], report: Callable[[str], None]) -> list[WindowCost]:
    """Every method at every window length, each in a process of its own; methods alternate, so that a machine's other
    work meets all of them."""
    costs = []
    for segments in lengths:
        for method in METHODS:
            costs.append(in_fresh_process(measure_window, method, segments))
            report(f"{method} over {segments} segments: {costs[-1].peak_bytes / 2**20:.1f} MiB")
    return costs


@dataclass(frozen=True)
class DocumentGradient:
    """Backpropagation through one whole document."""

    segments: int
    chunk_segments: int
    loss: float
    """Mean over the document."""
    gradients: dict[str, torch.Tensor]
    """Of every parameter."""
    first_segment: torch.Tensor
    """Gradient of the objective with respect to the embedded first segment `[s, h]`."""
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    """Of the whole process, libraries included."""
    start_rss_bytes: int
    """Of the process before the step, libraries and model included."""


def million_config(segments: int, chunk_segments: int) -> Config:
    """The configuration for a document of `segments` segments."""
    return load_config(
        None,
        [
            *MILLION_MODEL,
            f"train.segments_per_window={segments}",
            f"bptt.chunks_per_window={segments // chunk_segments}",
        ],
    )


def measure_document(segments: int, chunk_segments: int, last_segment_only: bool) -> DocumentGradient:
    """Gradients through a document of `segments` segments; to be called in a fresh process.

    Args:
        last_segment_only: the objective is the mean loss of the last segment, which the first segment reaches through
            the memory alone; else that of the whole document.
    """
    config = million_config(segments, chunk_segments)
    step = Step(config, initialize(tensor=1, pipeline=1, timeout_s=60))
    batch = random_batch(config)
    if last_segment_only:
        batch.loss_weight[:, :-1] = 0
    # Chunks go backward from last to first: what stays is the gradient of the document's first chunk.
    kept: dict[str, torch.Tensor] = {}

    def watch(module, inputs, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: kept.__setitem__("first", gradient[0].clone()))

    handle = step.stage.embedding.register_forward_hook(watch)
    start_rss = peak_rss_bytes()
    wall, cpu = time.perf_counter(), time.process_time()
    result = step.run(batch, config)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    handle.remove()
    return DocumentGradient(
        segments=segments,
        chunk_segments=chunk_segments,
        loss=float(result.token_loss.mean()),
        gradients={name: parameter.grad.clone() for name, parameter in step.stage.named_parameters()},
        first_segment=kept["first"],
        wall_s=wall,
        cpu_s=cpu,
        peak_rss_bytes=peak_rss_bytes(),
        start_rss_bytes=start_rss,
    )


def largest_difference(a: DocumentGradient, b: DocumentGradient) -> dict[str, float]:
    """Largest |a - b| relative to the largest |a|, of the parameters' gradients (the worst one) and of the first
    segment's."""

    def relative(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x - y).abs().max() / x.abs().max())

    worst = max(relative(a.gradients[name], b.gradients[name]) for name in a.gradients)
    return {"parameters": worst, "first segment": relative(a.first_segment, b.first_segment)}


def document_gradients(
    segments: int, chunk_sizes: Sequence[int], report: Callable[[str], None]
) -> dict[bool, list[DocumentGradient]]:
    """`measure_document` for both objectives (keyed by `last_segment_only`) with every chunk size."""
    results: dict[bool, list[Any]] = {}
    for last_only in (False, True):
        for size in chunk_sizes:
            results.setdefault(last_only, []).append(in_fresh_process(measure_document, segments, size, last_only))
            report(f"{segments:,} segments in chunks of {size}: {results[last_only][-1].wall_s:.0f} s")
    return results


def plain_bytes(config: Config) -> int:
    """What plain backpropagation through the same document would keep, by `pipeline.accounting.footprint`."""
    plain = replace(config, bptt=replace(config.bptt, recompute="none", chunks_per_window=1))
    return per_rank_bytes(plain, 1)[0].activations
