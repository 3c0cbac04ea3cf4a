"""What the memories of all layers do, put together from the ranks that hold parts of them."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from model.config import ModelConfig, layer_shape
from model.layers.statistics import MemoryStatistics, statistics_shapes
from pipeline.parallel.topology import Topology


def gather_statistics(
    statistics: dict[int, MemoryStatistics], topology: Topology, model: ModelConfig
) -> dict[int, MemoryStatistics]:
    """Statistics of all heads of every layer with a memory, in order, on every process, in host memory; collective.

    Every rank writes its part into a table of zeros, and the tables are added up: tensors travel as tensors, for a
    pickled one is put back on the device it came from, which is another process's.

    Args:
        statistics: of this rank's layers and heads. Those of data-parallel rank 0 are taken; over its context ranks,
            as over chunks, they are averaged.
        model: the whole model.
    """
    shapes = statistics_shapes(layer_shape(model, topology.tensor_size))  # first dim by head, the same on all ranks
    sizes = [math.prod(shape) for shape in shapes]
    table = torch.zeros(model.num_layers, topology.tensor_size, sum(sizes), device=topology.device)
    measured_layers = torch.zeros(model.num_layers, device=topology.device)
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
