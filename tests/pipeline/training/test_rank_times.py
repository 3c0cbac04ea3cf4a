"""Who holds the others up: ranks are compared with those that have the same work, and named once."""

from __future__ import annotations

import pytest

from pipeline.training.rank_times import PATIENCE, Slowest, StragglerWatch, find_slowest, slots


def test_places_of_all_ranks_come_together():
    """As the reduction does it: the largest at every place."""
    lists = [slots(rank, 3, own, data) for rank, own, data in ((0, 1.0, 0.1), (1, 2.0, 0.2), (2, 0.0, 0.0))]
    assert [max(place) for place in zip(*lists, strict=True)] == [1.0, 0.1, 2.0, 0.2, 0.0, 0.0]


@pytest.mark.parametrize(
    ("own_s", "stages", "rank", "others"),
    [
        ([1.0, 1.0, 1.5, 1.1], 1, 2, 1.0),
        ([1.0, 3.0], 1, 1, 1.0),
        # Stages have different work: 4 and 5 are as slow as their stage, 1 is not.
        ([1.0, 1.4, 5.0, 5.1], 2, 1, 1.0),
        ([1.0, 1.0, 5.0, 5.1], 2, 3, 5.0),
    ],
)
def test_the_slowest_beside_its_stage(own_s, stages, rank, others):
    found = find_slowest(own_s, [0.25 * seconds for seconds in own_s], stages)
    assert (found.rank, found.own_s, found.data_s) == (rank, own_s[rank], 0.25 * own_s[rank])
    assert found.others_s == pytest.approx(others) and found.slowdown == pytest.approx(own_s[rank] / others)


def test_a_stage_of_one_rank_has_nobody_to_compare_with():
    assert find_slowest([1.0, 9.0], [0.0, 0.0], 2) is None


def watch(*slowdowns, rank=1, tensor_size=1):
    watched = StragglerWatch(1.25, ["a", "b", "c", "d"], tensor_size)
    return [watched.after_interval(Slowest(rank, slowdown, 0.5, 1.0)) for slowdown in slowdowns]


def test_a_slow_rank_is_named_once_with_its_host():
    said = watch(*[1.5] * (PATIENCE + 2))
    assert said[: PATIENCE - 1] == [None] * (PATIENCE - 1) and said[PATIENCE:] == [None, None]
    assert said[PATIENCE - 1].startswith(
        "RANK 1 ON b IS SLOW: it works 1.5 s a step (0.5 s of that it waits for data), "
    )
    assert "1.50 times the median of the other ranks of its stage (1 s)" in said[PATIENCE - 1]


def test_a_hiccup_is_not_told_and_a_recovery_is():
    assert watch(1.5, 1.0, 1.5, 1.2) == [None] * 4
    said = watch(*[1.5] * PATIENCE, 1.1, 1.1)
    assert said[PATIENCE:] == ["rank 1 on b keeps up again", None]


def test_a_tensor_parallel_group_is_slow_as_a_whole():
    said = watch(*[2.0] * PATIENCE, rank=3, tensor_size=2)
    assert said[-1].startswith("RANK 3 ON d IS SLOW (or another of ranks 2 to 3): ")
