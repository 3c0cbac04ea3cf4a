"""`infini bench scaling`: tokens per second of one process and of several, by each kind of parallelism, with bounds."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from launch.arguments import positive_int, processes
from launch.commands.bench_options import add_segment_length, add_sizes, check_multiple, check_sizes, model_sizes

if TYPE_CHECKING:
    from launch.commands.bench_note import Note
    from pipeline.benchmarks.scaling import LayoutTimes

HELP = "tokens/s and speedup of several processes in data, tensor and pipeline parallelism, with bounds"
KINDS = ("data", "tensor", "pipeline")
QUICK = {"hidden": 32, "layers": 2, "heads": 2, "ffn": 88, "vocab": 64, "tokens": 64, "segment_length": 16}
QUICK |= {"lanes": 2, "steps": 2, "rounds": 1, "processes": [2]}


def add_options(parser: argparse.ArgumentParser) -> None:
    sizes = add_sizes(parser, hidden=512, layers=8, heads=8, ffn=1368, vocab=4096)
    sizes.add_argument("--tokens", type=positive_int, default=512, metavar="N", help="of a window (%(default)s)")
    sizes.add_argument(
        "--lanes", type=positive_int, default=4, metavar="G", help="windows of a step, of all processes (%(default)s)"
    )
    add_segment_length(sizes)
    parser.set_defaults(segment_length=128)  # a segment for each of a pipeline's chunks
    parser.add_argument(
        "--processes", type=processes, nargs="+", default=[2], metavar="N", help="besides a single one (2)"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of parallelism (all)")
    parser.add_argument("--rule", default="delta", metavar="RULE", help="memory rule (%(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all layouts")
    parser.add_argument(
        "--steps", type=positive_int, default=3, metavar="N", help="of each kind in a round (%(default)s)"
    )
    parser.add_argument(
        "--rounds",
        type=positive_int,
        default=3,
        metavar="N",
        help="in which one process and several take turns (%(default)s)",
    )


def measure(args: argparse.Namespace, note: Note) -> None:
    """Raises: ValueError: the layouts do not fit the sizes."""
    from launch.commands.bench_ranks import run_ranks
    from pipeline.benchmarks.scaling import SINGLE, config_of
    from pipeline.config.validate import validate

    if args.quick:
        vars(args).update(QUICK)
    check_sizes(args)
    check_multiple(args, "tokens", "segment_length")
    sizes = model_sizes(args)
    worlds = {1: [SINGLE], **{count: args.kinds for count in args.processes if count > 1}}
    for count, kinds in worlds.items():
        for kind in kinds:
            config = config_of(kind, count, sizes, args.rule, args.set)
            validate(config, count, data_exists=False, overrides=args.set)
    runs: dict[tuple[str, int], list[LayoutTimes]] = {}
    for number in range(args.rounds):
        for count in sorted(worlds, reverse=number % 2 == 1):
            settings = {"layouts": worlds[count], "sizes": list(sizes), "rule": args.rule, "settings": args.set}
            for times in run_ranks("scaling", count, settings | {"steps": args.steps}):
                runs.setdefault((times.layout, times.processes), []).append(times)
            print(f"  round {number + 1}/{args.rounds}: {count} process(es) done", file=sys.stderr, flush=True)
    report(args, note, sizes.tokens * sizes.lanes, runs)


def report(
    args: argparse.Namespace, note: Note, tokens: int, runs: Mapping[tuple[str, int], Sequence[LayoutTimes]]
) -> None:
    """Write the table and the picture of what ran, by layout and number of processes: each round's times."""
    from launch.commands.bench_bars import draw_bars
    from pipeline.benchmarks.scaling import PIPELINE_CHUNKS

    note.text(
        f"{args.layers} layers, hidden size {args.hidden}, {args.heads} heads, rule {args.rule}, float32; a step is "
        f"forward, backward, reduction and optimizer over {args.lanes} lanes of {args.tokens:,} tokens, whatever the "
        f"number of processes. One thread per process; this machine has {os.cpu_count()} cores. Pipeline stages work "
        f"on windows of one lane in {PIPELINE_CHUNKS} chunks. {args.rounds} rounds of {args.steps} steps, in which one "
        "process and several are started anew and take turns; medians, in brackets the quartiles."
    )
    note.text(
        "Bounds, as speedups. `machine`: every process computes forward and backward of its share of the lanes at the "
        "same time and nobody talks; below the number of processes the machine itself does not scale. `layout`: for "
        "data and tensor parallelism the single step divided by the processes plus its communication, measured by "
        "itself and not hidden; for stages the simulation of the same operation lists with the stages' mean measured "
        "costs, against the same forwards and backwards as they ran."
    )
    rates = {_name(*key): _rates(found, tokens) for key, found in runs.items()}
    single = runs["single", 1]
    machine = _machine(runs)
    header = [
        "layout",
        "tokens/s",
        "speedup",
        "of ideal",
        "bound: machine",
        "bound: layout",
        "of it",
        "talk ms",
        "bubbles",
    ]
    rows = []
    for (layout, count), found in runs.items():
        rows.append(_row(note, layout, count, found, single, machine.get(count), tokens))
    note.table(header, rows)
    draw_bars(note.picture("speed"), f"a step over {tokens:,} tokens, tokens/s", {"": rates})


def _name(layout: str, count: int) -> str:
    return "1 process" if layout == "single" else f"{layout}, {count} processes"


def _all(found: Sequence[LayoutTimes], name: str = "step_s") -> list[float]:
    return [seconds for times in found for seconds in getattr(times, name)]


def _rates(found: Sequence[LayoutTimes], tokens: int):
    from pipeline.benchmarks.alternating import spread

    return spread([tokens / seconds for seconds in _all(found)])


def _machine(runs: Mapping[tuple[str, int], Sequence[LayoutTimes]]) -> dict[int, float]:
    """By the number of processes, how many times the work of one they do when nobody talks."""
    from statistics import median

    alone = median(_all(runs["single", 1], "compute_s"))
    found = {count: median(_all(times, "compute_s")) for (layout, count), times in runs.items() if layout == "data"}
    return {count: alone / seconds for count, seconds in found.items()}


def _row(
    note: Note,
    layout: str,
    count: int,
    found: Sequence[LayoutTimes],
    single: Sequence[LayoutTimes],
    machine: float | None,
    tokens: int,
) -> list[str]:
    from statistics import median

    from pipeline.benchmarks.alternating import spread

    of = {"layout": layout, "processes": count}
    rate = _rates(found, tokens)
    # Round by round: a launch of one process stands beside one of several.
    speedup = spread([median(one.step_s) / median(two.step_s) for one, two in zip(single, found, strict=True)])
    note.number("tokens_per_second", "tokens/s", rate, **of)
    note.number("speedup", "1", speedup, **of)
    row = [_name(layout, count), rate.in_words(",.0f")]
    row += [speedup.in_words(".2f"), f"{100 * speedup.median / count:.0f} %"]
    talk = bubble = share = bound = None
    alone = median(_all(single))
    if layout in ("data", "tensor"):
        talk = median(times.communication_s for times in found)
        bound = alone / (alone / count + talk)
        share = speedup.median / bound
    elif layout == "pipeline":
        simulated, ran = (median(getattr(times, name) for times in found) for name in ("simulated_s", "ran_s"))
        bubble = median(times.bubble_share for times in found)
        share = simulated / ran
        bound = speedup.median / share
    machine = None if layout == "single" else machine
    bounds = {"bound_machine": machine, "bound_layout": bound, "share_of_bound": share, "bubble_share": bubble}
    for name, value in bounds.items():
        if value is not None:
            note.number(name, "1", value, **of)
    if talk is not None:
        note.number("communication_time", "s", talk, **of)
    row += ["-" if value is None else f"{value:.2f}" for value in (machine, bound)]
    row += ["-" if share is None else f"{100 * share:.0f} %", "-" if talk is None else f"{1e3 * talk:,.1f}"]
    return [*row, "-" if bubble is None else f"{100 * bubble:.0f} %"]
