"""The token-by-token path through a layer's attention: what generation takes, where training takes whole windows.

The parameters, the projections and the mixing are `InfiniAttention`'s; the segment so far is a cache of keys and values
(`model.layers.segment_cache`). There is no backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.layers import segment_cache
from model.layers.attention import InfiniAttention
from model.layers.local_context import put_before
from model.layers.mixing import mix
from model.layers.rotary import rotate
from model.layers.segment_cache import SegmentCache, Span, put
from model.rules import Tokens
from model.rules.borders import Borders
from model.rules.parameters import rule_inputs, rule_weights
from model.rules.state import State, join_state, map_state, split_state


def empty_cache(attention: InfiniAttention, lanes: int, device: torch.device, dtype: torch.dtype) -> SegmentCache:
    """A current segment without tokens, see `extend`."""
    return segment_cache.empty_cache(
        lanes,
        attention.shape,
        attention.segment_length,
        inputs=sum(_inputs(attention).values()),
        dtype=dtype,
        gate_dtype=attention.memory_dtype,
        device=device,
    )


def extend(attention: InfiniAttention, hidden: Tensor, memory: State | None, cache: SegmentCache, span: Span) -> Tensor:
    """Attend from new tokens of the current segment to the memory before it and to the segment so far.

    The same numbers as `InfiniAttention.forward` gives for these positions of the whole segment.

    Args:
        hidden: normalised hidden states of the new tokens, `[c, b, h]`.
        memory: as it was when the segment began.
        cache: the segment so far; the new tokens are written into it, in place.
        span: where the new tokens stand.

    Returns:
        Hidden states `[c, b, h]`; where a lane does not use a column they mean nothing.
    """
    c, b = hidden.shape[:2]
    query, key, value = _split(attention.project_in(hidden))
    own = attention.tables.own(hidden.device, attention.memory_dtype)
    table = tuple(x[span.position].unsqueeze(1) for x in own)
    inputs = [cache.inputs.new_empty(b, attention.groups, c, 0)]
    numbers = attention.token_numbers(hidden)
    gate = attention.token_gate(numbers, b, 1)
    if attention.rule is not None:
        found = rule_inputs(attention.rule, attention.shape, numbers, b, 1)
        inputs += [x.squeeze(1) for x in found.values()]
    gate = cache.gate.new_ones(b, attention.groups, c) if gate is None else gate.squeeze(1)
    put(cache, SegmentCache(query, key, rotate(key, table), value, gate, torch.cat(inputs, dim=-1)), span)
    mask = span.visible
    keys, values = cache.rotated[:, :, : span.stop], cache.value[:, :, : span.stop]
    memory, context = split_state(memory)
    if context is not None:
        before = attention.tables.before(hidden.device, attention.memory_dtype)
        keys, values, mask = put_before(keys, values, mask, before, context)
    mask = None if context is None and span.sees_all else mask
    local = _attend(rotate(query, table), keys, values, mask)
    if attention.rule is None:
        return attention.project_out(_join(local))
    memory = attention.rule.inside(memory, cache.query.unflatten(1, (attention.groups, -1)), span.start)
    before = map_state(memory, lambda x: x.unsqueeze(1))
    q = query.to(attention.memory_dtype).unflatten(1, (attention.groups, -1)).unsqueeze(1)
    read = attention.rule.read(q, rule_weights(attention), before)
    share = attention.shown_share(attention.memory_share(numbers, b, 1), attention.rule.present(before).unsqueeze(-1))
    mixed = mix(share, read, local.reshape(b * attention.groups, -1, c, attention.dim))
    return attention.project_out(mixed)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention `[b, n*r, c, d]` of queries to keys and values `[b, n, k, d]`; True in the mask `[b, 1, c, k]` sees.

    The query heads of a key/value head are rows of one attention. As heads that share keys, PyTorch would copy these r
    times under a mask.
    """
    groups, rows = key.shape[1], query.unflatten(1, (key.shape[1], -1))
    if mask is not None:
        mask = mask.unsqueeze(2).expand(-1, -1, rows.shape[2], -1, -1).flatten(2, 3)
    local = F.scaled_dot_product_attention(rows.flatten(2, 3), key, value, attn_mask=mask)
    return local.view(len(query), groups, *rows.shape[2:]).flatten(1, 2)


def _inputs(attention: InfiniAttention) -> dict[str, int]:
    """The rule's `token_inputs`."""
    return {} if attention.rule is None else attention.rule.token_inputs(attention.shape)


def _split(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of `[c, b, n, r + 2, d]` the queries `[b, n*r, c, d]`, keys and values `[b, n, c, d]`."""
    qkv = qkv.permute(1, 2, 3, 0, 4)
    return qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1]


def _join(attended: Tensor) -> Tensor:
    """`[b, heads, c, d]` as hidden states `[c, b, heads*d]`."""
    return attended.permute(2, 0, 1, 3).flatten(2)


def commit(attention: InfiniAttention, memory: State | None, cache: SegmentCache, lanes: Tensor) -> State | None:
    """Write the full segment of some lanes to the memory.

    Args:
        memory: as it was when the segment began, all lanes.
        cache: full in `lanes`.
        lanes: int64, the lanes that have filled their segment.

    Returns:
        The memory after the segment; the other lanes are as before.
    """
    memory, context = split_state(memory)
    if context is not None:
        last = (cache.key[lanes], cache.value[lanes], torch.ones_like(context.local_seen[lanes]))
        context = map_state(context, lambda old, new: old.index_copy(0, lanes, new.to(old.dtype)), last)
    if attention.rule is None:
        return context
    q, k, v, gate, inputs = (
        x[lanes].unsqueeze(1) for x in (cache.query, cache.key, cache.value, cache.gate, cache.inputs)
    )
    gate = None if attention.memory_config.write_gate == "none" else gate
    widths = _inputs(attention)
    inputs = dict(zip(widths, inputs.split(list(widths.values()), dim=-1), strict=True))
    q = q.unflatten(2, (attention.groups, -1))
    tokens = Tokens(q, k, v, gate, inputs, bfloat16=q.dtype == torch.bfloat16)
    carried = map_state(memory, lambda x: x[lanes])
    reset = torch.zeros(len(lanes), 1, dtype=torch.bool, device=lanes.device)
    _, after = attention.rule.scan(tokens, rule_weights(attention), carried, Borders(reset))
    memory = map_state(memory, lambda x, new: x.index_copy(0, lanes, new), after)
    return join_state(memory, context)
