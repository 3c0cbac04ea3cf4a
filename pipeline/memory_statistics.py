"""What the memories of all layers do, put together from the ranks that hold parts of them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from model.attention import MemoryStatistics
from pipeline.topology import Topology


def gather_statistics(statistics: dict[int, MemoryStatistics], topology: Topology) -> dict[int, MemoryStatistics]:
    """Statistics of every layer's heads, in order, on every process; collective.

    Args:
        statistics: of this rank's layers and heads. Those of data-parallel rank 0 are taken.
    """
    own = statistics if topology.data_rank == 0 else None
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (topology.tensor_rank, own))
    by_layer: dict[int, dict[int, MemoryStatistics]] = {}
    for tensor_rank, layers in gathered:
        for layer, measured in (layers or {}).items():
            by_layer.setdefault(layer, {})[tensor_rank] = measured
    return {
        layer: MemoryStatistics(*(torch.cat(xs) for xs in zip(*(parts[r] for r in sorted(parts)), strict=True)))
        for layer, parts in sorted(by_layer.items())
    }
