"""`infini plan`: what a configuration costs, before anything is bought or started."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from launch.arguments import add_configuration, number, whole
from launch.commands.planned import (
    ASSUMED_SHARE,
    BETWEEN_NODES_GB,
    DISK_GB,
    LAUNCH_US,
    planned_config,
    planned_rates,
    planned_vocabulary,
    planned_world_size,
    told_rates,
)
from pipeline.accounting.devices import ACCELERATORS, GPUS_PER_NODE

if TYPE_CHECKING:
    from pipeline.accounting.planner import Prediction, Rates
    from pipeline.config.schema import Config

DRAWN_MICROBATCHES = 8
"""Of a longer step only the first microbatches are drawn: the rest repeats them."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="show what a configuration needs, without data or devices",
        description="Check a configuration for a number of processes, build all its stages without memory, and print "
        "parameters, bytes per rank, tokens and FLOPs per step; whether it fits a device, and how long the run takes.",
    )
    add_configuration(parser)
    many = whole(1, 1_000_000)
    parser.add_argument("--world-size", type=many, metavar="N", help="processes of the run")
    parser.add_argument("--nodes", type=many, metavar="N", help="nodes, in place of --world-size")
    parser.add_argument(
        "--gpus-per-node",
        type=whole(1, 1024),
        default=GPUS_PER_NODE,
        metavar="G",
        help="processes of a node (default %(default)s)",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="try all layouts (tensor, context, pipeline, data, ZeRO stage, chunks, recomputation, lanes per "
        "microbatch) in place of the configuration's own: those that fit the device, the fastest first",
    )
    parser.add_argument(
        "--tokens",
        type=number(1, 1e18),
        metavar="T",
        help="with --search: days for so many tokens, as 100e9 (default: the configuration's own run)",
    )
    parser.add_argument("--json", metavar="FILE", help="with --search: also write everything as JSON")
    parser.add_argument(
        "--disk",
        type=number(0, 1e6, above=True),
        default=DISK_GB,
        metavar="GB",
        help="with --search: GB/s that a node writes checkpoints with (default %(default)g, ASSUMED)",
    )
    parser.add_argument(
        "--schedule", action="store_true", help="also simulate the pipeline: bubbles, live chunks, bytes"
    )
    parser.add_argument(
        "--trace",
        action="store_true",
        help="also run one step of the largest rank on a pretended accelerator (`infini trace`) and compare its bytes "
        "with the estimate; a minute or two for 8B",
    )
    parser.add_argument("--png", metavar="PATH", help="draw the simulated timeline; implies --schedule")
    parser.add_argument(
        "--gpu",
        type=str.upper,
        choices=ACCELERATORS,
        default="H100",
        help="device, by its data sheet (default %(default)s)",
    )
    parser.add_argument(
        "--tflops",
        type=number(0, 1e9, above=True),
        metavar="T",
        help=f"TFLOP/s that a rank reaches while it computes (default: {100 * ASSUMED_SHARE:g} %% of its peak)",
    )
    parser.add_argument(
        "--link",
        type=number(0, 1e9, above=True),
        metavar="GB",
        help="GB/s, each way, between the ranks of two stages and between data-parallel ranks (default: that of a "
        f"node's devices for up to {GPUS_PER_NODE} processes, else {BETWEEN_NODES_GB:g}: 400 Gbit/s)",
    )
    parser.add_argument(
        "--launch-us",
        type=number(0, 1e6),
        default=LAUNCH_US,
        metavar="US",
        help="microseconds in which the host starts a kernel; a device whose kernels are shorter waits for it (default "
        "%(default)g, ASSUMED)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    args.world_size = planned_world_size(args)
    # At once: importing the libraries and building the stages take seconds.
    print(f"planning {args.config} on {args.world_size:,} processes ...", flush=True)
    from launch.processes.quiet import quiet_libraries

    quiet_libraries()
    if args.search:
        from launch.commands.plan_search import run_search

        return run_search(args)
    from pipeline.accounting.planner import build_stages, check_counts
    from pipeline.reporting.console import print_table

    config = planned_config(args)
    vocab, vocab_source = planned_vocabulary(config)
    stages = build_stages(config, vocab)
    check_counts(config, args.world_size, vocab, stages)
    print_table(config.name, _summary(config, args.world_size, vocab, vocab_source))
    _print_memory(config, args.world_size, vocab)
    if args.trace:
        _print_trace(config, args.world_size, vocab)
    rates = planned_rates(config, args)
    _print_prediction(config, args, vocab, rates)
    if args.schedule or args.png:
        _print_schedule(config, args, vocab, rates)
    return 0


def _summary(config: Config, world: int, vocab: int, vocab_source: str) -> list[tuple[str, str]]:
    from model.config import rule_and_layers
    from pipeline.accounting.flops import memory_state_bytes, parameter_count, train_flops_per_token
    from pipeline.config import derived
    from pipeline.reporting.console import format_bytes, format_count
    from pipeline.reporting.logits import told_logits

    model, train, parallel = config.model, config.train, config.parallel
    count = parameter_count(model, vocab)
    tokens = derived.tokens_per_step(config)
    flops = train_flops_per_token(model, vocab)
    again = derived.recomputes_logits(config, world, vocab)
    executed = train_flops_per_token(model, vocab, recompute=config.bptt.recompute, recompute_logits=again)
    own = count["beta"] + count["write_gate"] + count["rule"]
    return [
        (
            "layout",
            f"tensor {parallel.tensor} x context {parallel.context} x pipeline {parallel.pipeline} x data "
            f"{derived.data_parallel_size(config, world)} = {world} processes, ZeRO {parallel.zero_stage}, "
            f"{train.precision}",
        ),
        ("vocabulary", f"{vocab:,} tokens ({vocab_source})"),
        ("parameters", f"{count['total']:,}, all stages built and counted; {own:,} of them for the memory"),
        (
            "memory state",
            f"{format_bytes(memory_state_bytes(model, train.precision))} per lane, rule {rule_and_layers(model)}",
        ),
        (
            "tokens per step",
            f"{tokens:,} = {train.lanes} lanes x {train.segments_per_window} segments x {model.segment_length} tokens",
        ),
        ("tokens in the run", f"{tokens * train.steps:,} in {train.steps:,} steps"),
        (
            "FLOPs per token",
            f"{format_count(flops)}, with recompute {config.bptt.recompute} {format_count(executed)} executed",
        ),
        ("logits", told_logits(config, world, vocab)),
        ("FLOPs per step and process", format_count(executed * tokens / world)),
    ]


def _print_memory(config: Config, world: int, vocab: int) -> None:
    from pipeline.accounting.footprint import per_rank_bytes
    from pipeline.reporting.console import format_bytes, print_table

    rows = []
    for needs in per_rank_bytes(config, world, vocab):
        sizes = (needs.parameters, needs.optimizer + needs.buffers, needs.memory_state, needs.gradients)
        sizes += (needs.activations, needs.passes, needs.update, needs.total)
        rows.append([str(needs.stage), str(needs.layers), f"{needs.parameter_count:,}", *map(format_bytes, sizes)])
    header = ("stage", "layers", "parameters", "weights", "optimizer", "memory state", "gradients", "activations")
    header += ("peak of passes", "of the update", "total")
    print_table("estimated bytes of each rank, by pipeline stage", rows, header=header)
    print("total: weights, optimizer, memory state, and the larger of the two peaks, in which the gradients are")


def _print_trace(config: Config, world: int, vocab: int) -> None:
    """Estimate and trace of the largest rank, side by side."""
    from launch.commands.shown_trace import traced
    from pipeline.accounting.footprint import per_rank_bytes
    from pipeline.reporting.console import format_bytes, print_table
    from pipeline.tracing import step

    needs = max(per_rank_bytes(config, world, vocab), key=lambda needs: needs.total)
    rank = step.first_rank(config, world, needs.stage)
    trace = traced(config, world, rank, vocab)
    found = trace.at_peak
    rows = {
        "weights": (needs.parameters, found.get(step.PARAMETERS, 0)),
        "optimizer": (needs.optimizer + needs.buffers, found.get(step.OPTIMIZER, 0)),
        "memory state": (needs.memory_state, found.get(step.STATE, 0)),
        f"peak of the {'update' if needs.update > needs.passes else 'passes'}": (
            max(needs.passes, needs.update),
            sum(found.get(name, 0) for name in (step.GRADIENTS, step.ACTIVATIONS, step.UPDATE, step.BATCH)),
        ),
        "total": (needs.total, trace.peak_bytes),
    }
    print_table(
        f"rank {rank}, the largest by the estimate: the estimate beside a traced step "
        f"({trace.microbatches} of {trace.microbatches_per_step} microbatches)",
        [
            [name, *map(format_bytes, pair), f"{100 * (pair[0] / pair[1] - 1):+.1f} %" if pair[1] else ""]
            for name, pair in rows.items()
        ],
        header=("", "estimate", "traced", "difference"),
    )


def _print_prediction(config: Config, args: argparse.Namespace, vocab: int, rates: Rates) -> None:
    from pipeline.accounting.footprint import per_rank_bytes
    from pipeline.accounting.planner import model_flops_per_s, predict_step
    from pipeline.config.derived import tokens_per_step
    from pipeline.reporting.console import format_bytes, format_duration, print_table

    world, train, device = args.world_size, config.train, ACCELERATORS[args.gpu]
    peak = device.tflops[train.precision]
    largest = max(per_rank_bytes(config, world, vocab), key=lambda needs: needs.total)
    step = predict_step(config, world, vocab, rates)
    per_s = tokens_per_step(config) / step.step_s
    mfu = model_flops_per_s(config, vocab, step.step_s) / (world * peak * 1e12)
    run_s = step.step_s * train.steps

    def sent(per_stage: list[int]) -> str:
        most = max(per_stage)
        return "0 B" if most == 0 else f"{format_bytes(most)}, stage {per_stage.index(most)}"

    rows = [
        (
            "device, by its data sheet",
            f"{device.memory_gb} GB, {peak:,g} TFLOP/s in {train.precision}, {device.node_link_gb_per_s:g} GB/s each "
            "way inside a node",
        ),
        ("memory", memory_verdict(largest.total, device.memory_bytes) + f" (stage {largest.stage})"),
        ("sent per rank and step, tensor", sent(step.tensor_sent)),
        ("sent per rank and step, context", sent(step.context_sent)),
        ("sent per rank and step, pipeline", sent(step.pipeline_sent)),
        ("sent per rank and step, data", sent(step.data_sent)),
        (
            "seconds per step",
            f"{step.step_s:.3g}: pipeline {step.pipeline_s:.3g} ({100 * step.bubble_share:.1f} % bubbles), then "
            f"data-parallel communication {step.data_s:.3g}",
        ),
        *_exposure(step),
        ("tokens per second", f"{per_s:,.0f}, {per_s / world:,.0f} per device"),
        ("MFU", f"{100 * mfu:.1f} % predicted"),
        (
            "the run",
            f"{run_s / 86400:,.2f} days ({format_duration(run_s)}) for {train.steps:,} steps, "
            f"{world * run_s / 3600:,.0f} device hours",
        ),
    ]
    print_table(f"on {world:,} x {args.gpu}", rows)
    print(f"taken: {told_rates(args, rates)}")


def _exposure(step: Prediction) -> list[tuple[str, str]]:
    """What of a step goes to data-parallel traffic that nothing hides, and what overlapping would leave of it."""

    def told(exposed_s: float) -> str:
        return f"{exposed_s:.3g} s, {100 * exposed_s / (step.pipeline_s + exposed_s):.1f} % of a step"

    if not step.data_s:
        return []
    overlapped_s = step.overlapped_reduction_s + step.gathering_s
    return [
        (
            "exposed data traffic",
            f"{told(step.data_s)}: gradients {step.reduction_s:.3g} s, parameters {step.gathering_s:.3g} s",
        ),
        ("behind the last backward", f"{told(overlapped_s)} would be left (not built, docs/devices.md)"),
    ]


def memory_verdict(needed: int, available: int) -> str:
    """Whether a rank fits, and by how much."""
    from pipeline.accounting.search import SPARE
    from pipeline.reporting.console import format_bytes

    left = available - needed
    if left < 0:
        return f"DOES NOT FIT: {format_bytes(needed)} of {format_bytes(available)}, {format_bytes(-left)} too much"
    numbers = f"{format_bytes(needed)} of {format_bytes(available)}, {format_bytes(left)} left"
    if left < SPARE * available:
        return f"TIGHT: {numbers}; communication buffers and the allocator need some of that"
    return f"fits: {numbers}"


def _print_schedule(config: Config, args: argparse.Namespace, vocab: int, rates: Rates) -> None:
    from pipeline.accounting import planner
    from pipeline.accounting.footprint import per_rank_bytes
    from pipeline.reporting.console import format_bytes, print_table

    microbatches, chunks = planner.microbatches_per_step(config, args.world_size), config.bptt.chunks_per_window
    rows, drawings = [], []
    for pieces in sorted({1, chunks}, reverse=True):
        variant = replace(config, bptt=replace(config.bptt, chunks_per_window=pieces))
        name = "1f1b" if pieces == 1 else f"segment_1f1b, {pieces} chunks per window"
        costs = planner.estimated_costs(variant, args.world_size, vocab, rates)
        timeline = planner.simulate_step(variant, costs, microbatches)
        shown = min(microbatches, DRAWN_MICROBATCHES)
        drawings.append(
            (f"{name}, {shown} of {microbatches} microbatches", planner.simulate_step(variant, costs, shown))
        )
        step = [name, f"{1e3 * timeline.makespan_s:,.1f} ms", f"{100 * timeline.bubble_share:.1f} %"]
        for needs in per_rank_bytes(variant, args.world_size, vocab):
            rows.append(
                [
                    *(step if needs.stage == 0 else ("", "", "")),
                    str(needs.stage),
                    f"{100 * timeline.bubble_shares[needs.stage]:.1f} %",
                    str(timeline.peak_live_chunks[needs.stage]),
                    format_bytes(needs.activations),
                    format_bytes(timeline.messages_sent(needs.stage) * costs.message_bytes),
                ]
            )
    header = ("schedule", "step", "bubbles", "stage", "idle", "live chunks", "activations", "sent per rank")
    print_table(
        f"simulated pipeline of {microbatches} microbatches per step: {rates.flops_per_s / 1e12:,.4g} TFLOP/s "
        f"per rank, {rates.link_bytes_per_s / 1e9:g} GB/s between stages",
        rows,
        header=header,
    )
    if args.png:
        from pipeline.schedule.draw import draw_timelines

        draw_timelines(args.png, drawings)
        print(f"\ntimeline: {args.png}")
