"""Nodes whose links are measured before the first step; tests/cluster has a link that is slow in earnest."""

from __future__ import annotations

import re

import pytest

from tests.distributed import links_cases

pytestmark = pytest.mark.distributed

USUAL = r"links between \d nodes: [\d.]+ [GM]B/s, [\d,]+ us for a small message, the median of 4 processes"


def test_the_links_of_nodes_are_told_and_a_slow_one_is_named(pools):
    ranks = pools.run(4, links_cases.notes_of_nodes, local=1, tensor=2, slow=2)
    assert ranks[1:] == [[]] * 3
    usual, *slow = ranks[0]
    assert re.fullmatch(USUAL, usual) and usual.startswith("links between 4 nodes")
    (named,) = [note for note in slow if note.startswith("SLOW, the links between nodes: ")]
    assert "rank 2 on n2" in named and "ethtool" in named


def test_one_node_measures_nothing_and_two_have_nobody_to_compare_with(pools):
    assert pools.run(4, links_cases.notes_of_nodes, local=4, tensor=2) == [[]] * 4
    notes = pools.run(4, links_cases.notes_of_nodes, local=2, tensor=2)[0]
    assert re.fullmatch(USUAL, notes[0]) and notes[0].startswith("links between 2 nodes")
