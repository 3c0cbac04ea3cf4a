"""Cross entropy from hidden states, block by block: the output matrix, the softmax and the loss in one.

The logits are the largest tensor of a step. Here they exist for `BLOCK_ROWS` tokens at a time: product, maximum, sum
and the label's logit of a block, and then the next one. The backward pass makes a block's logits again (one more
product of the output matrix, beside its three), turns them into their own gradient in place, and adds the block's part
to the gradients of the hidden states and of the matrix. With `keep_logits` they stay instead, once and in the
precision of the product (2 bytes each in bfloat16), and the backward pass writes over them.

The vocabulary is split over the tensor-parallel ranks. Each finds its own maximum, sum and label; two reductions of a
few numbers per token put them together, whatever the number of blocks. What the softmax needs in float32 is made for
some rows at a time. Megatron's version, which gives the same numbers to the last bit, keeps the softmax in float32 and
holds it beside the logits on the way there and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.megatron import ColumnParallelLinear, mappings, parallel_state

BLOCK_ROWS = 2048
"""Tokens whose logits exist at once. A block's part is added to the matrix's whole gradient, which is read and written
for it: 4 FLOPs per row for each of its bytes, so that fewer rows would wait for the memory of an H100 (some 300 FLOPs
a byte)."""
WIDE_ELEMENTS = 2**22
"""Of the logits that are wide at once: 16 MiB in float32, at 128,256 tokens 32 rows."""


class OutputLosses(NamedTuple):
    token_loss: Tensor
    """Cross entropy `[s, b]`, in float32 at least."""
    token_correct: Tensor
    """Bool `[s, b]`: the label has the largest logit, i.e. greedy decoding would give it."""


class Passes(NamedTuple):
    """What computes with a block of logits in place of what is written here: `plain_sums` and `plain_gradient`,
    compiled. They keep nothing wide, so that a block is taken as a whole."""

    sums: Callable[..., Tensor]
    gradient: Callable[..., Tensor]


def plain_sums(logits: Tensor, maximum: Tensor) -> Tensor:
    """Of `[rows, vocabulary / tp]` the sums of exp(logit - maximum), `[rows]`, for the compiler."""
    return (logits - maximum.unsqueeze(-1)).exp().sum(dim=-1)


def plain_gradient(
    logits: Tensor, highest: Tensor, total: Tensor, index: Tensor, owned: Tensor, gradient: Tensor
) -> Tensor:
    """The gradient of the logits, in their precision, for the compiler."""
    softmax = (logits - highest.unsqueeze(-1)).exp() / total.unsqueeze(-1)
    column = torch.arange(logits.shape[-1], device=logits.device)
    label = (column == index.unsqueeze(-1)) & owned.unsqueeze(-1)
    return ((softmax - label.to(softmax.dtype)) * gradient.unsqueeze(-1)).to(logits.dtype)


class OutputMatrix(ColumnParallelLinear):
    """Megatron's output layer, which with labels goes on to the losses.

    Without labels it is what Megatron makes of it: logits `[s, b, vocabulary / tp]` and a bias that is None.
    """

    passes: Passes | None = None
    """What the compiler made, for passes with a graph."""
    mm: Callable[..., Tensor] = staticmethod(torch.mm)
    """What makes the products of the losses (`model.backend.matrix_product`)."""

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        known: int | None = None,
        keep_logits: bool = True,
    ) -> OutputLosses | tuple[Tensor, None]:
        """Losses of `labels`.

        Args:
            hidden: `[s, b, h]`, with sequence parallelism `[s/tp, b, h]`.
            weight: `[vocabulary / tp, h]` of a tied embedding, else the layer's own.
            labels: int64 `[s, b]`.
            known: columns of this rank that are tokens; the others only pad the matrix. Default: all.
            keep_logits: hold them for the backward pass, which then can run only once.
        """
        if labels is None:
            return super().forward(hidden, weight)
        weight = self.weight if weight is None else weight
        return OutputLosses(
            *_Losses.apply(
                hidden,
                weight,
                labels,
                weight.shape[0] if known is None else known,
                self.sequence_parallel,
                keep_logits and torch.is_grad_enabled(),
                self.passes if torch.is_grad_enabled() else None,
                self.mm,
            )
        )


def _group() -> dist.ProcessGroup:
    """The ranks that share the vocabulary."""
    return parallel_state.get_tensor_model_parallel_group()


def _blocks(rows: int, length: int) -> Iterator[slice]:
    return (slice(first, min(first + length, rows)) for first in range(0, rows, length))


def _narrow(logits: Tensor) -> Iterator[slice]:
    """Slices of rows that are small enough to be wide."""
    return _blocks(len(logits), max(1, WIDE_ELEMENTS // logits.shape[-1]))


def hide_padding(logits: Tensor, known: int) -> Tensor:
    """Logits `[..., vocabulary / tp]`, in place, with -inf behind the first `known` columns. Rows of the matrix that
    only pad it are no tokens: without them a model with another padding is the same model."""
    if known < logits.shape[-1]:
        logits[..., max(known, 0) :] = -torch.inf
    return logits


def _product(mm: Callable[..., Tensor], rows: Tensor, matrix: Tensor, known: int, out: Tensor | None = None) -> Tensor:
    """Logits of some rows."""
    return hide_padding(mm(rows, matrix.t(), out=out), known)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, known, sequence_parallel, keep, passes, mm):
        group = _group()
        wide = torch.promote_types(weight.dtype, torch.float32)
        rows = _rows(hidden, sequence_parallel)
        index = labels.flatten() - group.rank() * len(weight)
        owned = (index >= 0) & (index < len(weight))
        index = index.where(owned, 0)
        maximum, total, target = (rows.new_empty(len(rows), dtype=wide) for _ in range(3))
        kept = rows.new_empty(len(rows), len(weight)) if keep else None
        for block in _blocks(len(rows), BLOCK_ROWS):
            logits = _product(mm, rows[block], weight, known, kept if kept is None else kept[block])
            # A rank may hold nothing but padding: a maximum of -inf would make its empty sum NaN.
            maximum[block] = logits.amax(dim=-1).to(wide).clamp_(min=torch.finfo(wide).min)
            target[block] = logits.gather(-1, index[block].unsqueeze(-1)).squeeze(-1).to(wide)
            own, sums = maximum[block], total[block]
            if passes is not None:
                sums.copy_(passes.sums(logits, own))
            else:
                for part in _narrow(logits):
                    sums[part] = (logits[part] - own[part].unsqueeze(-1)).exp_().sum(dim=-1)
            del logits  # else it would live while the next one is made
        highest = maximum.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        both = torch.stack([total * (maximum - highest).exp_(), target.where(owned, 0)])
        total, target = mappings._reduce(both, group)
        losses, correct = total.log() - (target - highest), target >= highest
        ctx.save_for_backward(hidden, weight, index, owned, highest, total, kept)
        ctx.known, ctx.sequence_parallel, ctx.passes, ctx.mm = known, sequence_parallel, passes, mm
        ctx.mark_non_differentiable(correct)
        return losses.view(labels.shape), correct.view(labels.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, _):
        hidden, weight, index, owned, highest, total, kept = ctx.saved_tensors
        gradient = gradient.flatten()
        rows = _rows(hidden, ctx.sequence_parallel)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        of_rows, of_matrix = torch.empty_like(rows) if needs_hidden else None, None
        at = torch.arange(len(index), device=index.device)
        for block in _blocks(len(rows), BLOCK_ROWS):
            logits = _product(ctx.mm, rows[block], weight, ctx.known) if kept is None else kept[block]
            own_index, own_owned, own_highest = index[block], owned[block], highest[block]
            own_total, own_gradient = total[block], gradient[block]
            if ctx.passes is not None:
                logits = ctx.passes.gradient(logits, own_highest, own_total, own_index, own_owned, own_gradient)
            else:
                for part in _narrow(logits):
                    softmax = (logits[part] - own_highest[part].unsqueeze(-1)).exp_()
                    softmax /= own_total[part].unsqueeze(-1)
                    softmax[at[: len(softmax)], own_index[part]] -= own_owned[part].to(softmax.dtype)
                    logits[part] = softmax.mul_(own_gradient[part].unsqueeze(-1))
                    del softmax
            if needs_hidden:
                ctx.mm(logits, weight, out=of_rows[block])
            if needs_weight:
                of_matrix = _add_product(ctx.mm, of_matrix, logits, rows[block])
            del logits
        if needs_hidden:
            of_rows = of_rows.view(-1, *hidden.shape[1:])
            reduce = mappings._reduce_scatter_along_first_dim if ctx.sequence_parallel else mappings._reduce
            of_rows = reduce(of_rows, _group())
        return of_rows, of_matrix, None, None, None, None, None, None


def _rows(hidden: Tensor, sequence_parallel: bool) -> Tensor:
    """All tokens' hidden states, `[s * b, h]`."""
    return (mappings._gather_along_first_dim(hidden, _group()) if sequence_parallel else hidden).flatten(0, 1)


def _add_product(mm: Callable[..., Tensor], total: Tensor | None, gradient: Tensor, rows: Tensor) -> Tensor:
    """`total` and a block's part of the matrix's gradient; more than one part is summed in float32 at least."""
    if total is None:
        return mm(gradient.t(), rows)
    total = total.to(torch.promote_types(total.dtype, torch.float32))
    if gradient.dtype == total.dtype and mm is torch.mm:
        return total.addmm_(gradient.t(), rows)
    return total.add_(mm(gradient.t(), rows))
