"""How fast the nodes' links and the layout's groups are, measured before the first step: one that is slow is named.

A cable at a tenth of its speed, an adapter that has fallen back, a node that goes over the wrong network: nothing
fails, and every step waits. Here every process passes messages to and fro with one process of some other nodes at a
time, all pairs at once, as the groups do later; then every group sums. A link belongs to two nodes: a node's own speed
is that of its best one, for all links of a slow node are slow.
"""

from __future__ import annotations

import math
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from pipeline.parallel.first_contact import INTERFACE, FirstMessages
from pipeline.parallel.naming import ranks_on_hosts
from pipeline.parallel.topology import Topology

ROUNDS = 3
"""Other nodes that a node is measured with."""
SIZES = (8, 1 << 20, 1 << 24)
"""Bytes of a message: the first one is for the time that any message takes, the largest for the speed."""
TIMES = 3
"""Each is passed; the best counts."""
ENOUGH_S = 0.1
"""A message that takes longer is the largest."""
SLOW = 2.0
"""So many times slower than the median is slow."""
LATE, LATE_S = 5.0, 1e-3
"""So many times later than the median, and by so many seconds, is late."""
KEY = "infini/slow"


class Speed(NamedTuple):
    """Of a link, or of a group."""

    seconds: float = math.inf
    """Of a message of a few bytes, one way; of a sum."""
    bytes_per_s: float = 0.0


def link_notes(topology: Topology) -> list[str]:
    """Measure; what there is to say, on the main process. Collective. On one node nothing is measured.

    It takes some tenths of a second, and a few seconds on a slow network.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local == world:
        return []
    own_place = int(os.environ.get("LOCAL_RANK", "0"))
    as_many = float(local if rank % local == own_place else math.inf)
    most, minus_least = topology.all_reduce([as_many, -as_many], op=dist.ReduceOp.MAX)
    if most != -minus_least or not math.isfinite(most):
        return ["the links between nodes are not measured: ranks are not numbered node by node, as many on each"]
    store = dist.distributed_c10d._get_default_store()
    found: dict[str, Speed] = {}
    with FirstMessages(store, rank).within("the links between nodes", range(world)):
        found["the links between nodes"] = _measure_links(topology, rank // local, own_place, local)
    seen = set()
    for name, group in topology.named_groups().items():
        members = tuple(dist.get_process_group_ranks(group))
        if 1 < len(members) < world and members not in seen:  # else it has no like, or is another one's
            seen.add(members)
            with FirstMessages(store, rank).within(name, members):
                found[name] = _measure_group(group, topology.device)
    return _compare(topology, found, store, nodes=world // local)


def partner(node: int, nodes: int, turn: int) -> int | None:
    """Whom a node is measured with: in every turn all nodes in pairs, one of them alone where their number is odd; in
    `nodes - 1` turns (`nodes`, where odd) each with each."""
    odd = nodes - 1 + nodes % 2
    if node == odd:  # the last of an even number takes the one that would be alone
        return turn * (odd + 1) // 2 % odd
    other = (turn - node) % odd
    if other != node:
        return other
    return odd if odd < nodes else None


def _measure_links(topology: Topology, node: int, place: int, local: int) -> Speed:
    best = Speed()
    nodes = dist.get_world_size() // local
    for turn in range(min(ROUNDS, nodes - 1 + nodes % 2)):
        other = partner(node, nodes, turn)
        if other is not None:
            found = _pass_to_and_fro(topology.device, other * local + place, asks=node < other)
            best = Speed(min(best.seconds, found.seconds), max(best.bytes_per_s, found.bytes_per_s))
    return best


def _pass_to_and_fro(device: torch.device, peer: int, *, asks: bool) -> Speed:
    """The speed of the link to `peer`, as the one of both that `asks` has measured it."""
    buffer = torch.zeros(SIZES[-1] // 8, dtype=torch.float64, device=device)
    order = [_send, _receive] if asks else [_receive, _send]

    def there_and_back(size: int) -> None:
        for act in order:
            act(buffer[: size // 8], peer)

    speed = _ramp(there_and_back, lambda seconds: _agreed(seconds, device, peer, asks))
    return Speed(speed.seconds / 2, 2 * speed.bytes_per_s)


def _measure_group(group: dist.ProcessGroup, device: torch.device) -> Speed:
    """The time of a small sum over the group, and bytes per second of a large one."""
    buffer = torch.zeros(SIZES[-1] // 8, dtype=torch.float64, device=device)

    def add_up(size: int) -> None:
        dist.all_reduce(buffer[: size // 8], group=group)
        buffer[0].item()  # a device is behind its host

    def slowest(seconds: float) -> float:
        value = torch.tensor([seconds], dtype=torch.float64, device=device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
        return value.item()

    return _ramp(add_up, slowest)


def _ramp(act: Callable[[int], None], agree: Callable[[float], float]) -> Speed:
    """From small to large, as long as that is quick.

    Args:
        act: pass a message of so many bytes.
        agree: seconds, the same for all who take part.
    """
    first = seconds = math.inf
    for size in SIZES:
        best = math.inf
        for _ in range(TIMES):
            start = time.perf_counter()
            act(size)
            best = min(best, time.perf_counter() - start)
        seconds = agree(best)
        first = min(first, seconds) if size == SIZES[0] else first
        if seconds > ENOUGH_S:
            break
    return Speed(first, size / max(seconds, 1e-9))


def _agreed(seconds: float, device: torch.device, peer: int, asks: bool) -> float:
    value = torch.tensor([seconds], dtype=torch.float64, device=device)
    (_send if asks else _receive)(value, peer)
    return value.item()


def _send(values: torch.Tensor, peer: int) -> None:
    _await(dist.P2POp(dist.isend, values, peer), values)


def _receive(values: torch.Tensor, peer: int) -> None:
    _await(dist.P2POp(dist.irecv, values, peer), values)


def _await(operation: dist.P2POp, values: torch.Tensor) -> None:
    # As a batch NCCL takes the connections of the group of all processes, and makes no communicator for the pair.
    for work in dist.batch_isend_irecv([operation]):
        work.wait()
    values[0].item()


def _compare(topology: Topology, found: dict[str, Speed], store: dist.Store, nodes: int) -> list[str]:
    """Say what is slow beside its like; collective."""
    world, rank = dist.get_world_size(), dist.get_rank()
    row = [0.0] * (2 * world * len(found))
    for number, speed in enumerate(found.values()):
        first = 2 * (number * world + rank)
        row[first : first + 2] = speed
    table = topology.all_reduce(row)
    notes = []
    for number, name in enumerate(found):
        own = table[2 * world * number : 2 * world * (number + 1)]
        speeds = [Speed(*own[2 * each : 2 * each + 2]) for each in range(world)]
        slow = outliers(speeds)
        key = f"{KEY}/{name}"
        if rank in slow:
            store.set(f"{key}/{rank}", socket.gethostname())
        if topology.is_main:
            if number == 0:
                notes.append(
                    f"links between {nodes} nodes: {told(median(speeds))} for a small message, the median of {world} "
                    "processes"
                )
            if slow:
                hosts = {each: store.get(f"{key}/{each}").decode() for each in slow}
                notes.append(_named(name, hosts, [speeds[each] for each in slow], median(speeds)))
    return notes


def median(speeds: Sequence[Speed]) -> Speed:
    return Speed(*(statistics.median(values) for values in zip(*speeds, strict=True)))


def outliers(speeds: Sequence[Speed]) -> list[int]:
    """Who is slow beside the others."""
    middle = median(speeds)
    return [
        place
        for place, own in enumerate(speeds)
        if own.bytes_per_s * SLOW < middle.bytes_per_s
        or own.seconds > max(LATE * middle.seconds, middle.seconds + LATE_S)
    ]


def told(speed: Speed) -> str:
    rate = speed.bytes_per_s
    return f"{f'{rate / 1e9:.3g} GB/s' if rate >= 1e8 else f'{rate / 1e6:.3g} MB/s'}, {1e6 * speed.seconds:,.0f} us"


def _named(name: str, hosts: dict[int, str], slow: Sequence[Speed], middle: Speed) -> str:
    worst = Speed(max(speed.seconds for speed in slow), min(speed.bytes_per_s for speed in slow))
    return (
        f"SLOW, {name}: {ranks_on_hosts(hosts)}: {told(worst)}, where the median is {told(middle)}; all wait for the "
        "slowest. Look at interface, cable and adapter there (ethtool, ibstat), and at "
        f"{INTERFACE}, NCCL_SOCKET_IFNAME and NCCL_IB_HCA"
    )
