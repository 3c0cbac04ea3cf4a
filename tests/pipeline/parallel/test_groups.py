"""Process groups cost a process what it is in, not what there is."""

from __future__ import annotations

from unittest import mock

import pytest
import torch.distributed as dist

from pipeline.accounting.planner import pretended_rank
from pipeline.parallel.groups import host_axes, pipeline_group
from pipeline.parallel.topology import place_in_grid

LAYOUTS = ((16, 4, 2), (8192, 8, 4))
"""Processes, tensor, pipeline."""


def make_all(rank: int, world: int, tensor: int, pipeline: int) -> tuple[list[list[int]], list[str]]:
    """Members of every group that a process makes, in order, and the groups' names."""
    made: list[list[int]] = []
    make = dist.new_group

    def counting(ranks, *args, **kwargs):
        made.append(list(ranks))
        return make(ranks, *args, **kwargs)

    with mock.patch.object(dist, "new_group", counting), pretended_rank(rank, world, tensor=tensor, pipeline=pipeline):
        topology = place_in_grid("cpu", lambda: pipeline_group(60.0))
        names = [
            group.group_name for group in (topology.forward_group, topology.backward_group, topology.replica_group)
        ]
        names.append(str(dist.distributed_c10d._world.group_count))
    return made, names


@pytest.mark.parametrize(("world", "tensor", "pipeline"), LAYOUTS)
def test_a_process_makes_its_own_groups_alone(world, tensor, pipeline):
    """A dozen or two, whatever the size of the world."""
    rank = world - 3
    made, _ = make_all(rank, world, tensor, pipeline)
    assert all(rank in members for members in made)
    assert len(made) <= 20
    stages = [rank % (world // pipeline) + stage * world // pipeline for stage in range(pipeline)]
    assert made[-2:] == [stages, stages]


def test_processes_give_a_group_the_same_name():
    """PyTorch counts groups to name them: a process that leaves some out must count those as well."""
    (_, first), (_, same), (_, other) = (make_all(rank, 16, 2, 4) for rank in (1, 13, 2))  # 1 and 13 share the stages
    assert first[:2] == same[:2] and first[2] != same[2]
    assert not set(first[:3]) & set(other[:3])
    assert first[3] == same[3] == other[3]


@pytest.mark.parametrize(
    ("world", "axes", "hops"),
    [(1, [1], 0), (32, [32], 62), (8192, [32, 32, 8], 138), (8184, [31, 24, 11], 126), (74, [2, 37], 74)],
)
def test_hosts_reduce_in_a_grid(world, axes, hops):
    assert sorted(host_axes(world)) == sorted(axes)
    assert sum(2 * (size - 1) for size in host_axes(world)) == hops
