"""`infini bench schedule`: what windows cost, how the pipeline runs, and gradients through a million tokens."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launch.processes.world import be_alone

if TYPE_CHECKING:
    from launch.commands.bench_note import Note
    from pipeline.benchmarks.pipeline import Measured
    from pipeline.benchmarks.window import WindowCost

HELP = "memory and time of windows with and without recomputation; the pipeline measured and simulated"
PARTS = ("window", "pipeline", "million")
LENGTHS = (4, 8, 16, 32, 64, 128, 256)
QUICK_LENGTHS = (4, 8)
MILLION_SEGMENTS = 16384
"""Of 64 tokens: 1,048,576."""
MILLION_CHUNKS = (64, 128)
"""Segments per chunk in the two computations."""

PACED_CHUNK_S = 0.1
"""Forward of a quarter of a window: waking up takes milliseconds on a busy machine, and must not pass for a bubble."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--million", action="store_true", help="also a document of 1,048,576 tokens (some minutes)")
    parser.add_argument("--only", choices=PARTS, help="measure this part alone")


def measure(args: argparse.Namespace, note: Note) -> None:
    parts = [args.only] if args.only else ["window", "pipeline", *(["million"] if args.million else [])]
    if args.only:
        note.name += f"-{args.only}"
    # Measuring processes are forked from this one and join groups of one: the window comes before anything else.
    be_alone()
    if "window" in parts:
        _window(note, QUICK_LENGTHS if args.quick else LENGTHS)
    if "pipeline" in parts:
        _pipeline(note, args.quick)
    if "million" in parts:
        _million(note, 64 if args.quick else MILLION_SEGMENTS, (8, 16) if args.quick else MILLION_CHUNKS)


def _progress(message: str) -> None:
    print(f"  {message}", file=sys.stderr, flush=True)


def _window(note: Note, lengths: tuple[int, ...]) -> None:
    from pipeline.benchmarks.window import CHUNK_SEGMENTS, METHODS, WINDOW_MODEL, window_table

    costs = {(cost.method, cost.segments): cost for cost in window_table(lengths, _progress)}
    note.text("## Memory and time against window length")
    note.text(
        f"One process, one lane, forward and backward of one window: {_model(WINDOW_MODEL)}. `plain` keeps every "
        f"activation; `layer` recomputes layers; `window` runs chunks of {CHUNK_SEGMENTS} segments again from the "
        "memory at their beginning. Peak is the live tensors at most, counted at every operation "
        "(`pipeline.accounting.live_bytes`), parameters and their gradients not included; RSS is by how much the "
        "resident set of a fresh process grew at most. Time is CPU time, the quickest of three, relative to `plain` at "
        f"{lengths[0]} segments ({1e6 * costs['plain', lengths[0]].cpu_s_per_token:.0f} us per token)."
    )
    base = costs["plain", lengths[0]].cpu_s_per_token
    header = ["segments", "tokens"]
    header += [f"{method} {what}" for what in ("peak MiB", "RSS MiB", "time per token") for method in METHODS]
    rows = []
    for segments in lengths:
        row = [costs[method, segments] for method in METHODS]
        for cost in row:
            of = {"part": "window", "method": cost.method, "segments": segments}
            note.number("live", "bytes", cost.peak_bytes, **of)
            note.number("rss_growth", "bytes", cost.rss_bytes, **of)
            note.number("token_cpu_time", "s", cost.cpu_s_per_token, **of)
        rows.append(
            [
                str(segments),
                f"{segments * 128:,}",
                *(f"{cost.peak_bytes / 2**20:.1f}" for cost in row),
                *(f"{cost.rss_bytes / 2**20:.1f}" for cost in row),
                *(f"{cost.cpu_s_per_token / base:.2f}" for cost in row),
            ]
        )
    note.table(header, rows)
    first, last = lengths[0], lengths[-1]
    growth = {method: costs[method, last].peak_bytes / costs[method, first].peak_bytes for method in METHODS}
    note.text(
        f"From {first} to {last} segments, {last // first} times as long, the peak grows "
        + ", ".join(f"{factor:.2f} times with `{method}`" for method, factor in growth.items())
        + "."
    )
    _draw_window(note.picture("window"), costs, lengths)


def _draw_window(path: Path, costs: dict[tuple[str, int], WindowCost], lengths: tuple[int, ...]) -> None:
    from matplotlib.figure import Figure

    from pipeline.benchmarks.window import METHODS
    from pipeline.figures import save_figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    memory, clock = figure.subplots(1, 2)
    for method in METHODS:
        row = [costs[method, segments] for segments in lengths]
        memory.plot(lengths, [cost.peak_bytes / 2**20 for cost in row], marker="o", label=method)
        clock.plot(lengths, [1e6 * cost.cpu_s_per_token for cost in row], marker="o", label=method)
    memory.set(title="peak of live tensors", ylabel="MiB", yscale="log")
    clock.set(title="CPU time per token", ylabel="us", ylim=(0, None))
    for axes in (memory, clock):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("segments in the window")
        axes.grid(alpha=0.3)
    memory.legend(frameon=False)
    save_figure(figure, path)


def _pipeline(note: Note, quick: bool) -> None:
    from pipeline.benchmarks.pipeline import MODEL
    from pipeline.schedule.draw import draw_timelines

    chunk_s, repeats = (0.01, 1) if quick else (PACED_CHUNK_S, 3)
    note.text("## The pipeline, measured and simulated")
    note.text(
        f"{_model(MODEL)}; four windows of 16 segments in a step, one lane each. Every stage is a process; messages go "
        f"over gloo. This machine has {os.cpu_count()} cores. `free`: stages compute as fast as they can; with more "
        "stages than cores (or with other work on the machine) they slow each other down, which no simulation of "
        "separate devices contains. `paced`: every computation lasts a set time, "
        f"{1e3 * chunk_s:.0f} ms forward and {2e3 * chunk_s:.0f} ms backward for four segments, sleeping when it is "
        "done early, as an accelerator of its own would; messages, waiting and order are real. The simulation plays "
        "the same operation lists with each stage's mean measured time per kind of computation and the median latency "
        "of a message. Order: of the pairs of computations on different stages that the simulation starts at least "
        "half a computation apart, the part that started in the same order. Live tensors: counted in a step of its "
        f"own. Shown is the repeat of median length of {repeats}."
    )
    header = ["stages", "schedule", "run", "step ms", "simulated ms", "bubbles", "simulated", "difference"]
    header += ["repeats", "order", "latency ms", "CPU s", "live chunks", "live tensors MiB"]
    rows, drawings = [], []
    for stages in (2,) if quick else (2, 4):
        for result in _run_pipeline(stages, chunk_s, repeats):
            rows.append([str(stages), *_pipeline_row(result)])
            of = {"part": "pipeline", "stages": stages, "schedule": result.variant, "paced": result.paced}
            note.number("step_time", "s", result.timeline.makespan_s, **of)
            note.number("simulated_time", "s", result.simulated.makespan_s, **of)
            note.number("bubble_share", "1", result.bubble_shares, **of)
            note.number("simulated_bubble_share", "1", result.simulated.bubble_share, **of)
            note.number("same_order", "1", result.same_order, **of)
            note.number("latency", "s", result.latency_s, **of)
            note.number("cpu_time", "s", result.cpu_s, **of)
            for stage, (chunks, live) in enumerate(zip(result.live_chunks, result.live_bytes, strict=True)):
                note.number("live_chunks", "1", chunks, stage=stage, **of)
                note.number("live", "bytes", live, stage=stage, **of)
            if result.paced and (stages == 4 or quick):
                drawings.append((f"{result.variant}, measured", result.timeline))
                drawings.append((f"{result.variant}, simulated", result.simulated))
    note.table(header, rows)
    draw_timelines(note.picture("timelines"), drawings)


def _run_pipeline(stages: int, chunk_s: float, repeats: int) -> list[Measured]:
    from launch.commands.bench_ranks import run_ranks

    settings = {"pipeline": stages, "lanes": 4, "repeats": repeats, "chunk_s": chunk_s, "model": []}
    return run_ranks("pipeline", stages, settings)


def _pipeline_row(result: Measured) -> list[str]:
    measured, simulated = result.timeline, result.simulated
    shares = [100 * share for share in result.bubble_shares]
    live_bytes = [f"{bytes_ / 2**20:.0f}" for bytes_ in result.live_bytes]
    return [
        result.variant,
        "paced" if result.paced else "free",
        f"{1e3 * measured.makespan_s:,.0f}",
        f"{1e3 * simulated.makespan_s:,.0f}",
        f"{100 * measured.bubble_share:.1f} %",
        f"{100 * simulated.bubble_share:.1f} %",
        f"{100 * (measured.bubble_share / simulated.bubble_share - 1):+.0f} %",
        f"{min(shares):.1f} .. {max(shares):.1f} %",
        f"{100 * result.same_order:.1f} %",
        f"{1e3 * result.latency_s:.2f}",
        f"{result.cpu_s:.2f}",
        ", ".join(map(str, result.live_chunks)),
        ", ".join(live_bytes),
    ]


def _million(note: Note, segments: int, chunk_sizes: tuple[int, ...]) -> None:
    from pipeline.benchmarks.window import (
        MILLION_MODEL,
        document_gradients,
        largest_difference,
        million_config,
        plain_bytes,
    )

    be_alone()
    results = document_gradients(segments, chunk_sizes, _progress)
    note.text(f"## Gradients through one document of {segments * 64:,} tokens")
    plain = plain_bytes(million_config(segments, chunk_sizes[0]))
    note.text(
        f"{_model(MILLION_MODEL)}, {segments:,} segments in one window, backpropagation through all of it, "
        f"`bptt.recompute: window`. Keeping all activations would take {plain / 2**30:.1f} GiB by "
        "`pipeline.accounting.footprint`. RSS is the peak of the whole process (libraries, model, the document and its "
        "losses included) and what it was before the step."
    )
    header = ["objective", "segments per chunk", "wall s", "CPU s", "peak RSS MiB", "before MiB", "mean loss"]
    header += ["norm of the gradient at the first segment", "of all parameters"]
    rows = []
    for last_only, runs in results.items():
        for run in runs:
            whole = sum(float(gradient.pow(2).sum()) for gradient in run.gradients.values()) ** 0.5
            objective = "last segment" if last_only else "document"
            of = {"part": "million", "objective": objective, "chunk_segments": run.chunk_segments}
            note.number("wall_time", "s", run.wall_s, **of)
            note.number("cpu_time", "s", run.cpu_s, **of)
            note.number("peak", "bytes", run.peak_rss_bytes, **of)
            note.number("start", "bytes", run.start_rss_bytes, **of)
            note.number("loss", "nats", run.loss, **of)
            note.number("first_segment_gradient", "nats", float(run.first_segment.norm()), **of)
            note.number("gradient", "nats", whole, **of)
            rows.append(
                [
                    "loss of the last segment" if last_only else "loss of the document",
                    str(run.chunk_segments),
                    f"{run.wall_s:.0f}",
                    f"{run.cpu_s:.0f}",
                    f"{run.peak_rss_bytes / 2**20:.0f}",
                    f"{run.start_rss_bytes / 2**20:.0f}",
                    f"{run.loss:.9f}",
                    f"{float(run.first_segment.norm()):.9e}",
                    f"{whole:.9e}",
                ]
            )
    note.table(header, rows)
    for last_only, (first, second) in results.items():
        name = "last segment" if last_only else "document"
        largest = {key: f"{value:.1e}" for key, value in largest_difference(first, second).items()}
        note.text(
            f"Objective {name}: largest difference between the two chunk sizes, relative to the largest entry: "
            f"{largest['parameters']} over all parameters, {largest['first segment']} at the first segment."
        )


def _model(overrides: list[str]) -> str:
    """The settings in words."""
    values = dict(override.split("=", 1) for override in overrides)
    precision = values.get("train.precision", "fp32")
    return (
        f"{values['model.num_layers']} layers, hidden size {values['model.hidden_size']}, "
        f"{values['model.num_attention_heads']} heads, segments of {values['model.segment_length']} tokens, "
        f"rule {values['model.memory.rule']}, {precision}"
    )
