"""`infini`: a command with sub-commands, each in its own module, which imports heavy libraries only when it runs."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from launch import __version__
from launch.commands.terminal import visible
from launch.processes.world import leaving_no_trace
from pipeline.training import stopping

COMMANDS = (
    "launch.commands.prepare",
    "launch.commands.import_hf",
    "launch.commands.inspect",
    "launch.commands.config",
    "launch.commands.plan",
    "launch.commands.trace",
    "launch.commands.train",
    "launch.commands.monitor",
    "launch.commands.evaluate",
    "launch.commands.generate",
    "launch.commands.export_hf",
    "launch.commands.bench",
)
"""Modules with `add_parser(subparsers)`, in the order of the help text."""

USER_ERROR = 2
"""Exit code of everything that the user can put right. docs/command_line.md has the table of all codes."""
READER_GONE = 128 + 13
"""Exit code when whoever read the output has gone, as after `| head`: that of a process that SIGPIPE ends."""


class _Parser(argparse.ArgumentParser):
    """Says with an error which space may be missing, and of an unknown option what it may have been meant for."""

    words: Sequence[str] = ()
    commands: Mapping[str, _Parser]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        joined = [word for word in self.words if re.match(r"[^-\s][^\s=]*--[a-z]", word)]
        super().error(message + (f" (is a space missing in {joined[0]!r}?)" if joined else ""))

    def refuse(self, words: list[str], *, settings: bool) -> NoReturn:
        """End with an error about words that are neither options nor, for a command with `settings`, settings."""
        name = next((word for word in words if word.startswith("-")), words[0]).partition("=")[0]
        if settings and "." in name:
            hint = f"a setting has no dashes: {name.lstrip('-')}=VALUE"
        elif close := difflib.get_close_matches(name, re.findall(r"--[a-z-]+", self.format_usage()), 1):
            hint = f"did you mean {close[0]}?"
        else:
            hint = f"`{self.prog} --help` lists the options"
        self.error(f"unrecognized arguments: {' '.join(words)}; {hint}")


def build_parser() -> _Parser:
    parser = _Parser(
        prog="infini",
        description="Train language models with Infini-attention on documents of unbounded length.",
        epilog="`infini COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"infini {__version__}")
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error (INFINI_DEBUG=1 does the same)"
    )
    # True where a command stops by itself when a signal asks it to (`pipeline.training.stopping`).
    parser.set_defaults(heeds_signals=False)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for module in COMMANDS:
        importlib.import_module(module).add_parser(subparsers)
    parser.commands = subparsers.choices
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line on which `key=value` overrides and options may come in any order."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse gives a list of positionals only what stands before the next option: take the later ones here.
    if rest and not (hasattr(args, "overrides") and all("=" in r and not r.startswith("-") for r in rest)):
        parser.commands[args.command].refuse(rest, settings=hasattr(args, "overrides"))
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code (docs/command_line.md): 0 done, 2 an error the user can put right."""
    stopping.record()
    try:
        with leaving_no_trace():
            return _run(argv)
    finally:
        stopping.forget()


def _run(argv: Sequence[str] | None) -> int:
    args = parse(argv)
    if not args.heeds_signals:
        stopping.release(set())
    if args.debug:
        os.environ["INFINI_DEBUG"] = "1"  # the processes that a command starts see it too
    try:
        code = args.run(args)
        sys.stdout.flush()  # else a reader that has gone is noticed too late to be told from an error
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # What is still in the buffer would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except (ValueError, OSError) as error:
        if os.environ.get("INFINI_DEBUG") == "1":
            raise
        print(f"infini: error: {visible(str(error))}", file=sys.stderr)
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
