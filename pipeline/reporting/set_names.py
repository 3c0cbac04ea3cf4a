"""What a prepared set is called in metrics, figures and the names of files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def set_names(paths: Iterable[str]) -> list[str]:
    """A short name for each of several sets, in their order, that no other has: `train`, `train-2`, ..."""
    names: list[str] = []
    for path in paths:
        base = name = set_name(path)
        number = 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return names


def set_name(path: str) -> str:
    """The last part of a set's path as part of a file's name."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(path).name) or "set"
