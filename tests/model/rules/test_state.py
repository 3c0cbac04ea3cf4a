"""What is done to states, layer by layer and lane by lane, with numbers that a reader can follow."""

import torch

from model.rules import NormalizedState
from model.rules.state import (
    LocalContext,
    MatrixState,
    clear_lanes,
    join_lanes,
    join_state,
    map_memory,
    map_named,
    named_tensors,
    put_lanes,
    roll_lanes,
    spread_lanes,
    take_lanes,
)


def numbered(*numbers):
    """A memory of three layers, one of which carries nothing; every number of a lane is the lane's."""
    lanes = torch.tensor(numbers, dtype=torch.float64)
    normalized = NormalizedState(*(lanes.view(-1, *ones).clone() for ones in ((1, 1, 1), (1, 1))))
    context = LocalContext(*(lanes.view(-1, *ones).clone() for ones in ((1, 1, 1), (1, 1, 1), (1, 1))))
    return [normalized, None, join_state(MatrixState(lanes.view(-1, 1, 1, 1).clone()), context)]


def same(found, expected):
    assert [type(state) for state in found] == [type(state) for state in expected]
    for (name, x), (_, y) in zip(named_tensors("abc", found), named_tensors("abc", expected), strict=True):
        assert torch.equal(x, y), name
    return True


def test_lanes_are_taken_put_and_joined():
    memory = numbered(1, 2, 3)
    assert same(take_lanes(memory, torch.tensor([2, 0, 2])), numbered(3, 1, 3))
    assert same(take_lanes(memory, slice(1, 3)), numbered(2, 3))
    assert same(put_lanes(memory, torch.tensor([2, 0]), numbered(7, 8)), numbered(8, 2, 7))
    assert same(join_lanes([numbered(1), numbered(2, 3)]), memory)
    assert same(spread_lanes(numbered(5), 3), numbered(5, 5, 5))
    assert same(memory, numbered(1, 2, 3))  # none of this in place


def test_a_cleared_lane_is_zero_whatever_it_held():
    memory = numbered(1, float("inf"), float("nan"), 4)
    assert same(clear_lanes(memory, torch.tensor([True, False, False, True])), numbered(1, 0, 0, 4))


def test_rolled_lanes_keep_their_context_or_not():
    assert same(roll_lanes(numbered(1, 2, 3), with_context=True), numbered(2, 3, 1))
    rolled = roll_lanes(numbered(1, 2, 3), with_context=False)
    assert [x.flatten().tolist() for x in rolled[0]] == [[2, 3, 1]] * 2
    assert [x.flatten().tolist() for x in rolled[2]] == [[2, 3, 1], *[[1, 2, 3]] * 3]


def test_names_are_those_of_files():
    memory, seen = numbered(1), []
    names = ["memory/4/M", "memory/4/z", *(f"memory/6/{x}" for x in ("M", "local_key", "local_value", "local_seen"))]
    assert [name for name, _ in named_tensors("456", memory)] == names

    def double(name, x):
        seen.append(name)
        return 2 * x

    assert same(map_named("456", memory, double), numbered(2)) and seen == names
    assert same(map_memory(memory, torch.add, numbered(3)), numbered(4))
