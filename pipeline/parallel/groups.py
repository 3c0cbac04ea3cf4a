"""Megatron's process groups and ours, made at a price that does not grow with the number of processes.

Every process must call `new_group` for every group of the world, since PyTorch names groups by counting them; Megatron
does so for a dozen kinds of groups, tens of thousands of times at 8,192 processes. Here all but a process's own groups
are counted and not made.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch.distributed as dist

from model.megatron import parallel_state

_ORDER = "tp-cp-ep-dp-pp"
"""Megatron's order of ranks, the fastest axis first."""
WIDEST_AXIS = 32
"""Hosts that reduce numbers around one ring."""


def make_model_parallel(*, tensor: int, pipeline: int, context: int = 1, timeout_s: float) -> None:
    """Make Megatron's groups, of this process alone; those of an earlier layout are forgotten. Not collective."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    with _own_groups_only():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            context_parallel_size=context,
            distributed_timeout_minutes=timeout_s / 60,
            order=_ORDER,
            # Nobody uses them: what hosts say to one another goes through the groups' own gloo.
            create_gloo_process_groups=False,
        )


def pipeline_group(timeout_s: float) -> dist.ProcessGroup:
    """A fresh group of this process's pipeline stages, beside Megatron's. All processes ask for it at the same time."""
    tensor, context, pipeline = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    data = dist.get_world_size() // (tensor * context * pipeline)
    grid = parallel_state.RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=context, order=_ORDER)
    timeout = datetime.timedelta(seconds=timeout_s)
    with _own_groups_only():
        made = [dist.new_group(ranks, timeout=timeout) for ranks in grid.get_ranks("pp")]
    return next(group for group in made if isinstance(group, dist.ProcessGroup))


def host_axes(world_size: int) -> list[int]:
    """Sizes of a grid of so many processes: at most `WIDEST_AXIS` each, where the number has such divisors."""
    axes, rest = [], world_size
    while rest > WIDEST_AXIS:
        axes.append(next((size for size in range(WIDEST_AXIS, 1, -1) if rest % size == 0), rest))
        rest //= axes[-1]
    return [*axes, rest] if rest > 1 or not axes else axes


def host_groups(timeout_s: float) -> list[dist.ProcessGroup | None]:
    """Groups of hosts that make a reduction over all processes when it is done in one after the other.

    gloo reduces around a ring, in 2 (n - 1) hops that wait for one another: 16,382 at 8,192 processes, and 138 in a
    grid of 32 x 32 x 8. None stands for all processes, where they are few.
    """
    axes, stride = host_axes(dist.get_world_size()), 1
    if len(axes) == 1:
        return [None]
    made = []
    with _own_groups_only():
        for size in axes:
            for first in range(dist.get_world_size()):
                if first // stride % size == 0:
                    ranks = list(range(first, first + size * stride, stride))
                    made.append(dist.new_group(ranks, datetime.timedelta(seconds=timeout_s), "gloo"))
            stride *= size
    return [group for group in made if isinstance(group, dist.ProcessGroup)]


@contextmanager
def _own_groups_only() -> Iterator[None]:
    """Inside, `new_group` makes groups that this process is in, and counts the others."""
    make, rank, world = dist.new_group, dist.get_rank(), dist.distributed_c10d._world

    def make_own(ranks: list[int] | None = None, *args, **kwargs) -> dist.ProcessGroup | object:
        if ranks is None or rank in ranks:
            return make(ranks, *args, **kwargs)
        world.group_count += 1  # the next group's name on all processes
        return dist.GroupMember.NON_GROUP_MEMBER

    with mock.patch.object(dist, "new_group", make_own):
        yield
