"""The segment that is being written: keys and values of its tokens so far, until it is full and goes to the memory.

Generation sees one token at a time, and prompts end anywhere in a segment. What `InfiniAttention.forward` computes from
a whole segment, `model.layers.incremental` computes for some new tokens of it from this cache. Every lane has a
position of its own. There is no backward pass, so new tokens are written in place: a copy would cost as much as the
attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.config import LayerShape
from model.device import on_device


class SegmentCache(NamedTuple):
    """One layer's current segment: b lanes, n key/value heads of this rank, S positions, of which a lane fills the
    first ones. The first dim of every tensor is the lane."""

    query: Tensor
    """Without position encoding, `[b, n*r, S, d]`: a rule may carry the last ones on."""
    key: Tensor
    """Without position encoding, as the memory gets them, `[b, n, S, d]`."""
    rotated: Tensor
    """With position encoding, as the local attention sees them, `[b, n, S, d]`."""
    value: Tensor
    """`[b, n, S, d]`."""
    gate: Tensor
    """Write gate `[b, n, S]` in the memory's precision; not used when every token is written."""
    inputs: Tensor
    """The memory rule's `token_inputs` one behind the other, `[b, n, S, all their numbers]`, in the memory's
    precision."""


class Span(NamedTuple):
    """New tokens of the current segment: c columns, of which a lane uses the first ones. All of it is made from the
    host's numbers, once for all layers: asking the device which columns are used would wait for it in every layer."""

    start: Tensor
    """int64 `[b]`: tokens of the segment that the cache holds already."""
    stop: int
    """The end of the longest lane: cached positions from here on are empty in every lane."""
    lane: Tensor
    """Of every new token, lane by lane: int64 `[all lanes' new tokens]`."""
    column: Tensor
    """Of every new token, its column."""
    place: Tensor
    """Of every new token, its position in the segment."""
    position: Tensor
    """Of every column, `[b, c]`; of columns that a lane does not use it is one inside the segment."""
    visible: Tensor
    """Cached positions that a column sees, bool `[b, 1, c, stop]`: those up to its own."""
    sees_all: bool
    """Whether every column sees all of them: one token in every lane, at the same position."""

    @classmethod
    def build(cls, start: list[int], count: list[int], device: torch.device) -> Span:
        """Lane i holds `start[i]` tokens and gets `count[i]`."""
        stop = max(a + n for a, n in zip(start, count, strict=True))
        lane = [i for i, n in enumerate(count) for _ in range(n)]
        column = [j for n in count for j in range(n)]
        place = [a + j for a, n in zip(start, count, strict=True) for j in range(n)]
        starts, lanes, columns, places = on_device([start, lane, column, place], device)
        offsets = torch.arange(max(count), device=device)
        position = (starts[:, None] + offsets).clamp(max=stop - 1)
        visible = (torch.arange(stop, device=device) <= position.unsqueeze(-1)).unsqueeze(1)
        alike = set(count) == {1} and len(set(start)) == 1
        return cls(starts, stop, lanes, columns, places, position, visible, alike)

    @classmethod
    def at(cls, place: Tensor, length: int) -> Span:
        """One token in every lane, at positions `[b]` that the host need not know, of segments of `length` tokens."""
        lane = torch.arange(len(place), device=place.device)
        visible = torch.arange(length, device=place.device) <= place[:, None]
        return cls(place, length, lane, torch.zeros_like(lane), place, place[:, None], visible[:, None, None], False)

    @property
    def one_each(self) -> bool:
        """Whether every lane gets one token."""
        return self.position.shape[1] == 1 and len(self.lane) == len(self.start)


def empty_cache(
    lanes: int,
    layer: LayerShape,
    length: int,
    *,
    inputs: int,
    dtype: torch.dtype,
    gate_dtype: torch.dtype,
    device: torch.device,
) -> SegmentCache:
    """A segment of `length` positions without tokens, for a rule with `inputs` numbers per token."""
    shape = (lanes, layer.groups, length, layer.dim)
    query = torch.zeros(lanes, layer.heads, length, layer.dim, dtype=dtype, device=device)
    key, rotated, value = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(3))
    gate = torch.zeros(shape[:3], dtype=gate_dtype, device=device)
    return SegmentCache(query, key, rotated, value, gate, gate.new_zeros(*shape[:3], inputs))


def put(cache: SegmentCache, new: SegmentCache, span: Span) -> None:
    """Write new tokens `[b, n, c, ...]` at their positions, in place, in the cache's precision: in a bfloat16 run the
    biases of Qwen 2 give float32, which the attention's products round."""
    for target, tensor in zip(cache, new, strict=True):
        tensor = tensor[:, :, 0] if span.one_each else tensor[span.lane, :, span.column]
        target[span.lane, :, span.place] = tensor.to(target.dtype)
