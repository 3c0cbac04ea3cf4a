"""Tensor-parallel parts: cutting and joining are inverse, and the gated MLP's two halves are each cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.sharding import Partition, full_shape, piece_bounds, shard, unshard


@given(size=st.sampled_from([1, 2, 4]), dim=st.sampled_from([None, 0, 1]), stride=st.sampled_from([1, 2]))
def test_cutting_and_joining_are_inverse(size, dim, stride):
    full = torch.arange(16 * 8).view(16, 8)
    partition = Partition(dim, stride)
    parts = [shard(full, partition, rank, size) for rank in range(size)]
    assert torch.equal(unshard(parts, partition), full)
    assert all(full_shape(part.shape, partition, size) == full.shape for part in parts)
    if dim is not None:
        assert sum(part.numel() for part in parts) == full.numel()


def test_each_half_of_the_gated_mlp_is_cut():
    """[gate; up]: a plain cut would give rank 0 all of the gate."""
    full = torch.arange(8).view(8, 1)
    partition = Partition(0, stride=2)
    assert [shard(full, partition, rank, 2).flatten().tolist() for rank in range(2)] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert piece_bounds((8, 1), partition, 1, 2) == [(2, 4), (6, 8)]


@pytest.mark.parametrize("partition", [Partition(0), Partition(1), Partition(0, stride=2)])
def test_parts_of_parts(partition):
    """Four ranks hold what two ranks hold, cut once more: what a change of layout relies on."""
    full = torch.arange(64).view(8, 8)
    for rank in range(4):
        coarse = [shard(full, partition, r, 2) for r in range(2)]
        assert torch.equal(shard(unshard(coarse, partition), partition, rank, 4), shard(full, partition, rank, 4))
