"""Contestants that take turns: their order, and what is made of their times, by hand."""

from __future__ import annotations

import pytest

from pipeline.benchmarks.alternating import Clocked, order_of_round, run_rounds, spread


def test_nobody_always_follows_the_same():
    names = ["a", "b", "c", "d"]
    before = {name: set() for name in names}
    for number in range(8):
        order = order_of_round(names, number)
        assert sorted(order) == names
        for first, second in zip(order, order[1:], strict=False):
            before[second].add(first)
    assert all(len(others) >= 2 for others in before.values())


def test_every_round_runs_all_and_the_warm_up_is_not_counted():
    ran = []
    told = []
    contestants = {name: lambda name=name: ran.append(name) for name in "abc"}
    clocked = run_rounds(contestants, 3, warm_up=2, report=lambda name, seconds: told.append(name))
    assert ran == told and len(ran) == 15
    assert [sorted(ran[i : i + 3]) for i in range(0, 15, 3)] == [["a", "b", "c"]] * 5
    assert all(len(clock.wall_s) == len(clock.cpu_s) == 3 for clock in clocked.values())


def test_ratios_are_taken_inside_the_rounds():
    # The second round was twice as slow for both: a ratio of medians would not see that they are in step.
    fast, slow = Clocked([1.0, 2.0, 1.0], [1.0, 1.0, 1.0]), Clocked([1.5, 3.0, 1.5], [1.5, 1.5, 1.5])
    assert fast.times_as_fast_as(slow) == spread([1.5, 1.5, 1.5])
    assert slow.times_as_fast_as(fast).median == pytest.approx(2 / 3)
    assert fast.rates(100).median == 100
    assert fast.processors == 0.75


def test_spread():
    assert spread([3.0]) == (3.0, 3.0, 3.0, 1)
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0, 5)
