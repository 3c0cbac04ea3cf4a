"""The local attention where documents share segments (`data.packing`), of a `DocumentMask`: by pieces where the host
knows them, under a mask elsewhere, or by FlexAttention (`model.packed_attention`).

Shapes: B segments and probes, n key/value heads of this rank, r query heads per key/value head, s tokens of a segment,
d head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.device import host_knows
from model.layers.packing import DocumentMask, Piece
from model.layers.sdpa import attention_kernel, masked_attention_kernel, masked_in_words


def packed_attention(query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask) -> Tensor:
    """Attention of every token to what it sees of its own document, `[B*n, r, s, d]`.

    Args:
        query: `[B*n, r, s, d]`.
        key, value: `[B*n, 1, s, d]`, with a sliding context `[B*n, 1, 2s, d]`, the segment before first.
    """
    if mask.blocks is not None:
        return mask.blocks.attend(query, key, value, mask.blocks.mask)
    return _by_pieces(query, key, value, mask) if mask.bias is None else _masked(query, key, value, mask.bias)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention `[..., r, q, d]` of q tokens to k >= q keys, the last query to all of them, the one before it to all
    but the last key: of keys and values `[..., 1, k, d]`."""
    from torch.nn.attention.bias import causal_lower_right  # loads PyTorch's compiler, which few runs need

    length, keys, shared = query.shape[-2], key.shape[-2], query.shape[1] > 1
    with attention_kernel(query):
        if keys == length:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=shared)
        bias = causal_lower_right(length, keys)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=shared)


def kept_apart_in_words(device: torch.device, dtype: torch.dtype, asked: str) -> str:
    """How documents are kept apart, for the start of a run: with `model.packed_attention` as `asked`."""
    if asked == "flex":
        return "kept apart by FlexAttention, asked for; compiled in the first step"
    if host_knows(device):
        return "each attended to by itself"
    return f"kept apart by a mask: {masked_in_words(device.type, dtype)}"


def _by_pieces(query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask) -> Tensor:
    """Every piece by itself, in neighbouring segments that are cut alike at once. A mask would have the kernel compute
    what it hides, the half as well that it leaves out of causal attention.

    Tensors are split, not sliced: the gradient of a slice is a tensor as large as what it is taken from.
    """
    n = query.shape[0] // sum(run.segments for run in mask.runs)
    rows = [run.segments * n for run in mask.runs]
    parts = zip(mask.runs, *(x.split(rows) for x in (query, key, value)), strict=True)
    return torch.cat([_run_of_segments(run.pieces, *heads) for run, *heads in parts])


def _run_of_segments(pieces: tuple[Piece, ...], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`_by_pieces` of segments that are cut alike."""
    lengths = [piece.length for piece in pieces]
    keys = [pieces[0].before + lengths[0], *lengths[1:]]
    unseen = key.shape[2] - sum(keys)
    key, value = (x.split([unseen, *keys], dim=2)[1:] for x in (key, value))
    found = [causal_attention(*heads) for heads in zip(query.split(lengths, dim=2), key, value, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)


def _masked(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention of all segments under a `DocumentMask.bias`.

    One call per key/value head, whose query heads then share a mask without a copy: kernels want four dims, and one
    that varies over B alone would have to be repeated for n heads. Fused kernels that take a mask want equally many
    heads of keys, which an expanded view is.
    """
    heads = (x.unflatten(0, (bias.shape[0], -1)).unbind(1) for x in (query, key, value))
    found = []
    for q, k, v in zip(*heads, strict=True):
        with masked_attention_kernel(q):
            k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
            found.append(F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
    return torch.stack(found, dim=1).flatten(0, 1)
