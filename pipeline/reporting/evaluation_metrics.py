"""Names of what an evaluation finds: what each stands for, and their values in words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

SHORT_WAYS = {"on": "on", "off": "off", "shuffled": "exchanged", "reset": "emptied"}

_NAME = re.compile(
    rf"evaluation/(?:(?P<set>[^/]+)/loss_(?P<way>{'|'.join(SHORT_WAYS)})"
    r"|(?:task|(?P<passkey>passkey))_(?P<control>on|off|shuffled)/(?P<asked>.+))"
)


class Measure(NamedTuple):
    """What a name stands for."""

    is_loss: bool
    """Nats per token of a set; else the share of questions that are answered right."""
    what: str
    """The set; or the task and its settings."""
    way: str


def parse(name: str) -> Measure | None:
    """What a main number's name stands for; None for other names, and for the loss by segment."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    if match["set"] is not None:
        return Measure(True, match["set"], match["way"])
    grid = "passkey " if match["passkey"] else ""
    return Measure(False, grid + match["asked"].replace("segments_", "segments "), match["control"])


def told(values: Mapping[str, float]) -> list[str]:
    """The main numbers in words, a text for each set and task with all its ways."""
    texts: dict[tuple[bool, str], list[str]] = {}
    for name, value in values.items():
        if found := parse(name):
            shown = f"{value:.4f}" if found.is_loss else f"{value:.2f}"
            texts.setdefault(found[:2], []).append(f"{SHORT_WAYS[found.way]} {shown}")
    return [f"{what} {'loss' if loss else 'right'} {', '.join(ways)}" for (loss, what), ways in texts.items()]


def loss_metric(name: str, way: str) -> str:
    """The metric with a set's loss; `name` as `pipeline.reporting.set_names` gives it."""
    return f"evaluation/{name}/loss_{way}"
