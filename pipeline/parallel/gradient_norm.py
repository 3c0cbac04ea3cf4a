"""The norm of all gradients, reduced over all processes once; and the step's other sums with it.

DeepSpeed reduces it group by group: pipeline stages that do not train the same kinds of parameters have different
numbers of groups, and wait for one another for ever. Here every kind that any stage trains has its place in one tensor.

Whether the step moves the parameters is decided on the host, so that the host has to read something once a step and
wait for the device. This is the place: what else it wants to know of the step travels in the same tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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
        self.alongside = torch.zeros(0)
        """float64 on the device: other numbers of this process, to be summed over all processes in the next step."""
        self.accept: Callable[[list[float]], bool] = lambda sums: True
        """Asked with those sums; where it says no, the next step counts as one whose gradient is not finite."""
        partitions.replace_norm(self._measure)

    def _measure(self) -> Tensor:
        """Norm of the gradients that all processes own together, before clipping; infinite where one is not finite or
        the step is not accepted. In host memory: what DeepSpeed decides by it makes nobody wait a second time."""
        squares = torch.zeros(len(self.kinds), dtype=torch.float64, device=self.topology.device)
        for gradient, parameter in self.partitions.gradients():
            if self._counts(parameter):
                norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
                squares[self.place[self.kind_of[id(parameter)]]] += norm.square()
        numbers = torch.cat([squares, self.alongside.to(squares)])
        dist.all_reduce(numbers)
        squares, sums = numbers.cpu().split([len(squares), len(numbers) - len(squares)])  # the step's one read
        for kind, norm in zip(self.kinds, squares.sqrt().tolist(), strict=True):
            self.by_kind[kind.name] = norm
        total = squares.sum().sqrt()
        return total if self.accept(sums.tolist()) and total.isfinite() else torch.full_like(total, torch.inf)

    def _counts(self, parameter: nn.Parameter) -> bool:
        """Whether no other process counts its gradient: of replicas over tensor-parallel ranks, and of a tied
        embedding's second copy."""
        split = getattr(parameter, "tensor_model_parallel", False)
        return not is_counted_elsewhere(parameter) and (split or self.topology.tensor_rank == 0)
