"""Where a step reads a value of the device, and why it may: every other place is a mistake.

A read makes the host wait until the device has done all that was started, and the device then waits for the host.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGES = ("data", "model", "pipeline", "launch")
OWN = (Path(__file__).parent, ROOT / "pipeline" / "accounting" / "live_bytes.py")
"""Frames of the tracer itself."""


class Place(NamedTuple):
    """A line of source."""

    file: str
    """Relative to this project, for a line of it."""
    function: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.function})"


class ListedRead(NamedTuple):
    """A read that is there on purpose."""

    file: str
    function: str
    reason: str


LISTED = (
    ListedRead(
        "pipeline/parallel/gradient_norm.py",
        "_measure",
        "once a step, behind all passes: norms and losses, by which the host decides whether the parameters move",
    ),
    ListedRead(
        "pipeline/checkpoint/run_state.py", "own_tensors", "a checkpoint's copy to host memory, between two steps"
    ),
    ListedRead("pipeline/evaluation/heldout.py", "segment_losses", "evaluation: what a batch of documents loses"),
    ListedRead("pipeline/evaluation/answers.py", "count_right", "evaluation: which answers of a batch are right"),
    ListedRead("pipeline/inference/sampling.py", "choose", "generation: the scores that a token is drawn by"),
    ListedRead("pipeline/inference/incremental.py", "append", "generation: the likeliest token"),
)
"""At the end of a step: nothing inside a chunk."""


def listed(place: Place) -> str | None:
    """The reason for a read there; None for one that nobody has given a reason for."""
    return next((x.reason for x in LISTED if (x.file, x.function) == (place.file, place.function)), None)


def calling_place() -> Place:
    """The innermost line of this project that is being executed, else the innermost that is not PyTorch's own.

    In a backward pass, which PyTorch runs in a thread of its own, that can be a line of `torch.autograd`.
    """
    frames = [
        (frame, line)
        for frame, line in traceback.walk_stack(sys._getframe(1))
        if not any(Path(frame.f_code.co_filename).is_relative_to(own) for own in OWN)
    ]
    for frame, line in frames:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in (*PACKAGES, "tests"):
            return Place(path.relative_to(ROOT).as_posix(), frame.f_code.co_name, line)
    for frame, line in frames:
        name = frame.f_code.co_filename
        if "/torch/" not in name:
            return Place(name, frame.f_code.co_name, line)
    return Place("torch.autograd", "backward", 0)
