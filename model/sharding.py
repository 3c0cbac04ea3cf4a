"""Which part of a parameter a tensor-parallel rank holds, and initial values that do not depend on the layout.

Megatron marks its parameters with `partition_dim` and `partition_stride`. A stride of 2 (the gated MLP's first matrix,
[gate; up]) means that the full matrix is two blocks along the dim and a rank holds its part of each. Checkpoints and
initialisation both go through this module, so a layout is described once.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import LayerShape


@dataclass(frozen=True)
class Partition:
    """How a parameter is split over tensor-parallel ranks: along `dim`, in `stride` blocks; None: replicated."""

    dim: int | None
    stride: int = 1


PARTITIONS: dict[str, Partition] = {
    "embedding.weight": Partition(0),
    "output.weight": Partition(0),
    "attention.qkv.weight": Partition(0),
    "attention.qkv.bias": Partition(0),
    "attention.projection.weight": Partition(1),
    "attention.beta": Partition(0),
    "attention.mix_gate.weight": Partition(0),
    "attention.mix_gate.bias": Partition(0),
    "attention.write_gate.weight": Partition(0),
    "attention.write_gate.bias": Partition(0),
    "mlp.linear_fc1.weight": Partition(0, stride=2),
    "mlp.linear_fc2.weight": Partition(1),
}
"""By the end of a parameter's name; what is not listed (norms) is replicated."""

RULE_PARAMETERS = ".attention.memory_"
"""Before the name of a parameter that the memory rule adds. The first dim of each goes by key/value head."""


def partition_named(name: str) -> Partition:
    """The partition of the parameter of this name."""
    if RULE_PARAMETERS in name:
        return Partition(0)
    return next((partition for suffix, partition in PARTITIONS.items() if name.endswith(suffix)), Partition(None))


def mark_partitions(module: nn.Module) -> None:
    """Put Megatron's attributes on every parameter; its layers do so only when they also initialise."""
    for name, parameter in module.named_parameters():
        partition = partition_named(name)
        parameter.tensor_model_parallel = partition.dim is not None
        parameter.partition_dim = -1 if partition.dim is None else partition.dim
        parameter.partition_stride = partition.stride


def partition_of(parameter: nn.Parameter) -> Partition:
    """The partition that Megatron's attributes describe."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return Partition(None)
    return Partition(parameter.partition_dim, parameter.partition_stride)


def full_shape(local: Sequence[int], partition: Partition, size: int) -> tuple[int, ...]:
    """Shape of the whole parameter when each of `size` ranks holds `local`."""
    shape = list(local)
    if partition.dim is not None:
        shape[partition.dim] *= size
    return tuple(shape)


def piece_bounds(full: Sequence[int], partition: Partition, rank: int, size: int) -> list[tuple[int, int]]:
    """The ranges along `partition.dim` of the whole parameter that `rank` holds, in the order it holds them."""
    assert partition.dim is not None
    block = full[partition.dim] // partition.stride
    part = block // size
    return [(i * block + rank * part, i * block + (rank + 1) * part) for i in range(partition.stride)]


def shard(full: Tensor, partition: Partition, rank: int, size: int) -> Tensor:
    """The part of a whole tensor that `rank` of `size` holds."""
    if partition.dim is None or size == 1:
        return full
    bounds = piece_bounds(full.shape, partition, rank, size)
    return torch.cat([full.narrow(partition.dim, a, b - a) for a, b in bounds], dim=partition.dim)


def unshard(parts: Sequence[Tensor], partition: Partition) -> Tensor:
    """The whole tensor from the parts of all ranks, in rank order."""
    if partition.dim is None or len(parts) == 1:
        return parts[0]
    blocks = [part.chunk(partition.stride, dim=partition.dim) for part in parts]
    return torch.cat([blocks[r][i] for i in range(partition.stride) for r in range(len(parts))], dim=partition.dim)


def initial_values(
    name: str,
    parameter: nn.Parameter,
    draw: Callable[[torch.Generator], Tensor],
    *,
    seed: int,
    tensor_rank: int,
    tensor_size: int,
) -> Tensor:
    """This rank's part, float32, of the values that belong to the global name of `parameter`, the same on every layout.

    Every parameter draws from its own generator, seeded by (seed, name): neither the order of construction nor the
    number of ranks or stages changes a value.

    Args:
        draw: gives the whole parameter, float32, from a generator.
    """
    # The generator looks at the low 32 bits of its seed alone: the run's seed has to be mixed into those.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return shard(draw(generator), partition_of(parameter), tensor_rank, tensor_size)


def normal_values(
    shape: Sequence[int], partition: Partition, std: float, tensor_size: int
) -> Callable[[torch.Generator], Tensor]:
    """Draws the whole of a parameter, of which this rank holds a part of `shape`, from a normal distribution."""
    shape = full_shape(shape, partition, tensor_size)
    return lambda generator: torch.randn(shape, generator=generator, dtype=torch.float32) * std


def tie_keys_to_queries(
    draw: Callable[[torch.Generator], Tensor], layer: LayerShape
) -> Callable[[torch.Generator], Tensor]:
    """Draws the q, k, v projection `[(heads + 2 groups) dim, hidden]` with keys that start as the mean query of their
    group, at the length that they are drawn with."""

    def tied(generator: torch.Generator) -> Tensor:
        weight = draw(generator)
        parts = weight.view(layer.groups, layer.ratio + 2, layer.dim, layer.hidden)
        parts[:, layer.ratio] = parts[:, : layer.ratio].mean(dim=1) * math.sqrt(layer.ratio)
        return weight

    return tied


def output_projection_std(std: float, num_layers: int) -> float:
    """Initial standard deviation of matrices that write to the residual stream (GPT-2's scaling by depth)."""
    return std / math.sqrt(2 * num_layers)


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """The vocabulary with padding, so that tensor-parallel ranks hold equal parts. Padding has no probability."""
    return -(-vocab_size // multiple) * multiple
