"""Names and values of somebody else's files in messages: on one line, bounded, and nothing that a terminal obeys."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

_SHOWN_CHARACTERS = 80
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f]")


class FileError(ValueError):
    """A file that is damaged, of another kind than expected, or too large. The message names it."""


def shown(value: object, characters: int = _SHOWN_CHARACTERS) -> str:
    """`repr(value)` for a message: cut to a length, control characters escaped. Never raises."""
    try:
        text = value[: characters + 1] if isinstance(value, str | bytes) else value
        text = repr(text)
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits, a list inside itself
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= characters + 2 else f"{text[:characters]}..."


def some(names: Iterable[str], most: int = 5) -> str:
    """Names for a message: the first `most` of them, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def printable(text: str) -> str:
    """`text` on one line, with characters that a terminal would obey, or not show, escaped."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def is_utf8(path: Path | str) -> bool:
    """Whether a path can be written down as it is."""
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def file_name(path: Path | str) -> str:
    """A path as text that can be written everywhere: bytes that are not UTF-8, and control characters, as escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
