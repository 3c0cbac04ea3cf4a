"""`infini bench context`: one long document, exact gradients through all of it, on one process and on several."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from launch.arguments import positive_int, processes
from launch.commands.bench_options import (
    RULES,
    add_segment_length,
    add_sizes,
    check_multiple,
    check_sizes,
    model_sizes,
)

if TYPE_CHECKING:
    from launch.commands.bench_note import Note
    from pipeline.benchmarks.context import ContextRun

HELP = "one document of a million tokens over several processes: memory of each, gradient at its first segment, bytes"
SHORTER = 16
"""A document of so much less is read as well: what is sent must not grow with the length."""
QUICK = {"hidden": 32, "layers": 1, "heads": 2, "ffn": 88, "vocab": 64, "tokens": 1024, "segment_length": 16}
QUICK |= {"processes": 2}


def add_options(parser: argparse.ArgumentParser) -> None:
    sizes = add_sizes(parser, hidden=32, layers=2, heads=2, ffn=88, vocab=512)
    add_segment_length(sizes)
    sizes.add_argument(
        "--tokens", type=positive_int, default=1 << 20, metavar="N", help="of the document, one window (%(default)s)"
    )
    parser.add_argument(
        "--processes", type=processes, default=4, metavar="C", help="that share the document (%(default)s)"
    )
    parser.add_argument("--rule", choices=RULES, default="delta", help="memory rule (%(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of both")


def measure(args: argparse.Namespace, note: Note) -> None:
    """Raises: ValueError: the sizes do not divide."""
    from launch.commands.bench_ranks import run_ranks
    from pipeline.benchmarks.context import config_of
    from pipeline.config.validate import validate

    if args.quick:
        vars(args).update(QUICK)
    check_sizes(args)
    check_multiple(args, "tokens", "segment_length")
    sizes = model_sizes(args, lanes=1)
    lengths = [args.tokens // SHORTER, args.tokens]
    for length in lengths:
        config = config_of(args.processes, sizes._replace(tokens=length), args.rule, args.set)
        validate(config, args.processes, data_exists=False, overrides=args.set)
    settings = {"tokens": lengths, "sizes": list(sizes), "rule": args.rule, "settings": args.set}
    runs: dict[tuple[int, int], ContextRun] = {}
    for count in (1, args.processes):
        for run in run_ranks("context", count, settings):
            runs[count, run.tokens] = run
        print(f"  {count} process(es) done", file=sys.stderr, flush=True)
    report(args, note, runs)


def report(args: argparse.Namespace, note: Note, runs: Mapping[tuple[int, int], ContextRun]) -> None:
    """Write the tables and the picture of what ran, by processes and tokens of the document."""
    note.text(
        f"{args.layers} layers, hidden size {args.hidden}, {args.heads} heads, MLP {args.ffn}, rule {args.rule}, "
        f"segments of {args.segment_length} tokens, float64, layers recomputed. A document is one window in one chunk: "
        "forward, and backward from the loss of its last segment to the embeddings of its first, through every memory "
        "between; nothing is truncated. Live: tensors at most, weights and batch not counted, of the process that has "
        "most; grown: by how much its resident set grew. One thread per process."
    )
    rows = []
    for (count, tokens), run in runs.items():
        of = {"processes": count, "tokens": tokens}
        alone = runs[1, tokens]
        grown = max(peak - start for peak, start in zip(run.peak_bytes, run.start_bytes, strict=True))
        live = max(run.live_bytes)
        norm, difference = gradient_against(run, alone)
        for name, unit, value in (
            ("live", "bytes", live),
            ("grown", "bytes", grown),
            ("share_of_one", "1", live / max(alone.live_bytes)),
            ("loss", "nats", run.loss),
            ("loss_difference", "1", abs(run.loss / alone.loss - 1)),
            ("first_gradient_norm", "1", norm),
            ("first_gradient_difference", "1", difference),
            ("sent", "bytes", run.sent_bytes),
            ("time", "s", run.seconds),
        ):
            note.number(name, unit, value, **of)
        rows.append(
            [
                str(count),
                f"{tokens:,}",
                f"{live / 2**20:,.1f}",
                f"{live / max(alone.live_bytes):.3f}",
                f"{grown / 2**20:,.0f}",
                f"{norm:.3e}",
                "-" if count == 1 else f"{difference:.1e}",
                f"{run.sent_bytes / 2**10:,.1f}",
                f"{run.seconds:,.0f}",
            ]
        )
    header = ["processes", "tokens", "live MiB", "of one", "grown MiB", "gradient at the first segment"]
    note.table([*header, "differs by", "sent KiB a layer", "s"], rows)
    short, long = (runs[args.processes, tokens] for tokens in (args.tokens // SHORTER, args.tokens))
    note.text(
        f"`differs by`: norm of the difference to one process's gradient, over its norm. Sent: by one process for one "
        f"layer, forward, recomputed and backward; {long.sent_bytes / short.sent_bytes:g} times as much for "
        f"{SHORTER} times the tokens."
    )
    _draw(note.picture("memory"), args, runs)


def gradient_against(run: ContextRun, alone: ContextRun) -> tuple[float, float]:
    """Norm of the gradient at the first segment, and of its difference to one process's over that one's norm."""
    import numpy as np

    own, reference = np.array(run.first_gradient), np.array(alone.first_gradient)
    norm = float(np.linalg.norm(reference))
    return float(np.linalg.norm(own)), float(np.linalg.norm(own - reference)) / norm


def ring_bytes(args: argparse.Namespace, tokens: int) -> float:
    """What a ring of keys and values would send a layer: once forward, and with their gradients back."""
    return 3 * 2 * 8 * args.hidden * tokens * (args.processes - 1) / args.processes


def _draw(path: Path, args: argparse.Namespace, runs: Mapping[tuple[int, int], ContextRun]) -> None:
    from pipeline.figures import quiet, save_figure, titled_figure

    figure = titled_figure(8.0, 2.8, f"a document of {args.tokens:,} tokens, gradients through all of it")
    left, right = figure.subplots(1, 2)
    names, sizes = [], []
    for count in (1, args.processes):
        for rank, size in enumerate(runs[count, args.tokens].live_bytes):
            names.append("one process" if count == 1 else f"rank {rank} of {count}")
            sizes.append(size / 2**20)
    left.barh(range(len(names)), sizes, color=["#b04040", *["#9db7de"] * (len(names) - 1)])
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("MiB of tensors at most")
    lengths = [args.tokens // SHORTER, args.tokens]
    sent = [runs[args.processes, tokens].sent_bytes / 2**10 for tokens in lengths]
    right.plot(lengths, sent, "o-", color="#3060a0", label="pairs (measured)")
    right.plot(
        lengths,
        [ring_bytes(args, tokens) / 2**10 for tokens in lengths],
        "o--",
        color="#b04040",
        label="ring of keys and values (arithmetic)",
    )
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xlabel("tokens of the document")
    right.set_ylabel("KiB sent, a layer and process")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        quiet(axes)
    save_figure(figure, path)
