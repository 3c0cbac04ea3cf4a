"""What `manifest.json` of a prepared set says: declared here once, read and written through it.

The manifest decides what every other file of the set means, so it carries its own SHA-256. One of version 2 has none:
it is read, and whoever shows it says that it is not sealed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from data.files import (
    FileError,
    Place,
    convert,
    decode_json,
    inside,
    place,
    read_bytes,
    sealed,
    shown,
    write_whole,
)
from data.tokenizer.info import Sha256, TokenizerEntry

MANIFEST = "manifest.json"
PART = "part.json"
"""Stands in its place in a part that is to be joined (`data.preparation.parts`)."""
FORMAT_VERSION = 3
READABLE_VERSIONS = (2, 3)
"""Version 3 added the seal."""
SPLITS = ("train", "valid")

_MOST = 1 << 48  # of bytes, documents or tokens: sums of them stay far inside 64 bits

Count = Annotated[int, msgspec.Meta(ge=0, le=_MOST)]
Text = Annotated[str, msgspec.Meta(max_length=1 << 16)]
Option = str | int | float | bool | None | list[str]


class ShardEntry(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    bytes: Count
    sha256: Sha256
    documents: Count
    tokens: Count


class IndexEntry(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    bytes: Count
    sha256: Sha256


class SplitEntry(msgspec.Struct, frozen=True, kw_only=True):
    documents: Count
    tokens: Count
    shards: list[ShardEntry]
    index: IndexEntry
    length_histogram: list[tuple[Annotated[int, msgspec.Meta(ge=1, le=_MOST)], Count]]
    """[[lower bound, documents], ...]: bounds are powers of two, rising."""

    def __post_init__(self) -> None:
        for name in ("documents", "tokens"):
            total = sum(getattr(shard, name) for shard in self.shards)
            if total != getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name):,}, but the shards have {total:,} together")
        bounds = [bound for bound, _ in self.length_histogram]
        if any(bound & (bound - 1) for bound in bounds) or bounds != sorted(set(bounds)):
            raise ValueError("length_histogram: the bounds must be powers of two, each larger than the one before")
        if sum(count for _, count in self.length_histogram) != self.documents:
            raise ValueError(f"length_histogram does not have the {self.documents:,} documents")


class SourceEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one SOURCE."""

    spec: Text
    inputs: Count = 0
    """Files, or what else it is made of."""
    fingerprint: Text = ""
    """Of the names and sizes."""
    contents: Sha256 | None = None
    """Of the contents (`data.preparation.identity`); none in sets of versions that did not look at them."""
    documents: Count = 0
    tokens: Count = 0
    too_short: Count = 0
    """Documents left out."""
    empty: Count = 0
    """Documents without text, left out."""
    skipped_files: Count = 0
    """Files of Python packages left out because they are not UTF-8."""
    bad_records: Count = 0
    bad_files: Count = 0
    """Left out because they cannot be read (`--skip-bad`); of a file that breaks off, its rest."""
    bad: list[Text] = []
    """What is wrong with the first ones."""
    passed_over: dict[Text, Count] = {}
    """Files of a folder that are not read, by their kind."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    format_version: int
    tokenizer: TokenizerEntry
    splits: dict[Literal["train", "valid"], SplitEntry]
    options: dict[Text, Option] = {}
    """The set was made with."""
    sources: list[SourceEntry] = []
    sha256: Sha256 | None = None
    """Of all the rest; None in a manifest of version 2."""

    def __post_init__(self) -> None:
        if not self.splits:
            raise ValueError("splits: there is none")
        for split, entry in self.splits.items():
            if entry.index.name != index_name(split):
                raise ValueError(f"splits.{split}.index.name must be {index_name(split)}")
            # So no name can lead out of the folder.
            for number, shard in enumerate(entry.shards):
                if shard.name != shard_name(split, number):
                    raise ValueError(f"splits.{split}.shards[{number}].name must be {shard_name(split, number)}")


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def index_name(split: str) -> str:
    return f"{split}.index.parquet"


def load_manifest(path: Place | str) -> Manifest:
    """Read and check `manifest.json` of the prepared set at `path`.

    Raises:
        ValueError: the folder holds no complete set, one of another format, or the manifest was changed.
    """
    path = place(path)
    file = path / MANIFEST
    try:
        contents = read_bytes(inside(path, MANIFEST, str(path)))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{path} is not a prepared set: there is no {MANIFEST} (run `infini prepare SOURCE... --out {path}`)"
        ) from None
    manifest = decode_json(contents, dict[str, Any], str(file))
    if "splits" not in manifest or "tokenizer" not in manifest:
        raise FileError(f"{file} is not the manifest of a prepared set")
    version = manifest.get("format_version")
    if isinstance(version, bool) or version not in READABLE_VERSIONS:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise FileError(f"{file} has format_version {shown(version)}; this version reads {readable}")
    if version == 2:
        manifest.pop("sha256", None)
    elif manifest.get("sha256") != sealed(manifest)["sha256"]:
        raise FileError(f"{file} was changed after it was written (its SHA-256 differs)")
    return convert(manifest, Manifest, str(file))


def write_manifest(
    path: Path,
    *,
    tokenizer: TokenizerEntry,
    splits: dict[str, SplitEntry],
    options: dict[str, Option] | None = None,
    sources: Sequence[SourceEntry] = (),
) -> Manifest:
    """Seal a manifest and write it into the folder `path`.

    Raises:
        OSError: the disk would not have it.
    """
    plain = Manifest(
        format_version=FORMAT_VERSION, tokenizer=tokenizer, splits=splits, options=options or {}, sources=list(sources)
    )
    content = sealed(msgspec.to_builtins(plain))
    write_whole(path / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return convert(content, Manifest, str(path / MANIFEST))
