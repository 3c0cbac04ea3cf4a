"""float32 values of bfloat16 parameters that are not trained, for checkpoints.

The optimizer keeps no master of them, and the parameter itself is rounded: without these a run would lose 16 bits of
the weights that it does not touch. They lie in host memory, shared out over data x context.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.parallel.deepspeed_internals import Partitions
from pipeline.parallel.topology import Topology


class UntrainedMasters:
    """This process's parts, which begin as what the parameters hold.

    Args:
        partitions: where ZeRO keeps the parameters.
        parameters: all of the stage's.
    """

    def __init__(self, partitions: Partitions, topology: Topology, parameters: Iterable[nn.Parameter]) -> None:
        self.partitions, self.topology = partitions, topology
        self.parts: dict[nn.Parameter, Tensor] = {}
        for parameter in parameters:
            if parameter.requires_grad or parameter.dtype != torch.bfloat16:
                continue
            start, count = self._range(parameter)
            held = partitions.held(parameter).view(-1)
            own = held[:count] if partitions.zero_stage == 3 else held[start : start + count]
            self.parts[parameter] = own.float().cpu()

    def _range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """First element of the flattened parameter that is this process's, and the number of elements."""
        size = self._share(parameter)
        start = min(self.topology.replica_rank * size, self.partitions.count(parameter))
        return start, min(size, self.partitions.count(parameter) - start)

    def _share(self, parameter: nn.Parameter) -> int:
        if self.partitions.zero_stage == 3:
            return self.partitions.held(parameter).numel()
        return -(-self.partitions.count(parameter) // self.topology.replicas)

    def start(self, parameter: nn.Parameter) -> int:
        return self._range(parameter)[0]

    def refresh_parameters(self) -> None:
        """Round the parts, which were written to, into the parameters; collective over data x context."""
        for parameter, part in self.parts.items():
            held = self.partitions.held(parameter).view(-1)
            if self.partitions.zero_stage == 3:
                held[: part.numel()].copy_(part)
                continue
            own = held.new_zeros(self._share(parameter))
            own[: part.numel()].copy_(part)
            whole = own.new_empty(len(own) * self.topology.replicas)
            dist.all_gather_into_tensor(whole, own, group=self.topology.replica_group)
            held.copy_(whole[: len(held)])
