"""Which link is slow, from numbers; tests/distributed and tests/cluster pass real messages."""

from __future__ import annotations

import pytest

from pipeline.parallel.links import Speed, outliers, partner


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 8, 9])
def test_in_every_turn_nodes_are_in_pairs_and_in_all_turns_each_with_each(nodes):
    met = set()
    for turn in range(nodes - 1 + nodes % 2):
        partners = [partner(node, nodes, turn) for node in range(nodes)]
        assert partners.count(None) == nodes % 2
        for node, other in enumerate(partners):
            assert other is None or (other != node and partners[other] == node)
            met.add((node, other))
    assert met >= {(a, b) for a in range(nodes) for b in range(nodes) if a != b}


def test_who_is_slow_beside_the_others():
    usual = Speed(20e-6, 10e9)
    assert outliers([usual] * 4) == []
    assert outliers([usual, usual, Speed(25e-6, 4.9e9), usual]) == [2]
    assert outliers([usual, usual, Speed(25e-6, 5.1e9), usual]) == []
    assert outliers([Speed(1.1e-3, 10e9), usual, usual]) == [0]
    assert outliers([Speed(0.9e-3, 10e9), usual, usual]) == []  # within what a busy host does
    assert outliers([usual, usual]) == outliers([Speed(1.0, 1e3)] * 2) == []  # nobody to compare with
