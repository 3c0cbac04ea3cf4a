"""What the local attention sees: its segment, or with `sliding` the segment before it as well (Transformer-XL's way,
arXiv 1901.02860).

With `sliding` a token sees the whole previous segment of its document and its own segment up to itself. A segment's
own positions are 0 .. S-1, those of the previous one -S .. -1: rotary attention depends on distances alone, and a
document's first segment is computed as without `sliding`. Keys and values of the previous segment are part of a layer's
state, beside the memory's and under the same rules: carried from chunk to chunk and from step to step, empty where a
document starts. Gradients flow into them inside a window.

Shapes: b lanes, t segments, p probes behind them, n key/value heads of this rank, r query heads per key/value head, s
tokens of a segment, d head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.device import host_knows
from model.layers.heads import Heads
from model.layers.packed_attention import causal_attention, packed_attention
from model.layers.packing import DocumentMask, seen_tokens
from model.layers.rotary import Table, rotate
from model.rules.base import Reads
from model.rules.context import ContextPart, shift
from model.rules.state import LocalContext


def segment_attention(query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask | None = None) -> Tensor:
    """Causal attention inside the segment, `[b*(t+p)*n, r, s, d]`; the first arguments as those of `Heads`.

    Args:
        mask: where documents share segments.
    """
    return causal_attention(query, key, value) if mask is None else packed_attention(query, key, value, mask)


def sliding_attention(
    heads: Heads,
    key: Tensor,
    table: Table,
    context: LocalContext,
    reset: Tensor,
    probes: Tensor | None,
    *,
    detach: bool,
    part: ContextPart | None = None,
    mask: DocumentMask | None = None,
) -> tuple[Tensor, LocalContext]:
    """Causal attention to the segment and to the one before it.

    Args:
        heads: of the segments: of every lane its t and then its p probes.
        key: their keys without positions, `[s, b*(t+p), n, d]`.
        table: of the previous segment's positions.
        context: carried in.
        reset: bool `[b, t]`, True where a document starts.
        probes: int64 `[b, p]` or None: each sees what segment `probes[b, j]` sees.
        detach: let no gradient into previous segments.
        part: the segments are this rank's part of a chunk, before which stands the left neighbour's last one.
        mask: where documents share segments.

    Returns:
        The attention `[b*(t+p)*n, r, s, d]`, and the context carried out.
    """
    b, t = reset.shape
    s, _, n, _ = key.shape
    seen = context.local_seen[:, :1, 0] > 0
    if part is not None and part.context.rank > 0:  # a segment of the left neighbour's is before the first one
        seen = torch.ones_like(seen)
    seen = torch.cat([seen, torch.ones_like(reset[:, 1:])], dim=1) & ~reset
    visible = seen.unsqueeze(2) if mask is None else mask.before
    with_probes = Reads(probes, detach).chosen

    keys, values = (
        x.unflatten(0, (b, -1))[:, :t] for x in (key.permute(1, 2, 0, 3), heads.value.view(-1, n, s, key.shape[3]))
    )
    carried = context[:2]
    if part is None:
        first = [x.to(keys.dtype) for x in carried]
        # A copy: a view would keep all of a layer's keys and values alive until the chunk goes back, recomputed or not.
        last = [x[:, -1].to(carried[0].dtype, copy=True) for x in (keys, values)]
    else:
        first, last = shift(torch.stack([keys[:, -1], values[:, -1]]), torch.stack(carried), part.context)

    def before(own: Tensor, first: Tensor) -> Tensor:
        """What stands before each segment and probe, `[b*(t+p)*n, 1, s, d]`, of `[b, t, n, s, d]`."""
        previous = torch.cat([first.unsqueeze(1), own[:, :-1]], dim=1)
        # Not a product with 0: what is cleared may have overflowed.
        previous = previous.where(visible[:, :, None, :, None], 0)
        previous = previous.detach() if detach else previous
        return with_probes(previous).flatten(0, 2).unsqueeze(1)

    key_before, value_before = before(keys, first[0]), before(values, first[1])
    wide = torch.cat([rotate(key_before, table), heads.key], dim=2), torch.cat([value_before, heads.value], dim=2)
    if mask is None:
        local = causal_attention(heads.query, *wide)
        local = _alone_where_first(local, heads, ~with_probes(seen).repeat_interleave(n))
    else:
        local = packed_attention(heads.query, *wide, mask)
    share_seen = torch.ones_like(context.local_seen)
    share_seen = share_seen if mask is None else share_seen * mask.seen.view(-1, 1, 1)
    return local, LocalContext(*last, share_seen)


def _alone_where_first(wide: Tensor, heads: Heads, first: Tensor) -> Tensor:
    """`wide`, and where nothing is before a segment its own attention.

    A mask of its own for every segment would keep fused kernels away. So the segments' own attention is computed as
    well: of all of them, and taken where it is wanted, on a device that the host would have to wait for to know which
    these are; of these alone on a CPU, where that saves a quarter of the time of both.

    Args:
        wide: attention to the segment and the one before, `[B*n, r, s, d]`.
        first: bool `[B*n]`.
    """
    own = heads[:3]
    if not host_knows(first.device):
        return torch.where(first.view(-1, 1, 1, 1), segment_attention(*own), wide)
    index = first.nonzero().squeeze(1)
    if len(index) == 0:
        return wide
    return wide.index_copy(0, index, segment_attention(*(x[index] for x in own)))


def put_before(
    key: Tensor, value: Tensor, mask: Tensor, table: Table, context: LocalContext
) -> tuple[Tensor, Tensor, Tensor]:
    """The keys, values and mask of a part of a segment with the previous segment before them.

    Args:
        key, value: `[b, n, c, d]`, keys with position encoding.
        mask: bool `[b, 1, q, c]`, True where a query sees a key.
        table: of the previous segment's positions.
    """
    key = torch.cat([rotate(context.local_key.to(key.dtype), table), key], dim=2)
    value = torch.cat([context.local_value.to(value.dtype), value], dim=2)
    seen = seen_tokens(context)[:, None, None]
    return key, value, torch.cat([seen.expand(*mask.shape[:3], -1), mask], dim=3)
