"""`infini config`: the configuration as a run takes it, and what every setting means."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config.keys import Setting

WIDTH = 100
"""Of a line with a meaning."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "config",
        help="show a configuration, or explain the settings",
        description="Print the configuration that a run takes: defaults, file and settings together, as YAML. With "
        "--help-keys explain the settings instead: type, range, default and meaning.",
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file, see configs/; none for the defaults")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="settings that win over the file's")
    parser.add_argument(
        "--help-keys",
        metavar="PATTERN",
        nargs="?",
        const="",
        help="explain the settings whose key or meaning holds PATTERN (* and ? stand for anything); without it all",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.config is not None and "=" in args.config and not Path(args.config).exists():
        args.overrides, args.config = [args.config, *args.overrides], None
    if args.help_keys is not None:
        if args.config is not None or args.overrides:
            raise ValueError("--help-keys explains the settings whatever a file says: leave the file and settings out")
        print(explain(args.help_keys), end="")
        return 0

    from pipeline.config.load import load_config
    from pipeline.config.validate import validate
    from pipeline.config.yaml import dump

    config = load_config(args.config, args.overrides)
    print(dump(dataclasses.asdict(config)), end="")
    validate(config, data_exists=False, file=args.config, overrides=args.overrides)
    return 0


def explain(pattern: str) -> str:
    """The settings that `pattern` finds.

    Raises:
        ValueError: it finds none.
    """
    from pipeline.config.keys import SYNONYMS, settings, suggestions

    wanted = pattern.lower()
    every = list(settings())
    found = [setting for setting in every if _fits(setting, wanted)]
    found.sort(key=lambda setting: wanted not in setting.key)  # a key says more than a meaning
    found = found or [setting for setting in every if setting.key == SYNONYMS.get(wanted.rpartition(".")[2])]
    if not found:
        close = suggestions(wanted)
        hint = f"did you mean {' or '.join(close)}?" if close else "`infini config --help-keys` shows all"
        raise ValueError(f"no setting has {pattern!r} in its key or meaning; {hint}")
    return "\n".join(map(_explain, found))


def _fits(setting: Setting, wanted: str) -> bool:
    if any(character in wanted for character in "*?"):
        return fnmatch.fnmatchcase(setting.key, wanted)
    text = f"{setting.key} {setting.meaning.lower()}"
    return wanted in text or all(word in text for word in wanted.split())


def _explain(setting: Setting) -> str:
    from pipeline.config.bounds import BOUNDS
    from pipeline.config.validate import CHOICES
    from pipeline.config.values import list_item, type_name

    bound = BOUNDS.get(f"{setting.key}.*" if list_item(setting.kind) else setting.key)
    what = type_name(setting.kind)
    if bound is not None:
        what += f", {bound}"
    if setting.key in CHOICES:
        what = f"one of {', '.join(CHOICES[setting.key])}"
    default = "no default" if setting.default is dataclasses.MISSING else f"default {_value(setting.default)}"
    meaning = textwrap.fill(setting.meaning, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return f"{setting.key}: {what}; {default}\n{meaning}\n"


def _value(value: object) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
