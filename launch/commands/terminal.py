"""Text of a model's or of a stranger's file on a terminal: what would command the terminal is shown instead."""

from __future__ import annotations

import re
import sys

# Control characters but for tab and line feed (C0, delete, C1), and those that turn the direction of what follows.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """`text` with escapes such as `\\x1b` for every character that a terminal would obey rather than print."""
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def for_output(text: str, *, raw: bool = False) -> str:
    """`text` as it goes to the standard output: as it is into a file or a pipe, or with `raw`; else `visible`."""
    return text if raw or not sys.stdout.isatty() else visible(text)
