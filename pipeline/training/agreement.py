"""Do the processes that share the work on a lane train on the same windows? Each of them reads its own.

Tensor-parallel ranks and pipeline stages with the same lanes and segments get tokens, resets and labels from the
prepared set, every one for itself, and context ranks get parts of the same window. A document that one of them alone
cannot read, or another version of a file on one node, would train a model that exists nowhere, without a word.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch.distributed as dist

from data.files import some
from data.lanes.loader import WindowBatch
from pipeline.parallel.naming import ranks_named
from pipeline.parallel.topology import Topology

SHOWN = 4
"""Lanes, ranks and documents that a message names, of each."""


class DifferentWindowsError(ValueError):
    """Processes that must train on the same window have read different ones."""


class RankWindow(NamedTuple):
    """What a process has read for a step."""

    rank: int
    part: int
    """Context rank: which part of every chunk it has."""
    lanes: list[int]
    outlines: list[int]
    digests: list[int]
    documents: list[list[str]]
    """Per lane, the names in order."""


def agreed_weight(batch: WindowBatch, topology: Topology, *, step: int) -> float:
    """The sum of the loss weights of all lanes; collective, from host to host. One all-reduce finds it and compares the
    windows.

    Raises:
        DifferentWindowsError: the same on all processes.
    """
    # Places for the numbers of each part of each block of lanes, and of each block of lanes, which all its processes
    # put in: the largest is everybody's, and so is the least, if the windows are equal.
    weights, digests = [-math.inf] * topology.replicas, [-math.inf] * (2 * topology.replicas)
    outlines = [-math.inf] * (2 * topology.data_size)
    weights[topology.replica_rank] = batch.weight
    digests[2 * topology.replica_rank : 2 * topology.replica_rank + 2] = [batch.digest, -batch.digest]
    outlines[2 * topology.data_rank : 2 * topology.data_rank + 2] = [batch.outline, -batch.outline]
    reduced = topology.all_reduce([*weights, *digests, *outlines], op=dist.ReduceOp.MAX)
    compared = reduced[len(weights) :]
    if any(most != -least for most, least in zip(compared[::2], compared[1::2], strict=True)):
        own = RankWindow(
            dist.get_rank(),
            topology.context_rank,
            batch.lane_ids.tolist(),
            batch.outlines,
            batch.digests,
            batch.documents,
        )
        everyone: list[RankWindow] = [own] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        raise DifferentWindowsError(f"step {step}: {different_windows(everyone)}")
    return sum(reduced[: len(weights)])


def different_windows(windows: list[RankWindow]) -> str:
    """What is different between the windows of processes with the same lanes, for a message."""
    outlines: dict[int, dict[int, list[tuple[int, list[str]]]]] = {}
    parts: dict[tuple[int, int], dict[int, list[tuple[int, list[str]]]]] = {}
    for window in windows:
        lanes = zip(window.lanes, window.outlines, window.digests, window.documents, strict=True)
        for lane, outline, digest, documents in lanes:
            outlines.setdefault(lane, {}).setdefault(outline, []).append((window.rank, documents))
            parts.setdefault((lane, window.part), {}).setdefault(digest, []).append((window.rank, documents))
    # Other documents make all parts of a window different; else a part may differ alone.
    different = {lane: found for lane, found in sorted(outlines.items()) if len(found) > 1}
    for (lane, _), found in sorted(parts.items()):
        if len(found) > 1:
            different.setdefault(lane, found)
    lines = []
    for lane, found in sorted(different.items())[:SHOWN]:
        # The reading of the most ranks first: it is the likelier one.
        groups = sorted(found.values(), key=lambda group: (-len(group), group[0][0]))
        told = [f"{ranks_named([rank for rank, _ in group])} read {some(group[0][1], SHOWN)}" for group in groups]
        same_names = len({tuple(group[0][1]) for group in groups}) == 1
        lines.append(f"lane {lane}: {', '.join(told)}" + (" with other contents" if same_names else ""))
    if len(different) > SHOWN:
        lines.append(f"and {len(different) - SHOWN} more lanes")
    return (
        "processes that share the work on a lane have read different windows of it. "
        + "; ".join(lines)
        + ". Is the prepared set the same on all nodes, and can all of them read it? With data.skip_bad_documents a "
        "process leaves out what it cannot read"
    )
