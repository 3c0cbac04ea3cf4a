"""What the ranks run in the tests of the links' speed."""

from __future__ import annotations

import time
from unittest import mock

import torch.distributed as dist

from pipeline.parallel import links
from tests.distributed.grid import join

DELAY_S = 0.5
"""Far more than a busy machine keeps a process back."""


def notes_of_nodes(*, local: int, tensor: int, slow: int | None = None) -> list[str]:
    """`link_notes` where so many ranks make a node, and what one of them sends comes late."""
    topology = join(tensor=tensor, pipeline=1, timeout_s=120)
    rank, send = dist.get_rank(), links._send

    def late(*arguments) -> None:
        time.sleep(DELAY_S * (rank == slow))
        send(*arguments)

    here = {"LOCAL_WORLD_SIZE": str(local), "LOCAL_RANK": str(rank % local)}
    with (
        mock.patch.dict(links.os.environ, here),
        mock.patch.object(links, "_send", late),
        mock.patch.object(links.socket, "gethostname", lambda: f"n{rank // local}"),
    ):
        return links.link_notes(topology)
