"""`infini evaluate`: held-out loss and passkey retrieval of one run, or of several side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from launch.arguments import port, positive_int, processes


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="evaluate runs",
        description="Loss on held-out documents by segment index, and, where passkeys were trained or with --passkey, "
        "passkey retrieval over lengths and depths; with the memory on, off, and exchanged between documents. Several "
        "runs are evaluated in turn and compared.",
    )
    parser.add_argument("run_dirs", metavar="RUN", nargs="+", help="run folder; key=value settings may follow")
    parser.add_argument("--nproc", type=processes, metavar="N", help="start N processes on this machine")
    parser.add_argument("--checkpoint", metavar="PATH", help="checkpoint folder; the run's newest by default")
    parser.add_argument(
        "--all-checkpoints",
        action="store_true",
        help="evaluate every checkpoint that the run has kept, one after the other, and draw the curve",
    )
    parser.add_argument("--out", metavar="DIR", help="folder for the results; RUN/evaluation/CHECKPOINT by default")
    parser.add_argument("--documents", type=positive_int, metavar="N", help="held-out documents (evaluate.documents)")
    parser.add_argument(
        "--data", metavar="PATH", action="append", default=[], help="use this prepared set's held-out documents"
    )
    parser.add_argument(
        "--passkey", action="store_true", help="measure the passkey grid even where no passkeys were trained"
    )
    parser.add_argument("--no-passkey", action="store_true", help="leave the passkey grid and all tasks out")
    parser.add_argument("--no-perplexity", action="store_true", help="leave the held-out loss out")
    parser.add_argument("--master-port", type=port, metavar="PORT", help="port for the processes to meet on")
    parser.set_defaults(run=run, overrides=[])


def run(args: argparse.Namespace) -> int:
    _sort_arguments(args)
    if args.nproc is not None:
        return _start(args)

    from launch.processes.worker import run_rank
    from launch.processes.world import join_world

    world_size = join_world(args.master_port)
    run_rank(lambda: _check(args, world_size), None)
    return run_rank(lambda: _evaluate(args), Path(args.run_dirs[0]))


def _sort_arguments(args: argparse.Namespace) -> None:
    """Tell runs from settings: both are positional."""
    args.overrides = [a for a in args.run_dirs if _is_override(a)] + args.overrides
    args.run_dirs = [a for a in args.run_dirs if not _is_override(a)]
    if args.documents is not None:
        args.overrides.append(f"evaluate.documents={args.documents}")
        args.documents = None
    if not args.run_dirs:
        raise ValueError("no run folder given")
    if args.checkpoint is not None and len(args.run_dirs) > 1:
        raise ValueError("--checkpoint names a checkpoint of one run: with several runs leave it out")
    if args.all_checkpoints and (args.checkpoint is not None or len(args.run_dirs) > 1):
        raise ValueError("--all-checkpoints is for one run, and without --checkpoint: leave it out for the others")
    if args.passkey and args.no_passkey:
        raise ValueError("--passkey and --no-passkey contradict each other: leave one of them out")
    if args.no_passkey and args.no_perplexity:
        raise ValueError("--no-passkey and --no-perplexity together leave nothing to evaluate")


def _is_override(argument: str) -> bool:
    return "=" in argument and not Path(argument).exists()


def _check(args: argparse.Namespace, world_size: int) -> None:
    from pipeline.config.evaluation import evaluation_config

    for run_dir in args.run_dirs:
        evaluation_config(Path(run_dir), args.overrides, world_size)


def _start(args: argparse.Namespace) -> int:
    from launch.processes.agent import launch_workers
    from launch.processes.world import refuse_nproc_in_a_rank

    refuse_nproc_in_a_rank()
    _check(args, args.nproc)  # an error is told once, before any process starts
    arguments = ["evaluate", *args.run_dirs, *args.overrides]
    for option, value in (("--checkpoint", args.checkpoint), ("--out", args.out)):
        arguments += [option, value] if value is not None else []
    for path in args.data:
        arguments += ["--data", path]
    arguments += ["--all-checkpoints"] if args.all_checkpoints else []
    arguments += ["--passkey"] if args.passkey else []
    arguments += ["--no-passkey"] if args.no_passkey else []
    arguments += ["--no-perplexity"] if args.no_perplexity else []
    return launch_workers("launch.cli", arguments, args.nproc, args.master_port)


def _evaluate(args: argparse.Namespace) -> int:
    from pipeline.evaluation.checkpoints import evaluate_checkpoints
    from pipeline.evaluation.comparison import compare
    from pipeline.evaluation.evaluate import evaluate_run
    from pipeline.parallel.topology import on_main, shutdown

    options = {
        "overrides": args.overrides,
        "data": args.data,
        "with_synthetic": not args.no_passkey,
        "with_perplexity": not args.no_perplexity,
        "with_passkey": args.passkey,
    }
    if args.all_checkpoints:
        evaluate_checkpoints(args.run_dirs[0], out=args.out, **options)
        shutdown()
        return 0
    several = len(args.run_dirs) > 1
    results: list[dict[str, Any]] = []
    for number, run_dir in enumerate(args.run_dirs, start=1):
        out = args.out
        if several and out is not None:
            out = Path(out, f"{number}-{Path(run_dir).resolve().name}")
        results.append(evaluate_run(run_dir, checkpoint=args.checkpoint, out=out, **options))
    if several:
        folder = Path(args.out) if args.out else Path(results[0]["folder"])
        on_main(lambda: compare(results, folder) and None)
    shutdown()
    return 0
