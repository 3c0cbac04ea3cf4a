"""Ranks in messages: `rank 3`, `ranks 0, 2 on n1, rank 5 on n2`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data.files import some

SHOWN = 8
"""Ranks, or nodes, in a message."""


def ranks_named(ranks: Sequence[int]) -> str:
    """By their numbers."""
    return f"rank{'s' * (len(ranks) > 1)} {some(map(str, ranks), SHOWN)}"


def ranks_on_hosts(hosts: Mapping[int, str]) -> str:
    """With their hosts, given for each of them."""
    places: dict[str, list[int]] = {}
    for rank, host in hosts.items():
        places.setdefault(host, []).append(rank)
    return some([f"{ranks_named(ranks)} on {host}" for host, ranks in places.items()], SHOWN)
