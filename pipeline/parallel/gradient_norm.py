"""The norm of all gradients, reduced over all processes once.

DeepSpeed reduces it group by group: pipeline stages that do not train the same kinds of parameters have different
numbers of groups, and wait for one another for ever. Here every kind that any stage trains has its place in one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.parallel.deepspeed_internals import Partitions, is_counted_elsewhere
from pipeline.parallel.parameter_groups import Kind
from pipeline.parallel.topology import Topology


class GradientNorm:
    """Takes the place of the norm of a DeepSpeed ZeRO optimizer.

    Args:
        partitions: the optimizer's.
        kinds: of all stages, in the same order on all processes.
        kind_of: by `id` of a parameter.
    """

    def __init__(
        self, partitions: Partitions, kinds: Sequence[Kind], kind_of: Mapping[int, Kind], topology: Topology
    ) -> None:
        self.partitions, self.kinds, self.kind_of, self.topology = partitions, kinds, kind_of, topology
        self.place = {kind: i for i, kind in enumerate(kinds)}
        self.by_kind: dict[str, float] = {}
        """The norms of the last step, by the kind's name."""
        partitions.replace_norm(self._measure)

    def _measure(self) -> Tensor:
        """Norm of the gradients that all processes own together, before clipping; infinite where one is not finite."""
        squares = torch.zeros(len(self.kinds), dtype=torch.float64, device=self.topology.device)
        for gradient, parameter in self.partitions.gradients():
            if self._counts(parameter):
                norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
                squares[self.place[self.kind_of[id(parameter)]]] += norm.square()
        dist.all_reduce(squares)
        for kind, square in zip(self.kinds, squares.sqrt().tolist(), strict=True):
            self.by_kind[kind.name] = square
        total = squares.sum().sqrt()
        return total.where(total.isfinite(), torch.inf)

    def _counts(self, parameter: nn.Parameter) -> bool:
        """Whether no other process counts its gradient: of replicas over tensor-parallel ranks, and of a tied
        embedding's second copy."""
        split = getattr(parameter, "tensor_model_parallel", False)
        return not is_counted_elsewhere(parameter) and (split or self.topology.tensor_rank == 0)
