"""A benchmark's results for programs: the JSON file beside the note. Its form is `SCHEMA`; a changed meaning gets a new
number there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import msgspec

from data.files import read_json, write_whole

SCHEMA = "infini-bench/1"
Scalar = str | int | float | bool
Settings = dict[str, Scalar | list[Scalar] | None]


class Measurement(msgspec.Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One number: what was measured, of what, and how far the repeats lie apart."""

    name: str
    """`tokens_per_second`, `peak_bytes`: one name per kind of number in a benchmark."""
    unit: str
    """`s`, `bytes`, `tokens/s`; `1` for ratios and counts."""
    value: float
    """The median where there are repeats."""
    of: dict[str, Scalar]
    """What tells it from the other numbers of its name: `{"model": "delta", "segment_length": 256}`."""
    low: float | None = None
    high: float | None = None
    """What `spread` says, of the repeats."""
    spread: Literal["quartiles", "extremes"] | None = None
    samples: int | None = None
    """Repeats."""


class Record(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """All of one run of a benchmark."""

    schema: Literal["infini-bench/1"] = SCHEMA
    benchmark: str
    date: str
    """ISO, of the day it began."""
    seconds: float
    commit: str
    command: str
    machine: dict[str, Scalar]
    """`processor`, `cores`, `memory_bytes`, `system`; `device` where an accelerator computed."""
    load: dict[str, float]
    """Of the machine over a minute, `start` and `end`."""
    versions: dict[str, str]
    settings: Settings
    """The options it ran with, defaults included."""
    measurements: list[Measurement]
    pictures: list[str]
    """Files beside this one."""


def write_record(path: Path, record: Record) -> None:
    """Write the file whole, for `read_record`."""
    write_whole(path, json.dumps(msgspec.to_builtins(record), indent=1) + "\n")


def read_record(path: Path) -> Record:
    """What `write_record` wrote.

    Raises:
        FileError: it is damaged, or of another form.
    """
    return read_json(path, Record)
