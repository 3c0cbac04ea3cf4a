"""`infini bench capacity`: how many pairs the memory rules hold, against the d x d bound."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from launch.arguments import positive_int

if TYPE_CHECKING:
    from launch.commands.bench_note import Note

HELP = "pairs that one head of each memory rule holds, random keys, nothing learnt"
RULES = ("linear", "delta", "deltanet", "gdn2")
"""`gated_deltanet`, `kda`, and `delta_product` whose other steps are closed, are `deltanet` that forgets nothing."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dim", type=positive_int, default=32, metavar="D", help="of a head (%(default)s)")
    parser.add_argument(
        "--segment-length", type=positive_int, default=16, metavar="S", help="pairs written at once (%(default)s)"
    )


def measure(args: argparse.Namespace, note: Note) -> None:
    """Raises: ValueError for sizes that are not positive."""
    from pipeline.benchmarks.capacity import CODES, LANES, capacity_curve
    from pipeline.evaluation import plots
    from pipeline.evaluation.intervals import wilson_interval

    dim, length = args.dim, args.segment_length
    if min(dim, length) < 1:
        raise ValueError(f"--dim {dim}, --segment-length {length}: must be at least 1")
    repetitions = 1 if args.quick else 8
    pairs = [max(1, round(dim * factor)) for factor in (0.125, 0.25, 0.5, 1, 2, 4)]
    note.text(
        f"One head, M is {dim} x {dim}: at most {dim} independent pairs. Gaussian values from a list of {CODES}, the "
        f"nearest by its angle is the answer (chance {1 / CODES:.3f}). Segments of {length} pairs; "
        f"{LANES * repetitions} memories a cell, all pairs of each asked. `x 3`: keys three times as long, which "
        "sharpens phi; rules that normalise keys do not see it. gated_deltanet and kda are deltanet where they forget "
        "nothing; gdn2 has its gates as they begin, 0.88 of every channel."
    )
    curves, rows = {}, []
    for kind in ("random", "orthogonal"):
        counts = [n for n in pairs if kind == "random" or n <= dim]
        for rule in RULES:
            for sharpness in (1.0, 3.0) if rule in ("linear", "delta") else (1.0,):
                found = capacity_curve(
                    rule,
                    dim,
                    counts,
                    keys=kind,
                    sharpness=sharpness,
                    segment_length=length,
                    repetitions=repetitions,
                )
                name = rule + (f" x {sharpness:g}" if sharpness != 1 else "")
                for count, (right, asked) in zip(counts, found, strict=True):
                    of = {"rule": rule, "sharpness": sharpness, "keys": kind, "pairs": count}
                    note.number("right_answers", "1", right / asked, **of)
                shares = [f"{right / asked:.3f}" for right, asked in found]
                rows.append([f"{name}, {kind} keys", *shares, *[""] * (len(pairs) - len(counts))])
                if kind == "random":
                    curves[name] = [
                        plots.Score(n, right / asked, *wilson_interval(right, asked), asked)
                        for n, (right, asked) in zip(counts, found, strict=True)
                    ]
    note.table(["right answers with so many pairs", *map(str, pairs)], rows)
    plots.score_curves(
        note.picture("random"),
        curves,
        f"one head of {dim} x {dim}, random keys, nothing learnt",
        xlabel="pairs",
        marks={dim: f"d = {dim}: the rank of M"},
    )
