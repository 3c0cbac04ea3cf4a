"""Which errors are another process's end, and whose: by what the communication libraries say."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from launch.processes import worker
from launch.processes.worker import _has_lost_a_peer, _peer, _short
from pipeline.training.resilience import HangError

GLOO = "[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.77.0.2]:6334. This is typically"
NCCL = "NCCL error: remote process exited or there was a network error. socketProgress: peer n7<10.0.0.7<4711> closed"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(GLOO), True),
        (dist.DistBackendError(NCCL), True),
        (dist.DistNetworkError("The client socket has timed out after 1800000ms"), True),
        (RuntimeError("wrong number"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (HangError("no progress; where the other ranks are is not known (Connection reset by peer)"), False),
        (ConnectionResetError("Connection reset by peer"), False),  # a file's, say
        (ValueError("shard gloo/train-000003.tar is truncated"), False),
    ],
)
def test_errors_that_are_another_ranks_end(error, lost):
    assert _has_lost_a_peer(error) is lost


def test_the_peer_is_named_by_its_address(monkeypatch):
    names = {"10.77.0.2": "n2"}

    def look_up(address):
        if address not in names:
            raise OSError("unknown")
        return names[address], [], []

    monkeypatch.setattr(worker.socket, "gethostbyaddr", look_up)
    assert _peer(GLOO) == "n2 (10.77.0.2)" and _peer(NCCL) == "10.0.0.7"
    assert _peer("remote=[fe80::1:2]:4711") == "fe80::1:2"
    assert _peer("pair.cc:553] something at 12:30:44") == "another rank"


def test_what_a_library_says_is_shortened():
    assert _short(f"RuntimeError: {GLOO} caused by a remote worker crashing. GLHF!") == (
        "RuntimeError: Connection closed by peer [10.77.0.2]:6334"
    )
    assert _short(NCCL) == NCCL
