"""The process grid: tensor x context x data x pipeline parallelism on Megatron-core's process groups."""

from __future__ import annotations

import datetime
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from model.device import default_device, distributed_backend, prepare_megatron
from model.megatron import parallel_state
from model.rules.context import ContextGroup
from pipeline.parallel.first_contact import FirstMessages, meet
from pipeline.parallel.groups import host_groups, make_model_parallel, pipeline_group
from pipeline.parallel.silence import give_up_on_silence

Result = TypeVar("Result")


@dataclass(frozen=True)
class Topology:
    """Where this process stands, and the groups it talks in.

    Forward and backward traffic of the pipeline use groups of their own: on NCCL a group is a queue, and a receive
    that is posted early must not hold up a send in the other direction.
    """

    device: torch.device
    tensor_rank: int
    tensor_size: int
    context_rank: int
    """Which part of every chunk's segments is this process's."""
    context_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    """Which lanes are this process's."""
    data_size: int
    previous_rank: int | None
    """Global rank of the pipeline stage before this one; None on the first."""
    next_rank: int | None
    forward_group: dist.ProcessGroup
    backward_group: dist.ProcessGroup
    host_groups: Sequence[dist.ProcessGroup | None] = (None,)
    """See `pipeline.parallel.groups.host_groups`."""

    @property
    def owns_lanes(self) -> bool:
        """Of the processes with the same lanes, the one that saves where they stand."""
        return self.tensor_rank == self.context_rank == self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_main(self) -> bool:
        """The process that prints and writes metrics."""
        return dist.get_rank() == 0

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def context_group(self) -> dist.ProcessGroup:
        """The processes that share the segments of the same lanes, heads and layers."""
        return parallel_state.get_context_parallel_group()

    @property
    def context(self) -> ContextGroup | None:
        """What a stage exchanges its memory's summaries in; None where this process has all segments of its lanes."""
        if self.context_size == 1:
            return None
        return ContextGroup(self.context_group, self.context_rank, self.context_size)

    @property
    def model_group(self) -> dist.ProcessGroup:
        """The processes of one copy of the model, for one context rank."""
        return parallel_state.get_model_parallel_group()

    @property
    def replica_group(self) -> dist.ProcessGroup:
        """The processes that hold the same parameters, data x context; ZeRO shares the optimizer out over them."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    @property
    def replica_rank(self) -> int:
        """In `replica_group`: context is the faster axis."""
        return self.data_rank * self.context_size + self.context_rank

    @property
    def replicas(self) -> int:
        return self.data_size * self.context_size

    @property
    def embedding_group(self) -> dist.ProcessGroup:
        """First and last stage, which hold the two copies of a tied embedding."""
        return parallel_state.get_embedding_group()

    def named_groups(self) -> dict[str, dist.ProcessGroup]:
        """Groups that every process is in one of each, by their names in messages."""
        return {
            "all processes": dist.group.WORLD,
            "parallel.tensor": self.tensor_group,
            "parallel.context": self.context_group,
            "data parallelism": self.replica_group,
            "the processes that hold one model": self.model_group,
        }

    def for_documents(self) -> Topology:
        """The grid of an evaluation inside a run: context ranks share no documents, they take others, as data-parallel
        ranks do."""
        return replace(self, context_rank=0, context_size=1, data_rank=self.replica_rank, data_size=self.replicas)

    def lanes(self, total: int) -> tuple[int, int]:
        """First and last (exclusive) global lane of this data-parallel rank: a contiguous block."""
        size = total // self.data_size
        return self.data_rank * size, (self.data_rank + 1) * size

    def all_reduce(self, values: list[float], op: dist.ReduceOp = dist.ReduceOp.SUM, group=None) -> list[float]:
        """Reduce a few numbers in float64 over `group` (default: all processes), from host to host: a device that
        works off what it was given before is not waited for."""
        tensor = torch.tensor(values, dtype=torch.float64)
        for part in self.host_groups if group is None else (group,):
            dist.all_reduce(tensor, op=op, group=part)
        return tensor.tolist()

    def over_stages(self, own: Any) -> list[Any]:
        """What each pipeline stage of this model copy has, the first one's first; collective. Copies have the same, so
        that nothing travels through the whole world."""
        found = [own] * self.pipeline_size
        if self.pipeline_size > 1:
            dist.all_gather_object(found, own, group=self.forward_group)
        return found

    def barrier(self) -> None:
        """Wait until all processes are here."""
        # Left to guess, NCCL would take another process's device where ranks are not numbered node by node.
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)


def on_main(action: Callable[[], Result]) -> Result:
    """Do `action` on the main process alone; every process gets what it returns. Collective.

    What the main process alone did, the others would wait for in their next collective when it fails.

    Raises:
        Exception: what `action` raises, on every process, with the same message.
    """
    result: Result | None = None
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            result = action()
        except Exception as problem:
            error = problem
    outcome = [(result, error and _description(error))]
    dist.broadcast_object_list(outcome, src=0)
    result, told = outcome[0]
    if error is not None:
        raise error
    if told is not None:
        kind, message = told
        raise kind.__new__(kind, message)
    return result


def _description(error: Exception) -> tuple[type[Exception], str]:
    """Type and message of an error, so that another process can raise it without the arguments it was made from."""
    kind, message = type(error), str(error)
    try:
        pickle.dumps(kind)
        if str(kind.__new__(kind, message)) == message:
            return kind, message
    except Exception:  # the type has its own ideas, or stands inside a function
        pass
    if isinstance(error, ValueError | OSError):
        return (ValueError if isinstance(error, ValueError) else OSError), message
    return RuntimeError, f"{kind.__name__}: {message}"


def initialize(
    *, tensor: int, pipeline: int, context: int = 1, timeout_s: float, greet: Callable[[], None] | None = None
) -> Topology:
    """Join the process group described by torchrun's environment variables and lay out the grid.

    Safe to call again with another layout in the same processes (the tests do).

    Args:
        greet: what the processes have to say to one another when they have met, before the layout makes groups of them.

    Raises:
        ConnectionError: the processes cannot meet.
        ValueError: their number does not fit the layout.
    """
    prepare_megatron()
    timeout = datetime.timedelta(seconds=timeout_s)
    # A process connects to whom it talks to, a few in every group, in place of everybody.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    device = default_device(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        try:
            _join(distributed_backend(device), timeout)
        except dist.DistNetworkError as error:
            variables = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            known = ", ".join(f"{name}={os.environ.get(name, '')}" for name in variables)
            raise ConnectionError(
                f"this process cannot meet the others ({known}): is the address that of rank 0's machine, is the port "
                f"free there and open, were all started within {timeout_s:g} s? ({str(error).splitlines()[0]})"
            ) from error
    if greet is not None:
        greet()
    world = dist.get_world_size()
    if world % (size := tensor * context * pipeline):
        raise ValueError(
            f"parallel.tensor={tensor} x parallel.context={context} x parallel.pipeline={pipeline} needs a multiple of "
            f"{size} processes; there are {world}"
        )
    first = FirstMessages(dist.distributed_c10d._get_default_store(), dist.get_rank())
    with first.within("the making of the layout's groups", range(world)):
        make_model_parallel(tensor=tensor, pipeline=pipeline, context=context, timeout_s=timeout_s)
        topology = place_in_grid(device, lambda: pipeline_group(timeout_s))
        topology = replace(topology, host_groups=host_groups(timeout_s))
    _open_connections(topology, first)
    return topology


def _join(backend: str, timeout: datetime.timedelta) -> None:
    """Make the group of all processes."""
    if os.environ["WORLD_SIZE"] == "1":
        # A process of its own meets nobody: without a port, nothing can take that port before it.
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
        return
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    give_up_on_silence(int(os.environ["MASTER_PORT"]))
    words = dist.PrefixStore("first-contact", store)
    meet(words, rank, world, timeout.total_seconds())
    with FirstMessages(words, rank).within("the group of all processes", range(world)):
        dist.init_process_group(
            backend, timeout=timeout, store=dist.PrefixStore("default_pg", store), rank=rank, world_size=world
        )


def place_in_grid(device: torch.device, new_group: Callable[[], dist.ProcessGroup]) -> Topology:
    """This process's place in the grid that Megatron's groups describe.

    Args:
        new_group: makes a fresh group of this process's pipeline stages.
    """
    stages = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    forward_group, backward_group = new_group(), new_group()
    position = stages.index(dist.get_rank())
    return Topology(
        device=device,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        pipeline_rank=position,
        pipeline_size=len(stages),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        previous_rank=stages[position - 1] if position > 0 else None,
        next_rank=stages[position + 1] if position + 1 < len(stages) else None,
        forward_group=forward_group,
        backward_group=backward_group,
    )


def _open_connections(topology: Topology, first: FirstMessages) -> None:
    """Use every group, and every connection between neighbouring stages, once.

    NCCL makes a connection when it is first used, and both sides wait there for the other one, the host too: even for a
    receive that is only posted. A stage that posts the receive of a gradient before it sends the hidden states for it
    would wait for ever. Here stage after stage uses each connection, in an order that nobody waits in.
    """
    token = torch.zeros(1, device=topology.device)
    for name, group, source, target in (
        ("the pipeline, forwards", topology.forward_group, topology.previous_rank, topology.next_rank),
        ("the pipeline, backwards", topology.backward_group, topology.next_rank, topology.previous_rank),
    ):
        with first.within(name, dist.get_process_group_ranks(group)):
            if source is not None:
                dist.recv(token, source, group=group)
            if target is not None:
                dist.send(token, target, group=group)
            token.item()  # a device is behind its host
    groups = topology.named_groups()
    if topology.pipeline_size > 1 and (topology.pipeline_rank == 0 or topology.is_last_stage):
        groups["the first and the last stage"] = topology.embedding_group
    for name, group in groups.items():
        with first.within(name, dist.get_process_group_ranks(group)):
            dist.all_reduce(token, group=group)
            token.item()


def shutdown() -> None:
    """Leave the process groups (after a run that ended well; a failing process just exits)."""
    if dist.is_initialized():
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
