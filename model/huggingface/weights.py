"""The same weights under Hugging Face's names and under ours, tensor by tensor, in both directions.

What differs is how matrices are put together. Ours has one `qkv` matrix with a block of rows per key/value head (its
query heads, its key, its value), so that a tensor-parallel rank's part is a plain slice; Hugging Face has one matrix
each. Our `linear_fc1` is [gate; up]. Our embedding may have rows that only pad it. What Hugging Face has no name for,
the memory's parameters, goes by `model.layers.N.self_attn.memory.` and our own name.

Nothing here reads or writes a file: whoever does passes whole tensors, one parameter at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import ModelConfig, layer_shape
from model.sharding import padded_vocab_size

Shape = tuple[int, ...]

_MEMORY = re.compile(r"layers\.(\d+)\.attention\.(.+)")


class Weight(NamedTuple):
    """One parameter of ours and the Hugging Face tensors that it is made of."""

    hf_names: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]
    shape: Shape
    """Of ours, whole."""
    from_hf: Callable[[Sequence[Tensor]], Tensor]
    """Ours from theirs, in the order of `hf_names`."""
    to_hf: Callable[[Tensor], list[Tensor]]
    """Theirs from ours."""


def backbone_weights(config: ModelConfig, vocab_size: int) -> dict[str, Weight]:
    """Every parameter of the plain model (without the memory's own), by our global name, in the order of the model.

    Args:
        config: the model.
        vocab_size: tokens, without padding: rows of Hugging Face's embedding.
    """
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    _, heads, groups, dim = layer_shape(config)
    padded = padded_vocab_size(vocab_size, config.vocab_size_multiple)

    def vocabulary(hf_name: str) -> Weight:
        return Weight((hf_name,), ((vocab_size, hidden),), (padded, hidden), _pad(padded), _cut(vocab_size))

    def projections(prefix: str, kind: str, *trailing: int) -> Weight:
        sizes = (heads * dim, groups * dim, groups * dim)
        return Weight(
            tuple(f"{prefix}.self_attn.{name}_proj.{kind}" for name in "qkv"),
            tuple((size, *trailing) for size in sizes),
            (sum(sizes), *trailing),
            lambda parts: join_qkv(*parts, groups=groups, dim=dim),
            lambda whole: list(split_qkv(whole, heads=heads, groups=groups, dim=dim)),
        )

    weights = {"embedding.weight": vocabulary("model.embed_tokens.weight")}
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        weights[f"{ours}.attention_norm.weight"] = _same(f"{theirs}.input_layernorm.weight", hidden)
        weights[f"{ours}.attention.qkv.weight"] = projections(theirs, "weight", hidden)
        if config.qkv_bias:
            weights[f"{ours}.attention.qkv.bias"] = projections(theirs, "bias")
        if config.qk_norm:
            weights[f"{ours}.attention.query_norm.weight"] = _same(f"{theirs}.self_attn.q_norm.weight", dim)
            weights[f"{ours}.attention.key_norm.weight"] = _same(f"{theirs}.self_attn.k_norm.weight", dim)
        weights[f"{ours}.attention.projection.weight"] = _same(f"{theirs}.self_attn.o_proj.weight", hidden, heads * dim)
        weights[f"{ours}.mlp_norm.weight"] = _same(f"{theirs}.post_attention_layernorm.weight", hidden)
        weights[f"{ours}.mlp.linear_fc1.weight"] = Weight(
            (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight"),
            ((ffn, hidden), (ffn, hidden)),
            (2 * ffn, hidden),
            torch.cat,
            lambda whole: list(whole.chunk(2)),
        )
        weights[f"{ours}.mlp.linear_fc2.weight"] = _same(f"{theirs}.mlp.down_proj.weight", hidden, ffn)
    weights["final_norm.weight"] = _same("model.norm.weight", hidden)
    if not config.tie_embeddings:
        weights["output.weight"] = vocabulary("lm_head.weight")
    return weights


def backbone_names(config: ModelConfig) -> set[str]:
    """Global names of the plain model's parameters; whatever else a stage has belongs to the memory."""
    return set(backbone_weights(config, vocab_size=1))


def memory_weight(name: str, shape: Sequence[int]) -> Weight:
    """A parameter that only this model has, by our global name and whole shape.

    Raises:
        ValueError: it is not a parameter of an attention layer.
    """
    if not (match := _MEMORY.fullmatch(name)):
        raise ValueError(f"{name} is not a parameter of the memory, and Hugging Face has none like it")
    return _same(f"model.layers.{match[1]}.self_attn.memory.{match[2].removeprefix('memory_')}", *shape)


def join_qkv(query: Tensor, key: Tensor, value: Tensor, *, groups: int, dim: int) -> Tensor:
    """`[heads dim, ...]` and twice `[groups dim, ...]` to `[(heads + 2 groups) dim, ...]`, by key/value head."""
    blocks = [x.unflatten(0, (groups, -1, dim)) for x in (query, key, value)]
    return torch.cat(blocks, dim=1).flatten(0, 2)


def split_qkv(whole: Tensor, *, heads: int, groups: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `join_qkv`."""
    ratio = heads // groups
    query, key, value = whole.unflatten(0, (groups, ratio + 2, dim)).split((ratio, 1, 1), dim=1)
    return query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2)


def _same(hf_name: str, *shape: int) -> Weight:
    return Weight((hf_name,), (shape,), shape, lambda parts: parts[0], lambda whole: [whole])


def _pad(rows: int) -> Callable[[Sequence[Tensor]], Tensor]:
    """Zeros behind the tokens' rows; padding has no probability, so they never move by a gradient."""

    def pad(parts: Sequence[Tensor]) -> Tensor:
        (part,) = parts
        if part.shape[0] == rows:
            return part
        return torch.cat([part, part.new_zeros(rows - part.shape[0], *part.shape[1:])])

    return pad


def _cut(rows: int) -> Callable[[Tensor], list[Tensor]]:
    return lambda whole: [whole[:rows]]
