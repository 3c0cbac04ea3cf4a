"""`infini generate`: read prompts of any length and continue them, or keep what was read for later questions."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launch.arguments import count, number, port, positive_int, processes, seed
from launch.commands.terminal import for_output

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.inference.generate import Generator, Prompt
    from pipeline.inference.incremental import LaneState
    from pipeline.inference.sampling import Sampling

PROGRESS_INTERVAL_S = 10.0
"""Between two words on how much of a long prompt has been read."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="continue texts of any length",
        description="Read prompts of any length through the memory and continue them. `--file BOOK --prompt QUESTION` "
        "asks about the book: it is read once, and every prompt goes on after it. Text goes to the standard output, as "
        "it comes when there is one prompt; what was measured to the error output.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder (its newest checkpoint) or checkpoint")
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="a prompt; may be repeated")
    parser.add_argument(
        "--file",
        metavar="FILE",
        action="append",
        default=[],
        help="a text to read, in UTF-8. With --prompt it is read once and each prompt goes on after it; without, it is "
        "the prompt, and --file may be repeated",
    )
    parser.add_argument(
        "--max-new-tokens", type=count, default=256, metavar="N", help="per prompt; 0 only reads (%(default)s)"
    )
    parser.add_argument(
        "--temperature", type=number(0, 1e6), default=0.0, metavar="T", help="0 takes the likeliest token (%(default)s)"
    )
    parser.add_argument(
        "--top-k", type=positive_int, metavar="K", help="draw from the K likeliest tokens; needs a temperature"
    )
    parser.add_argument(
        "--top-p",
        type=number(0, 1, above=True),
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens of this mass (%(default)s); needs a temperature",
    )
    parser.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end a text before this one; may be repeated"
    )
    parser.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="of the first prompt; the next has N + 1 (%(default)s)"
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="write control characters of the text as they are to a terminal, too, where they are shown as \\x1b and "
        "the like; files and pipes always get them",
    )
    parser.add_argument(
        "--save-memory",
        metavar="FILE",
        help="keep what was read in a new file, before anything is generated; with --file beside --prompt the memory "
        "of the file alone, so that other prompts can go on after it",
    )
    parser.add_argument("--load-memory", metavar="FILE", help="go on after what was kept")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of a tokenizer or of a prepared set")
    parser.add_argument("--nproc", type=processes, metavar="N", help="start N processes on this machine")
    parser.add_argument("--master-port", type=port, metavar="PORT", help="port for the processes to meet on")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as parallel.tensor=2")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    _check(args)
    if args.nproc is not None:
        return _start(args)

    from launch.processes.quiet import quiet_libraries
    from launch.processes.worker import run_rank
    from launch.processes.world import join_world

    quiet_libraries()
    # Loaded before a port is chosen: it takes seconds, in which somebody else could get the port.
    importlib.import_module("pipeline.inference.generate")
    join_world(args.master_port)
    return run_rank(lambda: _generate(args), None)


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be seen to be wrong before a model is loaded."""
    for text in args.overrides:
        if "=" not in text:
            raise ValueError(f"{text!r} is no setting (key=value); a text to go on from is given as --prompt TEXT")
    if not args.prompt and not args.file:
        raise ValueError("nothing to read: give --prompt or --file")
    if args.prompt and len(args.file) > 1:
        raise ValueError(
            f"{len(args.file)} times --file beside --prompt: a prompt goes on after one text. Give one --file; for "
            "prompts that do not hang together give all of them as --file, or all as --prompt"
        )
    if "" in args.stop:
        raise ValueError("--stop is empty: no text ends before nothing")
    if args.max_new_tokens == 0 and args.save_memory is None:
        raise ValueError("--max-new-tokens 0: must be at least 1, or 0 to only read (with --save-memory)")
    _sampling(args)
    for name in [*args.file, *([args.load_memory] if args.load_memory else [])]:
        if not Path(name).is_file():
            raise FileNotFoundError(f"there is no file {name}")
    if args.save_memory is not None:
        _check_writable(Path(args.save_memory))


def _sampling(args: argparse.Namespace) -> Sampling:
    """Raises: ValueError: the options contradict one another."""
    from pipeline.inference.sampling import Sampling

    return Sampling(args.temperature, args.top_k, args.top_p)


def _check_writable(path: Path) -> None:
    """Refuse a file that could not be written once everything has been read."""
    if path.is_dir():
        raise IsADirectoryError(f"--save-memory {path} is a folder: give a file")
    if os.path.lexists(path):
        raise FileExistsError(f"--save-memory {path} exists already: choose another name")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise PermissionError(f"--save-memory {path} cannot be written: {folder} is no folder that takes files")


def _start(args: argparse.Namespace) -> int:
    from launch.processes.agent import launch_workers
    from launch.processes.world import refuse_nproc_in_a_rank

    refuse_nproc_in_a_rank()
    arguments = ["generate", args.checkpoint, *args.overrides]
    options = {
        "--prompt": args.prompt,
        "--file": args.file,
        "--stop": args.stop,
        "--max-new-tokens": [args.max_new_tokens],
        "--temperature": [args.temperature],
        "--top-k": [args.top_k],
        "--top-p": [args.top_p],
        "--seed": [args.seed],
        "--save-memory": [args.save_memory],
        "--load-memory": [args.load_memory],
        "--tokenizer": [args.tokenizer],
    }
    # With the equals sign, a value that begins with a dash is no option.
    arguments += [f"{option}={value}" for option, values in options.items() for value in values if value is not None]
    arguments += ["--raw"] if args.raw else []
    return launch_workers("launch.cli", arguments, args.nproc, args.master_port)


def _generate(args: argparse.Namespace) -> int:
    from pipeline.inference.generate import Generator
    from pipeline.parallel.topology import shutdown

    generator = Generator.open(args.checkpoint, overrides=args.overrides, tokenizer=args.tokenizer)
    after = generator.load(args.load_memory) if args.load_memory else None
    # Every prompt goes on after the one file; files alone are prompts themselves.
    texts: list[list[Prompt]] = [list(map(Path, args.file)), args.prompt]
    start, tokens, progress = time.perf_counter(), 0, _progress()
    kept = None
    for prompts in filter(None, texts):
        before = 0 if after is None else sum(after.tokens_read) * (len(prompts) if after.lanes == 1 else 1)
        after = generator.read(prompts, after, on_read=progress)
        tokens += sum(after.tokens_read) - before
        if kept is None:
            kept = after  # of a file and its prompts the file: with a question in it, it would serve that one alone
    state = after
    _report("read", tokens, start)
    if args.save_memory:
        generator.save(kept, args.save_memory)
        _say_kept(kept, args.save_memory)
    if args.max_new_tokens:
        _complete(generator, state, _sampling(args), args)
    shutdown()
    return 0


def _progress() -> Callable[[int], None] | None:
    """Says on the error output, every now and then, how much has been read."""
    if os.environ["RANK"] != "0":
        return None
    last = time.perf_counter()

    def say(tokens: int) -> None:
        nonlocal last
        if time.perf_counter() - last >= PROGRESS_INTERVAL_S:
            last = time.perf_counter()
            print(f"{tokens:,} tokens read", file=sys.stderr)

    return say


def _complete(generator: Generator, state: LaneState, sampling: Sampling, args: argparse.Namespace) -> None:
    main, single = os.environ["RANK"] == "0", state.lanes == 1

    def show(lane: int, piece: str) -> None:
        sys.stdout.write(for_output(piece, raw=args.raw))
        sys.stdout.flush()

    start = time.perf_counter()
    completions = generator.complete(
        state,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        stop=args.stop,
        seeds=args.seed,
        on_text=show if main and single else None,
    )
    if main:
        if single:
            print(flush=True)
        else:
            for number, completion in enumerate(completions, start=1):
                text = for_output(completion.text, raw=args.raw)
                print(f"== prompt {number} ({completion.ended_by})\n{text}", flush=True)
    _report("generated", sum(len(completion.tokens) for completion in completions), start)


def _say_kept(state: LaneState, path: str) -> None:
    if os.environ["RANK"] == "0":
        texts = "" if state.lanes == 1 else f" of {state.lanes:,} texts"
        print(f"kept the memory of {sum(state.tokens_read):,} tokens{texts} in {path}", file=sys.stderr)


def _report(what: str, tokens: int, start: float) -> None:
    import resource

    if os.environ["RANK"] != "0":
        return
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{what} {tokens} tokens in {seconds:.2f} s ({tokens / seconds:.0f} tokens/s), peak memory {peak:.0f} MiB",
        file=sys.stderr,
    )
