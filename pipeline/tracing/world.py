"""A pretended rank of a pretended world, with a pretended accelerator: what the parts of a run are built in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist

from model.megatron import parallel_state
from pipeline.accounting.planner import pretended_rank
from pipeline.config.schema import Config
from pipeline.parallel.deepspeed_internals import pretending
from pipeline.parallel.groups import pipeline_group
from pipeline.parallel.topology import Topology, place_in_grid
from pipeline.tracing.accelerator import pretended_accelerator


@contextmanager
def pretended_world(config: Config, rank: int, world_size: int) -> Iterator[Topology]:
    """Be `rank` of `world_size` processes of a run with `config`; collectives do nothing, and all others are like this.

    Parameters and batches must be made on the topology's device.
    """

    def everyone_alike(objects: list[Any], own: Any, group: dist.ProcessGroup | None = None) -> None:
        objects[:] = [own] * len(objects)

    def one_by_one(transfers: list[dist.P2POp]) -> list[dist.Work]:
        """Without asking the group for its backend on the device, which has none."""
        return [
            transfer.op(
                transfer.tensor,
                group=transfer.group,
                **{"group_dst" if transfer.op is dist.isend else "group_src": transfer.group_peer},
            )
            for transfer in transfers
        ]

    parallel = config.parallel
    layout = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context}
    with pretended_rank(rank, world_size, **layout), pretended_accelerator() as device:
        with (
            warnings.catch_warnings(),
            mock.patch.object(dist, "all_gather_object", everyone_alike),
            mock.patch.object(dist, "batch_isend_irecv", one_by_one),
            pretending(device),
        ):
            # DeepSpeed looks at the alignment of its buffers, which have no address.
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield place_in_grid(device, lambda: pipeline_group(config.parallel.timeout_s))


def group_labels(topology: Topology) -> dict[str, str]:
    """What the process groups are for, by their names. A group of several uses has the last one's label."""
    groups = {
        "all": dist.group.WORLD,
        "model": parallel_state.get_model_parallel_group(),
        "embedding": parallel_state.get_embedding_group(check_initialized=False),
        "data": topology.replica_group,
        "context": topology.context_group,
        "tensor": topology.tensor_group,
        "pipeline, forward": topology.forward_group,
        "pipeline, backward": topology.backward_group,
    }
    return {group.group_name: label for label, group in groups.items() if isinstance(group, dist.ProcessGroup)}
