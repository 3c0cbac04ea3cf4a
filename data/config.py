"""Which prepared sets feed the lanes: the schema of the `data` section of a run's YAML."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SetConfig:
    """One prepared set (the output folder of `infini prepare`)."""

    path: str = "???"
    """Folder with `manifest.json`."""
    weight: float = 1.0
    """Share of the tokens that come from this set, relative to the other sets."""
    max_epochs: int | None = None
    """How often each document is read at most; then the other sets have this one's share. Null: without end."""
    answer_weight: float = 1.0
    """Loss weight of the tokens that a document marks as answers (other tokens weigh 1)."""


@dataclass
class DataConfig:
    sets: list[SetConfig] = field(default_factory=list)
    """The mixture the lanes draw documents from."""
    stagger: bool = True
    """Start the first document of each lane at a random segment (with packing: token), so that lanes do not reset
    together."""
    packing: bool = False
    """Start the next document right behind the last one, inside of its segment, in place of padding. Documents stay
    apart: none attends to another, or reads what it has written to the memory."""
    skip_bad_documents: bool = False
    """Skip and count documents that cannot be read, in place of stopping."""
    prefetch: int = 2
    """Windows prepared in the background."""
