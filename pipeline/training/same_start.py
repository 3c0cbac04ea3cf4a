"""Before anything is trained: are all processes started alike, do they see one run folder, and do their clocks agree?

A learning rate that differs on one node, another version of a library there or a folder that only looks shared trains a
model that exists nowhere, without a word. What differs is refused in the first seconds, with the node's name.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import secrets
import socket
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data.files import some
from pipeline.config.schema import Config
from pipeline.parallel.setup import versions
from pipeline.parallel.topology import Topology, on_main

PACKAGES = ("data", "model", "pipeline", "launch")
KEY = "infini/start"
"""Of the job's store: what rank 0 was started with, and a hash of it."""
CLOCK_BOUND_S = 30.0
"""Nodes' clocks may differ by so much: torchrun takes a node for lost by its clock's word, after a minute or so."""
SEEN_WITHIN_S = 30.0
"""A file that rank 0 makes appears on all nodes within this time; a shared disk's cache takes its time."""


def check_same_start(config: Config) -> None:
    """Compare this process with rank 0: settings, code, versions. Not collective; the process group must be there.

    Raises:
        ValueError: they differ. The message names the first few differences, and both nodes.
    """
    if dist.get_world_size() == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    own = start_facts(config)
    text = json.dumps(own, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    host = socket.gethostname()
    if dist.get_rank() == 0:
        store.set(KEY, json.dumps([host, own]))
        store.set(f"{KEY}/hash", digest)
    elif store.get(f"{KEY}/hash").decode() != digest:
        first_host, first = json.loads(store.get(KEY))
        raise ValueError(
            f"rank {dist.get_rank()} on {host} is not started like rank 0 on {first_host}: "
            f"{some(differences(own, first), 4)}; all nodes must have the same settings, code and libraries"
        )


def start_facts(config: Config) -> dict[str, dict[str, str]]:
    """What decides the numbers, by kind and name."""
    settings: dict[str, str] = {}

    def flatten(key: str, value: Any) -> None:
        if isinstance(value, dict):
            for name in value:
                flatten(f"{key}.{name}".lstrip("."), value[name])
        else:
            settings[key] = repr(value)

    flatten("", asdict(config))
    return {"setting": settings, "code": code_hashes(), "version": versions()}


@functools.cache
def code_hashes(root: Path = Path(__file__).parents[2]) -> dict[str, str]:
    """Hash of every module of the product."""
    files = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in files}


def differences(own: dict[str, dict[str, str]], first: dict[str, dict[str, str]]) -> list[str]:
    """What is different on this process and on rank 0, settings first."""
    told = []
    for kind in own:
        for name in sorted(own[kind].keys() | first[kind].keys()):
            here, there = own[kind].get(name, "missing"), first[kind].get(name, "missing")
            if here == there:
                continue
            if kind == "code" and "missing" not in (here, there):
                told.append(f"{name} has other contents")
            else:
                told.append(f"{name} is {here} here, {there} there")
    return told


def check_shared_folder(run_dir: Path, topology: Topology) -> None:
    """Refuse a run folder that some node has by itself; collective.

    Raises:
        ValueError: on the processes that do not see what rank 0 writes.
    """
    if dist.get_world_size() == 1:
        return
    token = on_main(lambda: _leave_token(run_dir))
    # One process asks for its node.
    seen = os.environ.get("LOCAL_RANK", "0") != "0" or _appears(token)
    (missing,) = topology.all_reduce([float(not seen)], op=dist.ReduceOp.MAX)
    on_main(token.unlink)
    if not seen:
        raise ValueError(
            f"run_dir: {run_dir} on {socket.gethostname()} (rank {dist.get_rank()}) is not the folder that rank 0 "
            "writes to: it must be on a disk that all nodes share"
        )
    if missing:
        dist.barrier()  # the process that misses it says so, and ends this one


def _leave_token(run_dir: Path) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / f".seen-{secrets.token_hex(8)}"
    path.touch()
    return path.resolve()


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        # A listing asks the server, where a single name may be remembered as missing.
        if path.parent.is_dir():
            os.listdir(path.parent)
        time.sleep(0.2)
    return True


def check_clocks(topology: Topology) -> None:
    """Refuse nodes whose clocks differ by more than `CLOCK_BOUND_S`; collective.

    Raises:
        ValueError: on all processes.
    """
    topology.all_reduce([0.0])  # all leave it within milliseconds
    now = time.time()
    latest, earliest = topology.all_reduce([now, -now], op=dist.ReduceOp.MAX)
    if latest + earliest <= CLOCK_BOUND_S:
        return
    everyone: list[tuple[float, str]] = [(now, "")] * dist.get_world_size()
    dist.all_gather_object(everyone, (now, socket.gethostname()))
    times = sorted(everyone)
    middle = times[len(times) // 2][0]
    worst, host = max(everyone, key=lambda found: abs(found[0] - middle))
    told = (
        f"the clock of {host} is {abs(worst - middle):.0f} s {'ahead of' if worst > middle else 'behind'} the others'"
    )
    hosts = sorted({host for _, host in everyone})
    if len(hosts) == 2:  # nobody can say which of them is right
        told = f"the clocks of {' and '.join(hosts)} differ by {abs(worst - middle):.0f} s"
    raise ValueError(
        f"{told} (at most {CLOCK_BOUND_S:.0f} s are allowed): torchrun would take nodes for lost; set them right "
        "(chrony, NTP)"
    )
