"""The files of a folder: links followed, each file once, and what is left aside counted by its kind."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.files import FileError, file_name
from data.prepared.manifest import MANIFEST, PART
from data.tokenizer.tokenizer import INFO

_EXAMPLES = 3


class PassedOver:
    """Counts by kind, with the first names of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def add(self, kind: str, name: str) -> None:
        self.counts[kind] += 1
        examples = self._examples.setdefault(kind, [])
        if len(examples) < _EXAMPLES:
            examples.append(name)

    def __str__(self) -> str:
        """`3 .pdf (a.pdf, b.pdf, c.pdf), 1 hidden (.git)`, the most frequent kind first."""
        return ", ".join(
            f"{count:,} {kind} ({', '.join(self._examples[kind])}{', ...' if count > _EXAMPLES else ''})"
            for kind, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        )


@dataclass(frozen=True)
class Found:
    relative: str
    """Path below the folder, with / between folders, as the system has it."""
    path: Path
    status: os.stat_result
    linked: bool
    """Reached over a link, to it or to a folder above it."""

    @property
    def identity(self) -> tuple[object, ...]:
        """The same for all names of a file. (Some network file systems number no files, or not uniquely.)"""
        found = self.status
        place = found.st_ino or os.path.realpath(self.path)
        return found.st_dev, place, found.st_size, found.st_mtime_ns


@dataclass
class Walk:
    """What a walk met, besides the files that it yields."""

    passed_over: PassedOver = field(default_factory=PassedOver)
    twice: list[tuple[str, str]] = field(default_factory=list)
    """(name, where it leads) of links to folders that were read already, or that they lie in."""


def walk(root: Path, wanted: Callable[[str], bool], met: Walk) -> list[Found]:
    """The wanted files below `root` in the order of their paths, hidden files and folders left aside.

    Links to folders are followed, after everything that is reached without them; a folder is read once, and a link to
    a folder that the link lies in is not followed.

    Raises:
        FileError: a folder cannot be read.
    """
    found: list[Found] = []
    pending = [(root, "", False)]
    links: list[tuple[Path, str]] = []
    read: dict[str, str] = {}
    while pending or links:
        if pending:
            folder, prefix, linked = pending.pop()
        else:
            links.sort(key=lambda link: link[1], reverse=True)
            folder, prefix = links.pop()
            linked = True
            target = folder.resolve()
            if folder.parent.resolve().is_relative_to(target):
                met.twice.append((file_name(prefix), f"{file_name(target)}, which it lies in"))
                continue
        identity = os.path.realpath(folder)
        if identity in read:
            met.twice.append((file_name(prefix), file_name(read[identity]) or file_name(root)))
            continue
        read[identity] = prefix
        if prefix and _is_prepared_set(folder):
            met.passed_over.add("prepared sets", file_name(prefix))
            continue
        for entry in _entries(folder):
            relative = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.name.startswith("."):
                met.passed_over.add("hidden", file_name(relative))
            elif not os.path.exists(entry.path):
                met.passed_over.add("links that lead nowhere", file_name(relative))
            elif entry.is_dir() and entry.is_symlink():
                links.append((Path(entry.path), relative))
            elif entry.is_dir():
                pending.append((Path(entry.path), relative, linked))
            elif wanted(relative):
                found.append(Found(relative, Path(entry.path), entry.stat(), linked or entry.is_symlink()))
            else:
                met.passed_over.add(Path(entry.name).suffix.lower() or "without a suffix", file_name(relative))
    return sorted(found, key=lambda file: file.relative)


def _is_prepared_set(folder: Path) -> bool:
    """Whether it is an output, not an input: `infini prepare` may write below a folder that it reads."""
    finished = any((folder / name).is_file() for name in (MANIFEST, PART))
    return finished and (folder / "tokenizer" / INFO).is_file()


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise FileError(f"the folder {file_name(folder)} cannot be read: {error.strerror}") from error
