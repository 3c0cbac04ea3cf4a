"""`infini bench step`: tokens per second of forward and backward, every memory rule against plain and against peers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from launch.arguments import positive_int
from launch.commands.bench_options import (
    RULES,
    add_machine,
    add_sizes,
    check_sizes,
    choose_device,
    machine_in_words,
    model_sizes,
)
from launch.processes.world import be_alone

if TYPE_CHECKING:
    import torch

    from launch.commands.bench_note import Note
    from pipeline.benchmarks.alternating import Clocked
    from pipeline.benchmarks.contestants import Contestant, Sizes

HELP = "tokens/s of a training window: every memory rule against no memory, transformers' Llama and installed peers"
PEERS = ("transformers", "infini-transformer-pytorch", "recurrent-memory-transformer-pytorch")
COMPILED, ONEDNN = " compiled", " onednn"
"""Behind the name of a model that is, or whose products are oneDNN's."""
VARIANTS = {COMPILED: "model.compile=true", ONEDNN: "model.backend=onednn"}
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
QUICK = {"hidden": 32, "layers": 2, "heads": 2, "ffn": 86, "vocab": 64, "tokens": 64, "segment_lengths": [16]}
"""Sizes of `--quick`; it also runs two rounds."""


def add_options(parser: argparse.ArgumentParser) -> None:
    sizes = add_sizes(parser, hidden=512, layers=8, heads=8, ffn=1365, vocab=4096)
    sizes.add_argument("--tokens", type=positive_int, default=2048, metavar="N", help="of a window (%(default)s)")
    sizes.add_argument("--lanes", type=positive_int, default=1, metavar="B", help="windows at a time (%(default)s)")
    sizes.add_argument(
        "--segment-lengths",
        type=positive_int,
        nargs="+",
        default=[256, 64],
        metavar="S",
        help="of the models that have segments; a table each (256 64)",
    )
    parser.add_argument("--rules", nargs="*", choices=RULES, default=list(RULES), help="memory rules (all)")
    parser.add_argument(
        "--against",
        nargs="*",
        choices=PEERS,
        metavar="PACKAGE",
        default=list(PEERS),
        help=f"peers, where they are installed: {', '.join(PEERS)} (all)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings of this model (`infini config --help-keys`), plain included",
    )
    parser.add_argument(
        "--compiled", action="store_true", help="every model of this code a second time, with model.compile=true"
    )
    parser.add_argument(
        "--onednn", action="store_true", help="every model of this code once more, with model.backend=onednn"
    )
    parser.add_argument("--rounds", type=positive_int, default=7, metavar="N", help="in which all run (%(default)s)")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32", help="of all models (%(default)s)")
    add_machine(parser)


def measure(args: argparse.Namespace, note: Note) -> None:
    """Raises: ValueError: sizes that do not divide, or a device that is not there."""
    import torch

    from launch.commands.bench_bars import draw_bars
    from model.device import device_name, keep_freed_memory
    from pipeline.benchmarks import contestants
    from pipeline.benchmarks.alternating import run_rounds
    from pipeline.benchmarks.contestants import PRODUCTS
    from pipeline.benchmarks.measuring import Progress
    from pipeline.parallel.topology import initialize

    if args.quick:
        vars(args).update(QUICK, rounds=2)
    for length in args.segment_lengths:
        if args.tokens % length:
            raise ValueError(f"--tokens {args.tokens} must be a multiple of --segment-lengths {length}")
    check_sizes(args)
    choose_device(args)
    be_alone()
    topology = initialize(tensor=1, pipeline=1, timeout_s=600)
    note.device = device_name(topology.device)
    keep_freed_memory(topology.device)  # as a run does
    peers = [name for name in args.against if contestants.PEERS[name].installed]
    dtype = getattr(torch, PRECISIONS[args.precision])
    _introduce(args, note, topology.device, peers)
    results = []
    for length in args.segment_lengths:
        sizes = model_sizes(args, segment_length=length)
        running = _contestants(args, sizes, topology, dtype, peers)
        tokens = sizes.tokens * sizes.lanes
        clocked = run_rounds(
            {name: contestant.run for name, contestant in running.items()},
            args.rounds,
            device=topology.device,
            report=Progress((args.rounds + 1) * len(running), tokens, "tokens"),
        )
        report(note, sizes, running, clocked)
        results.append((length, tokens, clocked))
    panels = {
        f"segments of {length}": {
            name: clock.rates(tokens) for name, clock in clocked.items() if not name.startswith(PRODUCTS)
        }
        for length, tokens, clocked in results
    }
    draw_bars(note.picture("tokens"), "forward and backward of a window, tokens/s", panels)


def _contestants(
    args: argparse.Namespace, sizes: Sizes, topology, dtype: torch.dtype, peers: Sequence[str]
) -> dict[str, Contestant]:
    from model.backend import matrix_product
    from pipeline.benchmarks.contestants import PLAIN, PRODUCTS, own_config, own_model, peer_model, weight_products

    device = topology.device
    asked = {COMPILED: args.compiled, ONEDNN: args.onednn}
    variants = {"": [], **{suffix: [setting] for suffix, setting in VARIANTS.items() if asked[suffix]}}
    found = []
    for rule in (PLAIN, *args.rules):
        for suffix, more in variants.items():
            config = own_config(sizes, rule, args.precision, [*args.set, *more])
            found.append(own_model(rule + suffix, config, topology))
    found += [peer_model(name, sizes, dtype, device, seed=0) for name in peers]
    found.append(weight_products(PRODUCTS, sizes, dtype, device, matrix_product("local")))
    if args.onednn:
        found.append(weight_products(PRODUCTS + ONEDNN, sizes, dtype, device, matrix_product("onednn")))
    return {contestant.name: contestant for contestant in found}


def _introduce(args: argparse.Namespace, note: Note, device: torch.device, peers: Sequence[str]) -> None:
    from pipeline.benchmarks.contestants import PEERS

    settings = f" Settings of this model: {' '.join(args.set)}." if args.set else ""
    note.text(
        f"Forward and backward through a window of {args.tokens:,} random tokens in {args.lanes} lane(s), a loss on "
        f"each token, one graph; no optimizer. Hidden size {args.hidden}, {args.layers} layers, {args.heads} heads, "
        f"MLP {args.ffn}, {args.vocab:,} tokens in the vocabulary, input and output matrices of their own; "
        f"{args.precision}, {machine_in_words(device, args.threads)}. {args.rounds} rounds after one of warm-up; in "
        "each round every model runs once, in an order that turns and reverses. Medians, in brackets the quartiles; "
        "ratios are taken inside the rounds." + settings
    )
    note.text(
        "`plain` is the same code without a memory (`memory.rule: none`). The share of the peak is the model's rate of "
        "floating-point operations (`pipeline.accounting.flops`: what the mathematics needs) in that of `matrix "
        "products`, the products with the weight matrices alone, forward and backward, at these shapes and in the same "
        "rounds. Processors: processor time in wall time; below the number of threads, something else held them."
    )
    if args.compiled:
        note.text(
            f"`{COMPILED.strip()}` is the same code with `model.compile: true`. The round of warm-up compiles it."
        )
    if args.onednn:
        note.text(
            f"`{ONEDNN.strip()}` is the same code with `model.backend: onednn`: oneDNN makes the products with the "
            "weight matrices in place of MKL. Its share is of its own peak. Peers have PyTorch's products, MKL's."
        )
    if peers:
        note.text("\n".join(["Peers:", "", *(f"- `{name}`: {PEERS[name].does}" for name in peers)]))
    if absent := [name for name in args.against if name not in peers]:
        note.text(f"Not installed, so not measured: {', '.join(absent)}.")


def report(note: Note, sizes: Sizes, running: Mapping[str, Contestant], clocked: Mapping[str, Clocked]) -> None:
    """Write the table of one segment length, and its numbers."""
    from pipeline.benchmarks.contestants import PLAIN, PRODUCTS

    note.text(f"## Segments of {sizes.segment_length} tokens")
    tokens = sizes.tokens * sizes.lanes
    peaks = {
        name.removeprefix(PRODUCTS): clocked[name].rates(running[name].train_flops).median
        for name in running
        if name.startswith(PRODUCTS)
    }
    models = [name for name in running if not name.startswith(PRODUCTS)]
    references = [name for name in models if name in (PLAIN, PLAIN + ONEDNN) or running[name].package]
    header = ["model", "parameters", "tokens/s", *(f"x {name}" for name in references), "of the peak", "processors"]
    rows = []
    for name in models:
        one, clock = running[name], clocked[name]
        of = {"model": name, "segment_length": sizes.segment_length}
        rate, ratios = clock.rates(tokens), {other: clock.times_as_fast_as(clocked[other]) for other in references}
        peak = peaks[ONEDNN if name.endswith(ONEDNN) else ""]
        share = one.train_flops / tokens * rate.median / peak
        note.number("parameters", "1", one.parameters, **of)
        note.number("tokens_per_second", "tokens/s", rate, **of)
        for other, ratio in ratios.items():
            note.number("times_as_fast", "1", ratio, against=other, **of)
        note.number("share_of_peak", "1", share, **of)
        note.number("processors", "1", clock.processors, **of)
        label = one.package or name
        columns = [ratio.in_words(".2f") if other != name else "1" for other, ratio in ratios.items()]
        rows.append([label, f"{one.parameters:,}", rate.in_words(",.0f"), *columns])
        rows[-1] += [f"{100 * share:.0f} %", f"{clock.processors:.2f}"]
    note.table(header, rows)
    for variant, peak in peaks.items():
        note.number("peak", "FLOP/s", peak, model=PRODUCTS + variant, segment_length=sizes.segment_length)
    told = ", ".join(f"{peak / 1e9:,.1f}{variant}" for variant, peak in peaks.items())
    note.text(
        f"The peak: {told} GFLOP/s in {running[PRODUCTS].parameters:,} weights' products. Parameters beyond that are "
        "norms, gates, biases and what a rule adds."
    )
