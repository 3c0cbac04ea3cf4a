"""FlexAttention (arXiv 2412.05496) for `model.packed_attention=flex`: who sees whom, in blocks of tokens, and the
attention. By itself, because it loads PyTorch's compiler: half a second in every process.

Shapes: B segments and probes, n key/value heads of this rank, r query heads per key/value head, s tokens of a segment,
d head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def block_attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    """`model.layers.packed_attention.packed_attention` in one call for all heads. As it is written it holds all scores
    at once: runs compile it."""
    segments = mask.shape[0]
    query, key, value = (x.unflatten(0, (segments, -1)).flatten(1, 2) for x in (query, key, value))
    # Short segments would take the kernel that is made for decoding.
    options = {"FORCE_USE_FLEX_ATTENTION": True}
    found = flex_attention(query, key, value, block_mask=mask, enable_gqa=True, kernel_options=options)
    return found.unflatten(1, (key.shape[1], -1)).flatten(0, 1)


def block_mask(piece: Tensor, before: Tensor | None) -> BlockMask:
    """`Blocks.mask` of `model.layers.packing`, of `Borders.piece` and of what each segment and probe sees of the one
    before, bool `[b, t + p, s]`, with a sliding context."""
    own = piece.flatten(0, 1)
    # Of the segment before, what is seen goes on in piece 0. A segment has no piece -1.
    keys = own if before is None else torch.cat([before.flatten(0, 1).to(own.dtype) - 1, own], dim=1)
    length, behind = own.shape[1], keys.shape[1] - own.shape[1]

    def sees(segment: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (own[segment, query] == keys[segment, key]) & (key <= query + behind)

    return create_block_mask(sees, len(own), None, length, length + behind, device=own.device)
