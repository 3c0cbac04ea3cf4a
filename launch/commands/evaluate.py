"""`infini evaluate`: held-out loss and passkey retrieval of one run, or of several side by side."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from data.files import is_store, place
from launch.arguments import count, port, positive_int, processes


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="evaluate runs",
        description="Loss on held-out documents by segment index, and, where passkeys were trained or with --passkey, "
        "passkey retrieval over lengths and depths; with the memory on, off, and exchanged between documents. Several "
        "runs are evaluated in turn and compared. With --lm-eval, tasks of lm-evaluation-harness in place of all that.",
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
    parser.add_argument(
        "--lm-eval",
        metavar="TASK[,TASK]",
        type=_names,
        help="run these tasks of lm-evaluation-harness (the extra `lm-eval`), and nothing else",
    )
    parser.add_argument("--lm-eval-tasks", metavar="DIR", help="folder with YAML files of further tasks")
    parser.add_argument(
        "--lm-eval-shots", type=count, metavar="N", help="examples before each question; what a task says by default"
    )
    parser.add_argument("--lm-eval-limit", type=positive_int, metavar="N", help="documents of each task at most")
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
    first = place(args.run_dirs[0])
    return run_rank(lambda: _evaluate(args), first if isinstance(first, Path) else Path(args.out))


def _names(text: str) -> tuple[str, ...]:
    """Names separated by commas, argparse's kind of function."""
    names = tuple(text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name between commas")
    return names


def _sort_arguments(args: argparse.Namespace) -> None:
    """Tell runs from settings: both are positional."""
    args.overrides = [a for a in args.run_dirs if _is_override(a)] + args.overrides
    args.run_dirs = [a for a in args.run_dirs if not _is_override(a)]
    _check_harness(args)
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
    if args.out is None and any(map(is_store, args.run_dirs)):
        raise ValueError("results are written to a disk: with a run in a store give their folder with --out DIR")
    if args.no_passkey and args.no_perplexity:
        raise ValueError("--no-passkey and --no-perplexity together leave nothing to evaluate")


def _check_harness(args: argparse.Namespace) -> None:
    """Raises: ValueError: what is given beside --lm-eval, or without it, would be left out."""
    if args.lm_eval is None:
        own = {"--lm-eval-tasks": args.lm_eval_tasks, "--lm-eval-shots": args.lm_eval_shots}
        own |= {"--lm-eval-limit": args.lm_eval_limit}
        if given := [name for name, value in own.items() if value is not None]:
            raise ValueError(f"{given[0]} is for the tasks of --lm-eval: name some, or leave it out")
        return
    others = {
        "--all-checkpoints": args.all_checkpoints,
        "--documents": args.documents,
        "--data": args.data,
        "--passkey": args.passkey,
        "--no-passkey": args.no_passkey,
        "--no-perplexity": args.no_perplexity,
    }
    if given := [name for name, value in others.items() if value]:
        raise ValueError(f"--lm-eval runs its tasks and nothing else: leave {given[0]} out, or evaluate twice")
    if args.lm_eval_tasks is not None and not Path(args.lm_eval_tasks).is_dir():
        raise FileNotFoundError(f"--lm-eval-tasks: there is no folder {args.lm_eval_tasks}")
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "--lm-eval needs lm-evaluation-harness, which is not installed (pip install 'infini-pretrain[lm-eval]')"
        )


def _is_override(argument: str) -> bool:
    return "=" in argument and not Path(argument).exists()


def _check(args: argparse.Namespace, world_size: int) -> None:
    from pipeline.config.evaluation import evaluation_config

    if args.lm_eval is not None:
        return  # it goes by the checkpoint's own configuration, and an import has no other
    for run_dir in args.run_dirs:
        evaluation_config(place(run_dir), args.overrides, world_size)


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
    options = {
        "--lm-eval": ",".join(args.lm_eval or ()) or None,
        "--lm-eval-tasks": args.lm_eval_tasks,
        "--lm-eval-shots": args.lm_eval_shots,
        "--lm-eval-limit": args.lm_eval_limit,
    }
    arguments += [f"{option}={value}" for option, value in options.items() if value is not None]
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

    if args.lm_eval is not None:
        _run_harness(args)
        shutdown()
        return 0
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
    for run_dir, out in _folders(args):
        results.append(evaluate_run(run_dir, checkpoint=args.checkpoint, out=out, **options))
    if several:
        folder = Path(args.out) if args.out else Path(results[0]["folder"])
        on_main(lambda: compare(results, folder) and None)
    shutdown()
    return 0


def _folders(args: argparse.Namespace) -> list[tuple[str, str | Path | None]]:
    """Runs, and where the results of each go."""
    if len(args.run_dirs) == 1 or args.out is None:
        return [(run_dir, args.out) for run_dir in args.run_dirs]
    return [
        (run_dir, Path(args.out, f"{number}-{Path(run_dir).resolve().name}"))
        for number, run_dir in enumerate(args.run_dirs, start=1)
    ]


def _run_harness(args: argparse.Namespace) -> None:
    from pipeline.evaluation.harness_tasks import HarnessOptions, evaluate_tasks

    options = HarnessOptions(args.lm_eval, args.lm_eval_tasks, args.lm_eval_shots, args.lm_eval_limit)
    for run_dir, out in _folders(args):
        evaluate_tasks(run_dir, options, overrides=args.overrides, checkpoint=args.checkpoint, out=out)
