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
    """New tokens of the current segment: c columns, of which lane i uses the first `count[i]`."""

    start: Tensor
    """int64 `[b]`: tokens of the segment that the cache holds already."""
    count: Tensor
    """int64 `[b]`."""
    stop: int
    """The largest `start + count`: cached positions from here on are empty in every lane."""
    lane: Tensor
    """Of every new token, lane by lane: int64 `[sum(count)]`. From the host's numbers, and once for all layers: asking
    the device which columns are used would wait for it in every layer."""
    column: Tensor
    """Of every new token, its column."""

    @classmethod
    def build(cls, start: list[int], count: list[int], device: torch.device) -> Span:
        def on_device(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int64, device=device)

        stop = max(a + n for a, n in zip(start, count, strict=True))
        lane = [i for i, n in enumerate(count) for _ in range(n)]
        column = [j for n in count for j in range(n)]
        return cls(on_device(start), on_device(count), stop, on_device(lane), on_device(column))

    def positions(self, columns: int) -> Tensor:
        """Positions in the segment, `[b, c]`; columns that a lane does not use stay inside it."""
        offsets = torch.arange(columns, device=self.start.device)
        return (self.start[:, None] + offsets).clamp(max=self.stop - 1)


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
    lane, column = span.lane, span.column
    position = span.start[lane] + column
    for target, tensor in zip(cache, new, strict=True):
        target[lane, :, position] = tensor[lane, :, column].to(target.dtype)
