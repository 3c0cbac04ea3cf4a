"""`infini trace`: what one step asks of an accelerator, found out on a machine without any."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from launch.arguments import add_configuration, count, whole
from launch.commands.planned import planned_config, planned_vocabulary
from launch.commands.shown_trace import traced

if TYPE_CHECKING:
    from collections import Counter

    from pipeline.config.schema import Config
    from pipeline.tracing.evaluation import EvaluationTrace
    from pipeline.tracing.ledger import HostRead
    from pipeline.tracing.step import StepTrace

SHOWN_OPERATIONS = 15
"""Of those in the layers; `--json` has all."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "trace",
        help="run one step on a pretended accelerator: bytes, kernel launches, host reads",
        description="Run the real step of one rank (forward, recomputation, backward, optimizer) on an accelerator "
        "that does not exist, in a world that does not exist: without data, numbers or devices. Prints the bytes that "
        "are alive at the peak, kernel launches per layer and chunk, dtype copies, collectives, and every place where "
        "the host would wait for the device. Tensors of two devices that meet are an error.",
    )
    add_configuration(parser)
    parser.add_argument(
        "--world-size", type=whole(1, 1_000_000), required=True, metavar="N", help="processes of the run"
    )
    parser.add_argument("--rank", type=count, default=0, metavar="R", help="the process to be (default %(default)s)")
    parser.add_argument(
        "--microbatches",
        type=whole(1, 1_000_000),
        metavar="M",
        help="microbatches to run (default: as many as peak and averages need)",
    )
    parser.add_argument("--statistics", action="store_true", help="trace a step that also measures the memory")
    parser.add_argument(
        "--evaluation",
        action="store_true",
        help="also trace an evaluation inside the run (evaluate.interval): a batch of documents, and one with answers",
    )
    parser.add_argument("--json", metavar="FILE", help="also write everything as JSON, all operations included")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    # At once: importing the libraries takes seconds.
    print(f"tracing {args.config}, rank {args.rank:,} of {args.world_size:,} ...", flush=True)
    from launch.processes.quiet import quiet_libraries

    quiet_libraries()
    from data.files import write_whole
    from pipeline.tracing.report import as_json

    config = planned_config(args)
    if args.rank >= args.world_size:
        raise ValueError(
            f"--rank {args.rank} does not exist: {args.world_size} processes have the ranks 0 to {args.world_size - 1}"
        )
    vocab, vocab_source = planned_vocabulary(config)
    trace = traced(config, args.world_size, args.rank, vocab, args.microbatches, statistics=args.statistics)
    _print(config, args.world_size, vocab, vocab_source, trace)
    evaluation = None
    if args.evaluation:
        from pipeline.tracing.evaluation import trace_evaluation

        evaluation = trace_evaluation(config, args.world_size, args.rank, vocab)
        _print_evaluation(evaluation, trace.peak_bytes)
    if args.json:
        write_whole(args.json, json.dumps(as_json(trace, evaluation), indent=2) + "\n")
        print(f"\nwritten: {args.json}")
    return 0


def _print(config: Config, world: int, vocab: int, vocab_source: str, trace: StepTrace) -> None:
    from pipeline.accounting.footprint import per_rank_bytes
    from pipeline.reporting.console import format_bytes, format_duration, print_table
    from pipeline.tracing.report import dtype_copies, operations
    from pipeline.tracing.step import PASSES, first_rank

    stages = config.parallel.pipeline
    largest = max(per_rank_bytes(config, world, vocab), key=lambda needs: needs.total).stage
    made_of = sorted(trace.at_peak.items(), key=lambda item: -item[1])
    passes = ", ".join(f"{name} {trace.in_layers(name):,.0f}" for name in PASSES if trace.in_layers(name))
    others = sum(trace.beside_layers(name) for name in PASSES)
    rest = {
        launch.phase: sum(n for other, n in trace.launches.items() if other.phase == launch.phase)
        for launch in trace.launches
        if launch.phase not in PASSES
    }
    repeats = ": the others repeat them" if trace.microbatches < trace.microbatches_per_step else ""
    rows = [
        (
            "rank",
            f"stage {trace.stage} of {stages}, {trace.layers} layers; by the plan the largest ranks are those of "
            f"stage {largest}, the first is {first_rank(config, world, largest)}",
        ),
        (
            "run",
            f"{trace.microbatches} of {trace.microbatches_per_step} microbatches x {config.bptt.chunks_per_window} "
            f"chunks{repeats}",
        ),
        ("vocabulary", f"{vocab:,} tokens ({vocab_source})"),
        ("parameters of the rank", f"{trace.parameter_count:,}"),
        ("peak of live bytes", format_bytes(trace.peak_bytes)),
        ("made of", ", ".join(f"{name} {format_bytes(size)}" for name, size in made_of)),
        ("peak before the first step", f"{format_bytes(trace.setup_peak_bytes)}, while the optimizer is built"),
        ("launches per layer and chunk", f"{trace.in_layers():,.1f}: {passes}"),
        ("dtype copies among them", f"{dtype_copies(trace):,.1f}"),
        ("launches per chunk beside the layers", f"{others:,.1f}: embedding, output, loss, schedule"),
        ("launches per step", ", ".join(f"{name} {n:,}" for name, n in rest.items())),
        ("took", format_duration(trace.seconds)),
    ]
    print_table(config.name, rows)

    found = operations(trace)
    shown = found[:SHOWN_OPERATIONS]
    print_table(
        f"launches per layer and chunk, the {len(shown)} most frequent of {len(found)} operations",
        [[name, f"{sum(n.values()):,.2f}", *(f"{n.get(phase, 0):,.2f}" for phase in PASSES)] for name, n in shown],
        header=("operation", "all", *PASSES),
    )
    if trace.collectives:
        print_table(
            f"collectives in {trace.microbatches} microbatches; bytes of whole tensors",
            [
                [key.group, key.kind, f"{traffic.calls:,}", format_bytes(traffic.bytes)]
                for key, traffic in sorted(trace.collectives.items())
            ],
            header=("group", "kind", "calls", "bytes"),
        )
    print("\nplaces where the host waits for the device")
    _print_reads(trace.reads)
    for read, times in sorted(trace.unread_copies.items(), key=lambda item: item[0].place):
        print(f"  {read.place}, {times} x: a copy to the host that nobody waits for")
    if trace.unlisted_reads:
        print(
            f"{len(trace.unlisted_reads)} of them have no reason in pipeline/tracing/host_reads.py: each makes the "
            "device run dry"
        )
    print(
        "counted: operations that start a kernel, as PyTorch dispatches them (without model.compile and "
        "model.packed_attention), attention as one (flash) each way; "
        "not counted: what is inside a kernel or a library, and what the allocator wastes"
    )


def _print_reads(reads: Counter[HostRead]) -> None:
    from pipeline.tracing.host_reads import listed

    for read, times in sorted(reads.items(), key=lambda item: item[0].place):
        print(f"  {read.place}, {times} x: {listed(read.place) or f'NOT LISTED, {read.operation}'}")


def _print_evaluation(trace: EvaluationTrace, step_bytes: int) -> None:
    from pipeline.reporting.console import format_bytes

    print(
        f"\nan evaluation between two steps: a batch of {trace.documents} documents, and others with answers, in "
        f"{trace.windows} windows; peak of live bytes {format_bytes(trace.peak_bytes)}, the step's is "
        f"{format_bytes(step_bytes)}; places where the host waits for the device"
    )
    _print_reads(trace.reads)
