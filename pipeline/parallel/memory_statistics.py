"""What the memories of all layers do, put together from the ranks that hold parts of them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from model.layers.statistics import MemoryStatistics
from pipeline.parallel.topology import Topology


def gather_statistics(
    statistics: dict[int, MemoryStatistics], topology: Topology, *, layers: int
) -> dict[int, MemoryStatistics]:
    """Statistics of every layer's heads, in order, on every process, in host memory; collective.

    Every rank writes its part into a table of zeros, and the tables are added up: tensors travel as tensors, for a
    pickled one is put back on the device it came from, which is another process's.

    Args:
        statistics: of this rank's layers and heads, at least one. Those of data-parallel rank 0 are taken; over its
            context ranks, as over chunks, they are averaged.
        layers: of the whole model.
    """
    shapes = [x.shape for x in next(iter(statistics.values()))]  # first dim by head, the same on all ranks
    sizes = [shape.numel() for shape in shapes]
    table = torch.zeros(layers, topology.tensor_size, sum(sizes), device=topology.device)
    measured_layers = torch.zeros(layers, device=topology.device)
    if topology.data_rank == 0:
        for layer, measured in statistics.items():
            table[layer, topology.tensor_rank] = torch.cat([x.flatten() for x in measured]) / topology.context_size
            measured_layers[layer] = 1
    for part in (table, measured_layers):
        dist.all_reduce(part)
    table = table.cpu()

    def whole(layer: int) -> MemoryStatistics:
        fields = zip(shapes, table[layer].split(sizes, dim=-1), strict=True)
        return MemoryStatistics(*(x.reshape(-1, *shape[1:]) for shape, x in fields))

    return {layer: whole(layer) for layer in measured_layers.nonzero().flatten().tolist()}
