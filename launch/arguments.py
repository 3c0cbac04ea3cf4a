"""Command-line arguments that the commands share, and types: numbers in a range, refused by argparse with the range."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of a whole number in decimal digits, from `low` to `high`."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,40}", text):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number; valid are {low:,} to {high:,}")
        number = int(text)
        if number < low:
            raise argparse.ArgumentTypeError(f"must be at least {low:,}, not {number}")
        if number > high:
            raise argparse.ArgumentTypeError(f"must be at most {high:,}, not {number}")
        return number

    return read


def number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """The type of a number from `low` (or, with `above`, above it) to `high`."""

    def read(text: str) -> float:
        valid = f"{'above ' if above else ''}{low:g} to {high:g}"
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number; valid is {valid}") from None
        if math.isnan(value) or value > high or value < low or above and value == low:
            raise argparse.ArgumentTypeError(f"{text[:40]} is out of range; valid is {valid}")
        return value

    return read


COUNT = 1 << 31

count = whole(0, COUNT)
positive_int = whole(1, COUNT)
processes = whole(1, 4096)
"""On one machine."""
port = whole(1, 65535)
seed = whole(0, (1 << 63) - 1)
"""What every generator of random numbers takes, with room for seeds that are counted up from it."""


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """A run's configuration file, and settings that win over it."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file, see configs/")
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="settings that win over the file's (`infini config --help-keys` explains them)",
    )
