"""`infini plan --search`: the layouts of a run that fit so many devices, the fastest first."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from launch.commands.planned import planned_rates, planned_vocabulary, told_rates
from pipeline.accounting.devices import ACCELERATORS
from pipeline.config.derived import data_parallel_size, tokens_per_step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.accounting.planner import Prediction, Rates
    from pipeline.accounting.search import Found, Layout
    from pipeline.config.schema import Config

SHOWN = 12
"""Layouts; `--json` has all."""
HOST_COPY_GB = 8.0
"""From a device to host memory that is not page-locked: for so long a save stops the training."""
DOUBLINGS = 6
"""When nothing fits: so often more nodes are tried, for the memory alone."""


def run_search(args: argparse.Namespace) -> int:
    """Search, print the table, and write the JSON.

    Raises:
        NoLayoutError: nothing can run, or nothing fits.
        ConfigError: the configuration is wrong, whatever its layout.
    """
    from data.files import write_whole
    from pipeline.accounting.search import search
    from pipeline.config.load import load_config

    config = load_config(args.config, args.overrides)
    vocab, vocab_source = planned_vocabulary(config)
    rates, device = planned_rates(config, args), ACCELERATORS[args.gpu]
    found = search(config, args.world_size, vocab, device.memory_bytes, rates, args.gpus_per_node)
    tokens = args.tokens or config.train.steps * tokens_per_step(config)
    saved = _checkpoint(config, args, vocab)
    if found.fitting:
        _print_fitting(config, args, vocab, found, tokens)
        _print_checkpoint(args, *saved)
        best = found.fitting[0]
        print(f"the first one: infini plan {args.config} --world-size {args.world_size} {' '.join(best.settings)}")
    if found.too_large:
        _print_too_large(args, found)
    print(f"\nvocabulary: {vocab:,} tokens ({vocab_source})")
    print(f"taken: {told_rates(args, rates)}")
    if args.json:
        written = as_json(config, args, vocab, rates, found, tokens)
        written["checkpoint"] = dict(zip(("bytes", "stall_s", "write_s"), saved, strict=True))
        write_whole(args.json, json.dumps(written, indent=2) + "\n")
        print(f"written: {args.json}")
    if not found.fitting:
        _refuse(config, args, vocab, found)
    return 0


def _checkpoint(config: Config, args: argparse.Namespace, vocab: int) -> tuple[int, float, float]:
    """Bytes of a checkpoint, seconds for which training waits for its copy, and seconds that writing takes."""
    from pipeline.accounting.search import checkpoint_bytes

    size = checkpoint_bytes(config, vocab)
    nodes = -(-args.world_size // args.gpus_per_node)
    return size, size / args.world_size / (HOST_COPY_GB * 1e9), size / nodes / (args.disk * 1e9)


def told_layout(layout: Layout, world_size: int) -> str:
    """Tensor x context x pipeline x data."""
    parallel = layout.config.parallel
    data = data_parallel_size(layout.config, world_size)
    return f"{parallel.tensor} x {parallel.context} x {parallel.pipeline} x {data}"


def _row(layout: Layout, world_size: int) -> list[str]:
    from pipeline.reporting.console import format_bytes

    config = layout.config
    return [
        told_layout(layout, world_size),
        str(config.parallel.zero_stage),
        str(config.bptt.chunks_per_window),
        config.bptt.recompute,
        str(config.train.lanes_per_microbatch),
        format_bytes(layout.largest.total),
    ]


HEADER = ("tensor x context x pipeline x data", "ZeRO", "chunks", "recompute", "lanes", "memory")


def _print_fitting(config: Config, args: argparse.Namespace, vocab: int, found: Found, tokens: float) -> None:
    from pipeline.accounting.search import SPARE
    from pipeline.reporting.console import print_table

    world, device = args.world_size, ACCELERATORS[args.gpu]
    rows = []
    for layout in found.fitting[:SHOWN]:
        step = layout.prediction
        per_s, mfu, days = _speed(config, args, vocab, tokens, step)
        rows.append(
            [
                *_row(layout, world),
                f"{per_s:,.0f}",
                f"{100 * mfu:.1f} %",
                f"{days:,.2f}",
                f"{100 * step.bubble_share:.1f} %",
                f"{100 * step.data_s / step.step_s:.1f} %",
            ]
        )
    shown = "" if len(found.fitting) <= SHOWN else f" (the first {SHOWN})"
    print_table(
        f"{config.name} on {world:,} x {args.gpu}: {len(found.fitting)} layouts fit {device.memory_gb} GB less "
        f"{100 * SPARE:g} %{shown}, each in its best variant of {found.variants:,}",
        rows,
        header=(*HEADER, "tokens/s", "MFU", "days", "bubbles", "exposed"),
    )
    print(f"\ndays: for {tokens:,.0f} tokens, {tokens_per_step(config):,} a step")
    print("exposed: the share of a step that waits for traffic between replicas")


def _speed(
    config: Config, args: argparse.Namespace, vocab: int, tokens: float, step: Prediction
) -> tuple[float, float, float]:
    """Tokens per second, model FLOPs as a share of the data sheet's peak, and days that `tokens` take."""
    from pipeline.accounting.planner import model_flops_per_s

    peak = args.world_size * ACCELERATORS[args.gpu].tflops[config.train.precision] * 1e12
    per_s = tokens_per_step(config) / step.step_s
    return per_s, model_flops_per_s(config, vocab, step.step_s) / peak, tokens / per_s / 86400


def _print_checkpoint(args: argparse.Namespace, saved: int, stall_s: float, write_s: float) -> None:
    from pipeline.reporting.console import format_bytes, format_duration

    print(
        f"checkpoint: {format_bytes(saved)}; training waits {stall_s:.1f} s for the copy to host memory (ASSUMED "
        f"{HOST_COPY_GB:g} GB/s a device), writing takes {format_duration(write_s)} behind it (--disk {args.disk:g} "
        "GB/s a node)"
    )


def _print_too_large(args: argparse.Namespace, found: Found) -> None:
    from pipeline.reporting.console import format_bytes, print_table

    available = ACCELERATORS[args.gpu].memory_bytes
    print_table(
        f"{len(found.too_large)} layouts do not fit in any variant; the smallest of each",
        [
            [*_row(layout, args.world_size), format_bytes(layout.largest.total - available)]
            for layout in found.too_large[:SHOWN]
        ],
        header=(*HEADER, "more than the device"),
    )


def _refuse(config: Config, args: argparse.Namespace, vocab: int, found: Found) -> None:
    """Raises:
    NoLayoutError: with what comes closest, and how many nodes would do.
    """
    from pipeline.accounting.search import SPARE, NoLayoutError, smallest_bytes
    from pipeline.reporting.console import format_bytes

    device, closest = ACCELERATORS[args.gpu], found.too_large[0]
    limit = (1 - SPARE) * device.memory_bytes
    enough = next(
        (
            world
            for world in (args.world_size * 2**n for n in range(1, DOUBLINGS + 1))
            if (smallest_bytes(config, world, vocab, args.gpus_per_node) or limit + 1) <= limit
        ),
        None,
    )
    remedy = f"{enough:,} devices would do" if enough else "more devices alone do not help"
    raise NoLayoutError(
        f"nothing fits {args.world_size:,} x {args.gpu}: tensor x context x pipeline x data "
        f"{told_layout(closest, args.world_size)} comes closest, with {format_bytes(closest.largest.total)} on a rank "
        f"of stage {closest.largest.stage} where {format_bytes(limit)} may be taken; {remedy}"
    )


def as_json(
    config: Config, args: argparse.Namespace, vocab: int, rates: Rates, found: Found, tokens: float
) -> dict[str, Any]:
    """Everything that a search has found; bytes, seconds and tokens in full."""
    from pipeline.accounting.search import SPARE

    device = ACCELERATORS[args.gpu]

    def all_of(layouts: Sequence[Layout]) -> list[dict[str, Any]]:
        rows = []
        for layout in layouts:
            row: dict[str, Any] = {
                "settings": dict(setting.split("=", 1) for setting in layout.settings),
                "bytes": layout.largest.total,
                "stage": layout.largest.stage,
            }
            if step := layout.prediction:
                per_s, mfu, days = _speed(config, args, vocab, tokens, step)
                row |= {
                    "tokens_per_s": per_s,
                    "step_s": step.step_s,
                    "mfu": mfu,
                    "days": days,
                    "bubble_share": step.bubble_share,
                    "exposed_s": step.data_s,
                }
            rows.append(row)
        return rows

    return {
        "configuration": args.config,
        "overrides": list(args.overrides),
        "devices": args.world_size,
        "gpu": args.gpu,
        "tokens": tokens,
        "tokens_per_step": tokens_per_step(config),
        "variants": found.variants,
        "assumptions": {
            "flops_per_s": rates.flops_per_s,
            "link_bytes_per_s": rates.link_bytes_per_s,
            "node_bytes_per_s": rates.node_bytes_per_s,
            "kernel_start_s": rates.start_s,
            "device_bytes": device.memory_bytes,
            "spare": SPARE,
            "vocabulary": vocab,
        },
        "fitting": all_of(found.fitting),
        "too_large": all_of(found.too_large),
    }
