"""Shared by the tests of Hugging Face's formats."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def topology():
    """The grid of a process by itself."""
    import torch.distributed as dist

    from pipeline.parallel.topology import initialize, shutdown

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield initialize(tensor=1, pipeline=1, timeout_s=60)
    shutdown()
