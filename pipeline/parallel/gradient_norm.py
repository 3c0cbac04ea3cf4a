"""The norm of all gradients, reduced over all processes once.

DeepSpeed reduces it group by group: pipeline stages that do not train the same kinds of parameters have different
numbers of groups, and wait for one another for ever. Here every kind that any stage trains has its place in one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.parallel.parameter_groups import Kind
from pipeline.parallel.topology import Topology


class GradientNorm:
    """Takes the place of the norm of a DeepSpeed ZeRO optimizer.

    Args:
        zero: the optimizer.
        kinds: of all stages, in the same order on all processes.
        kind_of: by `id` of a parameter.
    """

    def __init__(
        self, zero, kinds: Sequence[Kind], kind_of: Mapping[int, Kind], topology: Topology, *, zero_stage: int
    ) -> None:
        self.zero, self.kinds, self.kind_of, self.topology = zero, kinds, kind_of, topology
        self.place = {kind: i for i, kind in enumerate(kinds)}
        self.by_kind: dict[str, float] = {}
        """The norms of the last step, by the kind's name."""
        if zero_stage == 3:
            self.groups = lambda: zero.fp16_groups
            zero._get_norm_groups = lambda: [self._measure()]
        else:
            self.groups = lambda: zero.params_in_partition
            zero.scaled_global_norm = self._measure

    def _measure(self) -> Tensor:
        """Norm of the gradients that all processes own together, before clipping; infinite where one is not finite."""
        squares = torch.zeros(len(self.kinds), dtype=torch.float64, device=self.topology.device)
        for i, parameters in enumerate(self.groups()):
            for gradient, parameter in self._counted(self.zero.averaged_gradients[i], parameters):
                norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
                squares[self.place[self.kind_of[id(parameter)]]] += norm.square()
        dist.all_reduce(squares)
        for kind, square in zip(self.kinds, squares.sqrt().tolist(), strict=True):
            self.by_kind[kind.name] = square
        total = squares.sum().sqrt()
        return total.where(total.isfinite(), torch.inf)

    def _counted(
        self, gradients: Iterable[Tensor], parameters: Iterable[nn.Parameter]
    ) -> Iterable[tuple[Tensor, nn.Parameter]]:
        """This process's gradients, without those that another one counts: of replicas over tensor-parallel ranks, and
        of a tied embedding's second copy."""
        own = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
        for gradient, parameter in zip(own, parameters, strict=False):
            split = getattr(parameter, "tensor_model_parallel", False)
            replica = getattr(parameter, "ds_pipe_replicated", False)
            if not replica and (split or self.topology.tensor_rank == 0):
                yield gradient, parameter
