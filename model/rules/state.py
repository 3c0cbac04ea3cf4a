"""What a layer carries from segment to segment and from step to step: the types, and everything that is done to them.

A `State` is one layer's, a `Memory` that of all layers of a stage. In every tensor the first dim is the lane and the
second the key/value head of this rank: lanes are picked, cleared and exchanged here, and heads put together by whoever
saves them, without knowing which rule it is.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

State = tuple[Tensor, ...]
"""What a layer carries: a NamedTuple of tensors `[b, n, ...]`."""

Memory = list[State | None]
"""Per layer of a stage; None where a layer carries nothing."""


class MatrixState(NamedTuple):
    """State of a rule that carries a matrix and nothing else: M `[b, n, d, d]`."""

    M: Tensor


class LocalContext(NamedTuple):
    """The previous segment (see `model.layers.local_context`), keys without position encoding; both in the precision in
    which the products are computed."""

    local_key: Tensor
    """`[b, n, s, d]`."""
    local_value: Tensor
    """`[b, n, s, d]`."""
    local_seen: Tensor
    """`[b, n, 1]`, in the memory's precision: the part of the previous segment, from its end, that is of the same
    document: 1 or 0 where documents do not share segments."""


@functools.cache
def extended_state(inner: type, fields: tuple[str, ...]) -> type:
    """The NamedTuple of the tensors of `inner` and of those that something around the rule carries beside them. Its
    attribute `inner` is `inner`."""
    extended = namedtuple(inner.__name__ + "".join(f"_{field}" for field in fields), inner._fields + fields)
    extended.inner = inner
    return extended


def join_state(memory: State | None, context: LocalContext | None) -> State | None:
    """A layer's state of what its memory and its local context carry."""
    if memory is None or context is None:
        return context if memory is None else memory
    return extended_state(type(memory), LocalContext._fields)(*memory, *context)


def split_state(state: State | None) -> tuple[State | None, LocalContext | None]:
    """The opposite of `join_state`."""
    own = len(LocalContext._fields)
    if state is None or state._fields[-own:] != LocalContext._fields:
        return state, None
    memory = getattr(state, "inner", None)
    return None if memory is None else memory(*state[:-own]), LocalContext(*state[-own:])


def map_state(state: State, function: Callable[..., Tensor], *others: State) -> State:
    """Apply `function` to every tensor of a state, and to the same tensors of others."""
    return type(state)(*(function(*tensors) for tensors in zip(state, *others, strict=True)))


def map_memory(memory: Memory, function: Callable[..., Tensor], *others: Memory) -> Memory:
    """Apply `function` to every tensor of a memory, and to the same tensors of others."""
    layers = zip(memory, *others, strict=True)
    return [None if state is None else map_state(state, function, *rest) for state, *rest in layers]


def named_tensors(layers: Iterable[str], memory: Memory) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the memory of `layers`, under the name that files have for it."""
    for layer, state in zip(layers, memory, strict=True):
        for field, tensor in ({} if state is None else state._asdict()).items():
            yield f"memory/{layer}/{field}", tensor


def map_named(layers: Iterable[str], memory: Memory, function: Callable[[str, Tensor], Tensor]) -> Memory:
    """Apply `function(name, tensor)` to every tensor of the memory of `layers`, with the names of `named_tensors`."""
    return [
        None if state is None else type(state)(*(function(*named) for named in named_tensors([layer], [state])))
        for layer, state in zip(layers, memory, strict=True)
    ]


def memory_tensors(memory: Memory) -> list[Tensor]:
    """Every tensor of a memory."""
    return [x for state in memory if state is not None for x in state]


def per_lane(choice: Tensor, like: Tensor) -> Tensor:
    """`[b]` so that it broadcasts over a state's tensor `like`."""
    return choice.to(like.device).view(-1, *(1,) * (like.dim() - 1))


def clear_lanes(memory: Memory, keep: Tensor) -> Memory:
    """The memory with the lanes emptied where `keep` (bool `[b]`) is False."""
    # Not a product with 0: what is cleared may have overflowed.
    return map_memory(memory, lambda x: x.where(per_lane(keep, x), 0))


def choose_lanes(condition: Tensor, then: Memory, otherwise: Memory) -> Memory:
    """Memory from `then` in lanes where `condition` (bool `[b]`) holds, else from `otherwise`."""
    return map_memory(then, lambda new, old: torch.where(per_lane(condition, new), new, old), otherwise)


def take_lanes(memory: Memory, lanes: Tensor | slice) -> Memory:
    """Some lanes; a lane may be taken more than once."""
    return map_memory(memory, lambda x: x[lanes])


def put_lanes(memory: Memory, lanes: Tensor, new: Memory) -> Memory:
    """The memory with `lanes` (int64) replaced by those of `new`, in order."""
    return map_memory(memory, lambda old, new: old.index_copy(0, lanes, new), new)


def join_lanes(parts: Sequence[Memory]) -> Memory:
    """Put memories of consecutive lanes together."""
    first, *others = parts
    return map_memory(first, lambda *tensors: torch.cat(tensors), *others)


def spread_lanes(memory: Memory, lanes: int) -> Memory:
    """The memory of one lane in each of `lanes`."""
    return map_memory(memory, lambda x: x.expand(lanes, *x.shape[1:]))


def roll_lanes(memory: Memory, *, with_context: bool) -> Memory:
    """Give every lane what the next one carries, the last that of the first; without its context, a lane's local
    context stays its own."""
    rolled = map_memory(memory, lambda x: x.roll(-1, dims=0))
    return rolled if with_context else beside_context(rolled, memory)


def beside_context(memory: Memory, own: Memory) -> Memory:
    """What `memory` remembers, beside the local contexts of `own`."""
    return [join_state(split_state(new)[0], split_state(old)[1]) for new, old in zip(memory, own, strict=True)]
