"""Context parallelism: the segments of a chunk spread over C ranks, and what crosses between them.

Rank c of a context group owns the c-th of C equal parts of every chunk, t consecutive segments. A part does to a state
what a segment does, X -> T X + W (`model.rules.scan`). So ranks exchange pairs (T, W), `[d, e + d]` per head however
long the text: one all-gather, after which every rank applies all C pairs in order. It finds the state that its own part
starts with, and the one that the chunk ends with. The states that are carried between chunks and steps are hence the
same on all ranks, to the last bit.

The backward pass is the mirror image. With G_c the gradient of the state that part c starts with, as rank c's own loss
has it, and H_c that of the state that part c leaves behind, from the last rank to the first:

    H_{C-1} = d(end),   H_{c-1} = G_c + T_c^T H_c (G_c alone where part c holds a reset),   d(initial) = H_{-1}

One all-gather brings (G_c, T_c): keeping the C transitions from the forward pass would cost C states per layer. d(end)
comes in and d(initial) goes out whole, on every rank; gradients of parameters are of the rank's own tokens, and are to
be summed over the ranks.

What stands right before a part (a segment of keys and values, a few tokens for the convolutions) is the left
neighbour's, and comes by a shift around the ring. What the first rank gets from the last one is what the chunk leaves
behind: the first rank's copy of such a state is the one that counts, the others hand theirs on unread.

Every rank of a group calls everything here equally often and in the same order, backward passes included.

Shapes: b lanes, C ranks, t segments of a part, n key/value heads of this rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class ContextGroup(NamedTuple):
    """The ranks that share the segments of every chunk, and this one's place among them."""

    group: dist.ProcessGroup
    rank: int
    size: int


class ContextPart(NamedTuple):
    """This rank's part of a chunk, as the scans need it."""

    context: ContextGroup
    cleared: Tensor
    """Bool `[b, C]`: a document starts in the rank's part, so nothing from before it reaches what is behind it."""


def own_part(context: ContextGroup | None, clears: Tensor, chunk: Tensor) -> tuple[ContextPart | None, Tensor]:
    """This rank's part of a chunk, and what belongs to it of something that goes by segment.

    Args:
        clears: of the whole chunk, bool `[b, C t]`: nothing from before the segment goes on behind it.
        chunk: of the whole chunk `[b, C t, ...]`, on every rank.

    Returns:
        The part, None where one process has all segments, and `[b, t, ...]`.
    """
    if context is None:
        return None, chunk
    cleared = clears.unflatten(1, (context.size, -1)).any(dim=-1)
    return ContextPart(context, cleared), chunk.unflatten(1, (context.size, -1))[:, context.rank]


def over_states(of_segments: Tensor, state: Tensor) -> Tensor:
    """`[b, t]` as `[t, b, 1, ...]`, which broadcasts over the states `[t, b, n, ...]`."""
    return of_segments.t().reshape(*reversed(of_segments.shape), *(1,) * (state.dim() - 1))


def pass_on(initial: Tensor, own: Tensor, part: ContextPart) -> tuple[Tensor, Tensor]:
    """The state that this rank's part starts with, and the one that the chunk ends with.

    Args:
        initial: what the chunk starts with, `[b, n, d, e]`; `[b, n, ...]` where nothing is taken off.
        own: the pair of this rank's part, W in front of T, `[b, n, d, e + d]`; without T where nothing is taken off.
    """
    columns, start, state = initial.shape[-1], None, initial
    for rank, (pair, cleared) in enumerate(zip(_gather(own, part), over_states(part.cleared, initial), strict=True)):
        start = state if rank == part.context.rank else start
        # Not a product with 0: what is cleared may have overflowed.
        state = state.masked_fill(cleared, 0)
        write, transition = pair[..., :columns], pair[..., columns:]
        state = write + (transition @ state if transition.shape[-1] else state)
    return start, state


def pass_back(of_start: Tensor, transition: Tensor | None, of_end: Tensor, part: ContextPart) -> tuple[Tensor, Tensor]:
    """The gradients of the state that this rank's part leaves behind and of the one that the chunk starts with.

    Args:
        of_start: gradient of the state that this rank's part starts with, of what the part itself does with it.
        transition: T of this rank's part, `[b, n, d, d]`; None where nothing is taken off.
        of_end: gradient of the state that the chunk ends with, the same on all ranks.
    """
    columns, own, gradient = of_start.shape[-1], None, of_end
    sent = of_start if transition is None else torch.cat([of_start, transition], dim=-1)
    parts = zip(_gather(sent, part), over_states(part.cleared, of_start), strict=True)
    for rank, (found, cleared) in reversed(list(enumerate(parts))):
        own = gradient if rank == part.context.rank else own
        through = gradient if transition is None else found[..., columns:].mT @ gradient
        gradient = found[..., :columns] + through.masked_fill(cleared, 0)
    return own, gradient


def shift(own: Tensor, carried: Tensor, context: ContextGroup) -> tuple[Tensor, Tensor]:
    """Pass what a part leaves behind to the rank of the next one, with a gradient back.

    The gradient of `before` decides that the backward pass is run, so every rank has to use it.

    Args:
        own: what this rank's part leaves behind.
        carried: what stands before the chunk; counts on the first rank. Same shape, any precision.

    Returns:
        What stands before this rank's part, in the precision of `own`, and what the chunk leaves behind, in that of
        `carried`; the latter counts on the first rank.
    """
    return _Shift.apply(own, carried, context)


class _Shift(Function):
    @staticmethod
    def forward(ctx, own: Tensor, carried: Tensor, context: ContextGroup) -> tuple[Tensor, Tensor]:
        ctx.context, ctx.dtypes = context, (own.dtype, carried.dtype)
        before, after = pass_around(own, carried, context)
        return before.to(own.dtype, copy=before is carried), after.to(carried.dtype, copy=after is carried)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_before: Tensor, of_after: Tensor):
        own_dtype, carried_dtype = ctx.dtypes
        of_own, of_carried = pass_around_back(of_before, of_after, own_dtype, ctx.context)
        return of_own, of_carried.to(carried_dtype), None


def pass_around(own: Tensor, carried: Tensor, context: ContextGroup) -> tuple[Tensor, Tensor]:
    """What `shift` gives, without a graph and as it came: one of the two is `carried` itself."""
    received = send_around(own, context)
    return (carried, received) if context.rank == 0 else (received, carried)


def pass_around_back(
    of_before: Tensor, of_after: Tensor, dtype: torch.dtype, context: ContextGroup
) -> tuple[Tensor, Tensor]:
    """The gradients of `own`, which is sent in `dtype`, and `carried` from those of what `pass_around` gave."""
    of_own, of_carried = (of_after, of_before) if context.rank == 0 else (of_before, of_after)
    return send_around(of_own.to(dtype), context, back=True), of_carried


def send_around(x: Tensor, context: ContextGroup, *, back: bool = False) -> Tensor:
    """Send to the next rank of the ring and receive from the one before; `back`: the other way round."""
    x, step = x.contiguous(), -1 if back else 1
    received = torch.empty_like(x)
    target, source = ((context.rank + by) % context.size for by in (step, -step))
    transfers = [
        dist.P2POp(dist.isend, x, group=context.group, group_peer=target),
        dist.P2POp(dist.irecv, received, group=context.group, group_peer=source),
    ]
    for work in dist.batch_isend_irecv(transfers):
        work.wait()
    return received


def _gather(x: Tensor, part: ContextPart) -> Tensor:
    """`[C, ...]` of every rank's tensor."""
    found = x.new_empty(part.context.size, *x.shape)
    # Gloo wants the ranks' tensors behind one another, not in a dim of their own.
    dist.all_gather_into_tensor(found.flatten(0, 1), x.contiguous(), group=part.context.group)
    return found
