"""Runs whose number of nodes changes: what the launcher tells the ranks, what they tell it, and what a change cost.

The launchers (`launch.processes.elastic`) start the ranks again whenever nodes have gone or come; one such start is an
attempt. Attempts of one launch are numbered, and all but the first go on from the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import msgspec

from data.files import FileError, decode_json, read_bytes, write_whole

ATTEMPT = "INFINI_ATTEMPT"
"""Environment variable with this start's `Attempt`."""
CLAIM_FOLDER = "INFINI_CLAIM_FOLDER"
"""Environment variable with a folder of the launcher's that nobody else can write, and that goes with the launcher."""

NODES, PROGRESS, SAVED, ACTIVE, RUN_FOLDER = "nodes", "progress", "saved", "active", "run-folder"
"""Files there: how many nodes and processes there could be now (by the launcher); how far the run is, the newest
checkpoint's step, the number of ranks that train, where errors are kept (by the ranks)."""
REGROUP = 86
"""Exit code of a rank that has saved so that the ranks can be started again on more nodes."""
LIMIT = 4096
"""Bytes of such a file that are read."""


class Reached(msgspec.Struct, frozen=True):
    """How far a run was."""

    step: int
    tokens: int
    time: float
    """Unix time, by the clock of the node that says it."""


class Attempt(msgspec.Struct, frozen=True):
    """One start of the ranks of a launch."""

    number: int
    """0 is the first."""
    launch: str
    """Another one for every launch."""
    min_nodes: int
    max_nodes: int
    lost: list[str] = []
    """Nodes of the attempt before that are no longer there."""
    joined: list[str] = []
    before: Reached | None = None
    """Where the attempts before had come to, as far as a node that is still there knows; by the clock of rank 0's."""

    def __str__(self) -> str:
        named = {"without": self.lost, "with": self.joined}
        changes = [f"{word} {', '.join(nodes)}" for word, nodes in named.items() if nodes]
        told = " and ".join(changes) or ("on the same nodes" if self.number else "the first")
        return f"attempt {self.number}, {told}"


def this_attempt() -> Attempt | None:
    """What the launcher says of this start; None where the number of nodes is fixed."""
    text = os.environ.get(ATTEMPT)
    return None if text is None else decode_json(text.encode(), Attempt, ATTEMPT)


# Between a node's ranks and its launcher, through the launcher's folder


def launcher_folder() -> Path | None:
    """The launcher's folder, where the number of nodes may change."""
    folder = os.environ.get(CLAIM_FOLDER)
    return Path(folder) if folder and ATTEMPT in os.environ else None


def tell_launcher(name: str, text: str) -> None:
    """Leave a word for this node's launcher, where there is one; ranks that say the same may do so at once."""
    if folder := os.environ.get(CLAIM_FOLDER):
        with contextlib.suppress(OSError):  # it goes on without
            path = Path(folder, f".{name}-{os.getpid()}")
            path.write_text(text)
            path.rename(Path(folder, name))


def told_by_ranks(folder: Path, name: str) -> str | None:
    """What `tell_launcher` has left in the launcher's folder."""
    try:
        return (folder / name).read_text()
    except OSError:
        return None


def tell_progress(step: int, tokens: int) -> None:
    """The step is done: the node's first rank says so where the number of nodes may change."""
    if launcher_folder() is not None and os.environ.get("LOCAL_RANK") == "0":
        tell_launcher(PROGRESS, msgspec.json.encode(Reached(step, tokens, time.time())).decode())


def progress_of(folder: Path) -> Reached | None:
    """How far the ranks of a launcher had come."""
    try:
        return decode_json(read_bytes(folder / PROGRESS, LIMIT), Reached, str(folder / PROGRESS))
    except (OSError, FileError):
        return None


def write_nodes(folder: Path, nodes: int, processes: int) -> None:
    """Tell the ranks of this launcher how many nodes and processes there could be."""
    text = f"{nodes} {processes}"
    if told_by_ranks(folder, NODES) != text:
        write_whole(folder / NODES, text)
