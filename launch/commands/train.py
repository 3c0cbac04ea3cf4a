"""`infini train`: check everything, then train in this process or start the processes that do."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from launch.arguments import add_configuration, count, port, processes
from pipeline.training import stopping

if TYPE_CHECKING:
    from pipeline.config.schema import Config

LATEST = "latest"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a model",
        description="Train a model. Under torchrun or srun this process is one rank; --nproc starts the ranks itself; "
        "otherwise the run has one process.",
    )
    add_configuration(parser)
    parser.add_argument("--nproc", type=processes, metavar="N", help="start N processes on this machine")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=LATEST,
        metavar="PATH",
        help="go on from a checkpoint; without PATH from the newest one in the run folder",
    )
    parser.add_argument(
        "--max-restarts",
        type=count,
        metavar="N",
        help="with --nproc: start all processes again when one fails, from the newest checkpoint, N times at the most",
    )
    parser.add_argument("--master-port", type=port, metavar="PORT", help="port for the processes to meet on")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="make the largest step twice, an evaluation where evaluate.interval is set, and a save, on all processes "
        "of the run; print every rank's peak of memory "
        "beside the plan's, and begin nothing: no window or checkpoint is read (--resume changes nothing), the run "
        "folder is not touched. Exit code 2 where the memory does not suffice",
    )
    parser.set_defaults(run=run, heeds_signals=True)


def run(args: argparse.Namespace) -> int:
    if args.resume is not None and "=" in args.resume and not Path(args.resume).exists():
        # `--resume key=value`: argparse took the override for the path.
        args.overrides, args.resume = [args.resume, *args.overrides], LATEST
    if args.nproc is not None:
        stopping.release(set())  # the launcher has its own way with signals
        return _start(args)
    if args.max_restarts is not None:
        raise ValueError("--max-restarts needs --nproc: else torchrun or the scheduler restarts (MAX_RESTARTS=N there)")

    from launch.processes.reserve import is_in_reserve, wait_in_reserve
    from launch.processes.worker import run_rank, told
    from launch.processes.world import join_world

    world_size = join_world(args.master_port)
    config = run_rank(lambda: checked_config(args, world_size), None)
    if is_in_reserve(config, world_size):
        return wait_in_reserve()
    if args.dry_run:
        stopping.release(set())  # there is nothing to save
        return run_rank(lambda: _dry_run(config), None)
    return told(run_rank(lambda: _train(config, args.resume), Path(config.run_dir)))


def checked_config(args: argparse.Namespace, world_size: int) -> Config:
    """The configuration of `args`, which can run on `world_size` processes.

    Raises:
        ConfigError: it cannot.
        OSError: the file cannot be read.
    """
    from pipeline.config.layout import usable_processes
    from pipeline.config.load import load_config
    from pipeline.config.validate import validate
    from pipeline.training.elastic import this_attempt
    from pipeline.training.regroup import check_least

    config = load_config(args.config, args.overrides)
    sources = {"file": args.config, "overrides": args.overrides}
    if attempt := this_attempt():
        validate(config, **sources)  # what depends on the number of processes can be asked then
        check_least(config, attempt, int(os.environ["LOCAL_WORLD_SIZE"]))
        world_size = usable_processes(config, world_size) or world_size
    validate(config, world_size, **sources)
    return config


def _start(args: argparse.Namespace) -> int:
    from launch.processes.agent import launch_workers
    from launch.processes.world import refuse_nproc_in_a_rank

    refuse_nproc_in_a_rank()
    from pipeline.checkpoint.folder import check_new

    # An error is told once, before any process starts, and writes nothing into another run's folder.
    config = checked_config(args, args.nproc)
    if args.resume is None and not args.dry_run:
        check_new(Path(config.run_dir))
    arguments = ["train", args.config, *args.overrides]
    if args.resume is not None:
        arguments += ["--resume", args.resume]
    if args.dry_run:
        arguments.append("--dry-run")
    return launch_workers("launch.cli", arguments, args.nproc, args.master_port, args.max_restarts or 0)


def _train(config: Config, resume: str | None) -> int:
    from pipeline.training.run import train

    return train(config, resume)


def _dry_run(config: Config) -> int:
    from pipeline.training.dry_run import dry_run

    return dry_run(config)
