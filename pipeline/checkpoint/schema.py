"""What the JSON files of a checkpoint hold, declared once: whoever gets one of these may rely on types and bounds."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

FORMAT_VERSION = 1

Count = Annotated[int, Meta(ge=0, le=1 << 60)]
"""Steps, tokens, bytes, elements."""
Rank = Annotated[int, Meta(ge=0, le=1 << 20)]
"""Ranks, lanes, heads, and how many of them there are."""
Size = Annotated[int, Meta(ge=0, le=1 << 40)]
"""One dim of a tensor."""
Hash = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
FileName = Annotated[str, Meta(pattern=r"^(rank|weights)_[0-9]{5,7}\.(json|safetensors)\Z")]
Text = Annotated[str, Meta(max_length=4096)]


class FileFacts(msgspec.Struct, frozen=True):
    """What `checkpoint.json` records of a file."""

    bytes: Count
    sha256: Hash


class Layout(msgspec.Struct, frozen=True):
    """The processes that wrote it."""

    tensor: Rank
    pipeline: Rank
    data: Rank
    zero_stage: Rank
    world_size: Rank
    context: Rank = 1


class Source(msgspec.Struct, frozen=True):
    """Where imported weights came from."""

    path: Text = ""
    model_type: Text = ""
    memory: Text = "trained"
    """`initial` before the memory's parameters were trained."""


class Summary(msgspec.Struct, frozen=True):
    """`checkpoint.json`."""

    format_version: int
    step: Count
    tokens: Count
    windows: Count
    """Windows by which the lanes have moved."""
    recent_losses: Annotated[list[float], Meta(max_length=1 << 20)]
    optimizer_steps: Count
    files: dict[FileName, FileFacts]
    layout: Layout
    vocab_size: Annotated[int, Meta(ge=1, le=1 << 31)]
    """Tokens, without padding."""
    config: dict[str, Any]
    """See `CheckpointReader.config`."""
    sha256: Hash
    """Of all the rest."""
    versions: dict[Text, Text] = {}
    backbone_optimizer_steps: Count | None = None
    """None: the same as `optimizer_steps`."""
    weights_only: bool = False
    source: Source = Source()
    tokenizer_sha256: Hash | None = None
    """`Tokenizer.hash` of what the token ids mean; None in checkpoints of the first version."""


class Cursor(msgspec.Struct, frozen=True):
    """Where a lane stands: `data.lanes.schedule.LaneCursor`, and the stream that it belongs to."""

    taken: Annotated[list[Count], Meta(max_length=1 << 16)]
    consumed: Annotated[list[Count], Meta(max_length=1 << 16)]
    credit: Annotated[list[Annotated[int, Meta(ge=-(1 << 60), le=1 << 60)]], Meta(max_length=1 << 16)]
    stream: Text
    set: Rank | None = None
    document: Count | None = None
    segment: Count = 0
    entered: Count = 0
    skipped: Count = 0


class Part(msgspec.Struct, frozen=True):
    """`rank_00000.json`: what is in the file of tensors beside it."""

    tensors: list[dict[str, Any]]
    """`ParameterEntry` or `MemoryEntry`, by their key."""
    lanes: dict[Annotated[str, Meta(pattern=r"^(0|[1-9][0-9]{0,6})\Z")], Cursor]


class ParameterEntry(msgspec.Struct, frozen=True):
    """A range of the flattened part of a parameter (or of its moments) that one tensor-parallel rank holds."""

    key: Annotated[str, Meta(pattern=r"^(master|exp_avg|exp_avg_sq)/[A-Za-z0-9_.]{1,200}\Z")]
    start: Count
    count: Count
    local_shape: Annotated[list[Size], Meta(max_length=8)]
    partition_dim: Annotated[int, Meta(ge=0, le=7)] | None
    partition_stride: Annotated[int, Meta(ge=1, le=64)]
    tensor_rank: Rank
    tensor_size: Annotated[int, Meta(ge=1, le=1 << 20)]


class MemoryEntry(msgspec.Struct, frozen=True):
    """What some lanes and key/value heads of one layer carry."""

    key: Annotated[str, Meta(pattern=r"^memory/(0|[1-9][0-9]{0,5})/[A-Za-z_]{1,64}\Z")]
    first_lane: Rank
    first_head: Rank
    shape: Annotated[list[Annotated[int, Meta(ge=1, le=1 << 40)]], Meta(min_length=2, max_length=8)]
