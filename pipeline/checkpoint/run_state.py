"""What a run saves, part by part: a part knows its own state, and the checkpoint where the fields of it go.

Numbers and lanes have `state_dict` and `load_state_dict`. Tensors that the processes share out have `own_tensors`, each
with what it is in the whole model, and `load_own_tensors`, which reads the same from a checkpoint of any layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from model.rules.state import Memory, map_named, named_tensors
from model.sharding import partition_of
from pipeline.checkpoint.folder import CheckpointError
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.parallel.optimizer import ZeroOptimizer
from pipeline.parallel.topology import Topology

FIELDS = {
    "progress": ("step", "tokens", "windows"),
    "spikes": ("recent_losses",),
    "lanes": ("lanes",),
    "optimizer": ("optimizer_steps", "backbone_optimizer_steps"),
}
"""The parts that have a state, and which fields of `checkpoint.json` (the lanes: of the ranks' files) are theirs."""


@runtime_checkable
class HasState(Protocol):
    """A part of a run whose state is numbers, the same for every process or of its own lanes."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class OwnTensor(NamedTuple):
    """A tensor of this process, a copy in host memory."""

    key: str
    tensor: Tensor
    entry: dict[str, Any] | None
    """Where it belongs in the whole model (see `pipeline.checkpoint.schema`); None for what belongs to the process."""


@runtime_checkable
class HasTensors(Protocol):
    """A part of a run whose tensors the processes share out."""

    def own_tensors(self) -> Iterator[OwnTensor]: ...

    def load_own_tensors(self, reader: CheckpointReader) -> None: ...


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    windows: int = 0
    """Windows by which the lanes have moved: the steps, and what roll-backs left out."""

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step, self.tokens, self.windows = state["step"], state["tokens"], state["windows"]


class SavedOptimizer:
    """The parameters and Adam's state; `state_dict` comes before `own_tensors`, and its loading before theirs."""

    def __init__(self, optimizer: ZeroOptimizer, topology: Topology) -> None:
        self.optimizer, self.topology = optimizer, topology

    def state_dict(self) -> dict[str, int]:
        """Adam's step counts; collective."""
        steps, backbone_steps = self.optimizer.steps_taken()
        # A checkpoint of step 0 has empty moments, not none.
        self.optimizer.set_steps_taken(steps, backbone_steps)
        return {"optimizer_steps": steps, "backbone_optimizer_steps": backbone_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.optimizer.set_steps_taken(state["optimizer_steps"], state["backbone_optimizer_steps"])

    def own_tensors(self) -> Iterator[OwnTensor]:
        """This process's ZeRO fragments, without those that another one writes as well."""
        topology = self.topology
        for fragment in self.optimizer.fragments():
            partition = partition_of(fragment.parameter)
            # The first stage writes a tied embedding.
            if fragment.is_second_copy or (partition.dim is None and topology.tensor_rank > 0):
                continue
            if fragment.shared and topology.replica_rank > 0:
                continue
            split = partition.dim is not None
            for kind, tensor in fragment.tensors.items():
                key = f"{kind}/{fragment.name}"
                entry = {
                    "key": key,
                    "start": fragment.start,
                    "count": tensor.numel(),
                    "local_shape": list(self.optimizer.local_shape(fragment.parameter)),
                    "partition_dim": partition.dim,
                    "partition_stride": partition.stride,
                    "tensor_rank": topology.tensor_rank if split else 0,
                    "tensor_size": topology.tensor_size if split else 1,
                }
                yield OwnTensor(key, tensor.detach().to("cpu", copy=True), entry)

    def load_own_tensors(self, reader: CheckpointReader) -> None:
        """Fill the fragments in place, and the model with them; collective."""
        topology = self.topology
        for fragment in self.optimizer.fragments():
            shape, partition = self.optimizer.local_shape(fragment.parameter), partition_of(fragment.parameter)
            for kind, tensor in fragment.tensors.items():
                tensor.copy_(
                    reader.local_range(
                        f"{kind}/{fragment.name}",
                        shape,
                        partition,
                        topology.tensor_rank,
                        topology.tensor_size,
                        fragment.start,
                        fragment.start + tensor.numel(),
                    )
                )
        self.optimizer.refresh_parameters()


class CarriedMemory:
    """The memory that this process's lanes carry from step to step, in this stage's layers and on this rank's heads.
    Context ranks carry the same; the first one saves it, with what the last one's tokens leave to the next window.

    Args:
        value: as training begins.
        layers: names of the layers.
        lane_range: first and last (exclusive) lane of this process.
    """

    def __init__(self, value: Memory, layers: list[str], topology: Topology, lane_range: tuple[int, int]) -> None:
        self.value, self.layers = value, layers
        self.tensor_rank, self.first_lane = topology.tensor_rank, lane_range[0]
        self.is_first_copy = topology.context_rank == 0

    def own_tensors(self) -> Iterator[OwnTensor]:
        if not self.is_first_copy:
            return
        for key, tensor in named_tensors(self.layers, self.value):
            entry = {
                "key": key,
                "first_lane": self.first_lane,
                "first_head": self.tensor_rank * tensor.shape[1],
                "shape": list(tensor.shape),
            }
            yield OwnTensor(key, tensor.detach().to("cpu", copy=True).contiguous(), entry)

    def load_own_tensors(self, reader: CheckpointReader) -> None:
        def read(name: str, like: Tensor) -> Tensor:
            return reader.memory_tensor(name, like, self.first_lane, self.tensor_rank * like.shape[1]).to(like.device)

        self.value = map_named(self.layers, self.value, read)


class RandomState:
    """This process's random numbers. On another number of processes a run goes on with those of its own start."""

    def own_tensors(self) -> Iterator[OwnTensor]:
        yield OwnTensor("rng", torch.get_rng_state(), None)

    def load_own_tensors(self, reader: CheckpointReader) -> None:
        if reader.summary.layout.world_size != dist.get_world_size():
            return
        rank = dist.get_rank()
        try:
            torch.set_rng_state(reader.rng_state(rank))
        except RuntimeError as error:
            raise CheckpointError(f"{reader.folder}: the random state of rank {rank}: {error}") from error


Parts = dict[str, HasState | HasTensors]
"""What a run saves, by name; it is saved and loaded in this order."""


def load_parts(reader: CheckpointReader, parts: Parts) -> None:
    """Give every part of a run what a checkpoint holds of it; collective.

    Raises:
        CheckpointError: the checkpoint holds weights alone, or does not fit.
    """
    if reader.summary.weights_only:
        raise CheckpointError(
            f"{reader.folder} holds weights alone, there is nothing to resume: start a run from it with "
            f"train.init_from={reader.folder}"
        )
    for name, part in parts.items():
        if isinstance(part, HasState):
            try:
                part.load_state_dict({field: _stored(reader, field) for field in FIELDS[name]})
            except CheckpointError:
                raise
            except ValueError as error:
                raise CheckpointError(f"{reader.folder}: {error}") from error
        if isinstance(part, HasTensors):
            part.load_own_tensors(reader)


def _stored(reader: CheckpointReader, field: str) -> Any:
    summary = reader.summary
    if field == "lanes":
        return reader.lanes
    if field == "backbone_optimizer_steps":
        # Older checkpoints have it as the first stage counted it: 0 where that trained nothing of the plain model.
        before = reader.config.train.freeze_backbone_steps
        return summary.backbone_optimizer_steps or max(0, summary.optimizer_steps - before)
    return getattr(summary, field)
