"""The first words between the processes of a run: who has not come, which node is out of reach, where a message hangs.

The communication libraries wait half an hour for a process that is not there, and then give an address that nobody
asked for. Here the processes first meet in the job's store; one process of every node then looks whether it reaches
the other nodes, at the addresses that gloo will take; last, each group passes a message under a clock.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import psutil
import torch.distributed as dist

from data.files import some
from pipeline.parallel.naming import ranks_named, ranks_on_hosts

SAY_EVERY_S = 30.0
"""Between two lines about who has not come."""
REACH_S = 10.0
"""For a connection between two nodes."""
FIRST_MESSAGE_S = 120.0
"""For a group's first message, which sets its connections up: seconds, and a minute or so with thousands of ranks."""
ALL_PAIRS = 16
"""Up to so many nodes each one tries all others; beyond, those 1, 2, 4, ... places further, ten of a thousand."""
INTERFACE = "GLOO_SOCKET_IFNAME"


class Node(NamedTuple):
    """Where a node's processes will be looked for."""

    host: str
    address: str
    source: str
    """What the address comes from."""
    port: int
    """Where its first process answers."""
    token: str
    """What it answers: another program may sit at that port of another machine."""

    def __str__(self) -> str:
        return f"{self.host} at {self.address} ({self.source})"


def meet(store: dist.Store, rank: int, world: int, timeout_s: float) -> None:
    """Wait for all processes, and look whether the nodes reach one another.

    Raises:
        ValueError: somebody has not come within `timeout_s`, or a node is out of reach; on all processes.
    """
    leads = os.environ.get("LOCAL_RANK", "0") == "0"
    with contextlib.ExitStack() as stack:
        node = _answering(stack) if leads else None
        store.set(f"here/{rank}", json.dumps(node))
        if rank == 0:
            _await_all(store, world, timeout_s)
            found = [json.loads(store.get(f"here/{each}")) for each in range(world)]
            store.set("nodes", json.dumps([each for each in found if each is not None]))
        if leads:
            nodes = [Node(*each) for each in json.loads(_get(store, "nodes", timeout_s))]
            place = nodes.index(node)
            store.set(f"tried/{place}", json.dumps(_try(place, nodes)))
        if rank == 0:
            tried = [json.loads(_get(store, f"tried/{place}", timeout_s)) for place in range(len(nodes))]
            store.set("verdict", _verdict(nodes, tried))
        verdict = _get(store, "verdict", timeout_s)
    if verdict:
        raise ValueError(verdict)


def own_address() -> tuple[str, str]:
    """The address at which gloo will have this process found, and what it comes from.

    Raises:
        ValueError: the interface that is asked for is not there.
    """
    host = socket.gethostname()
    if names := os.environ.get(INTERFACE):
        name = names.split(",")[0]
        interfaces = psutil.net_if_addrs()
        for each in interfaces.get(name, ()):
            if each.family in (socket.AF_INET, socket.AF_INET6):
                return each.address, f"{INTERFACE}={names}"
        raise ValueError(
            f"{INTERFACE}={names}: {host} has no such interface with an address; it has {some(sorted(interfaces), 8)}"
        )
    with contextlib.suppress(OSError):
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]), "its name's address"
    return "127.0.0.1", "its name has no address"


def _answering(stack: contextlib.ExitStack) -> Node:
    """Listen at this node's address, and say a token to whoever connects, until `stack` is closed."""
    address, source = own_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
    try:
        listener.bind((address, 0))
    except OSError:  # gloo falls back to it, too
        source = f"{source}, {address}, is not this machine's"
        address = "127.0.0.1"
        listener = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        listener.bind((address, 0))
    listener.listen(1024)
    token = secrets.token_hex(8)

    def answer() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # closed
            with contextlib.suppress(OSError), connection:
                connection.sendall(token.encode())

    threading.Thread(target=answer, name="first-contact", daemon=True).start()
    # Closing alone does not wake a thread out of accept.
    stack.callback(lambda: _hang_up(listener))
    return Node(socket.gethostname(), address, source, listener.getsockname()[1], token)


def _hang_up(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)


def _await_all(store: dist.Store, world: int, timeout_s: float) -> None:
    began = said = time.monotonic()
    missing = list(range(world))
    while missing := [each for each in missing if not store.check([f"here/{each}"])]:
        now = time.monotonic()
        if now - began > timeout_s:
            raise ValueError(
                f"{ranks_named(missing)} of {world} have not come within {timeout_s:g} s: look at what their nodes say"
            )
        if now - said > SAY_EVERY_S:
            said = now
            print(
                f"infini: waiting for {ranks_named(missing)} of {world}, for {now - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(0.05)


def _get(store: dist.Store, key: str, timeout_s: float) -> str:
    store.wait([key], datetime.timedelta(seconds=timeout_s + REACH_S))
    return store.get(key).decode()


def _try(own: int, nodes: Sequence[Node]) -> dict[str, str]:
    """Why this node does not reach others, by their places."""
    steps = range(1, len(nodes)) if len(nodes) <= ALL_PAIRS else [2**k for k in range(len(nodes).bit_length())]
    others = {(own + step) % len(nodes) for step in steps} - {own}
    with concurrent.futures.ThreadPoolExecutor(max(1, len(others))) as threads:
        found = zip(others, threads.map(_reach, [nodes[other] for other in others]), strict=True)
        return {str(other): problem for other, problem in found if problem}


def _reach(node: Node) -> str | None:
    try:
        with socket.create_connection((node.address, node.port), timeout=REACH_S) as connection:
            connection.settimeout(REACH_S)
            answer = b"".join(iter(lambda: connection.recv(64), b"")).decode(errors="replace")
    except OSError as error:
        return error.strerror or str(error)
    return None if answer == node.token else "another program answers"


def _verdict(nodes: Sequence[Node], tried: Sequence[dict[str, str]]) -> str:
    """What is wrong, first of all with the node that most others do not reach; empty when all is well."""
    problems = [(source, int(target), why) for source, found in enumerate(tried) for target, why in found.items()]
    if not problems:
        return ""
    # Of two that do not reach one another, the one that somebody else does not reach either.
    times = Counter(target for _, target, _ in problems)
    worst = max(times, key=lambda target: (times[target], nodes[target].address.startswith("127."), target))
    sources = [(source, why) for source, target, why in problems if target == worst]
    told = f"{nodes[worst]} is not reached from {some([f'{nodes[source].host} ({why})' for source, why in sources], 4)}"
    if rest := [f"{nodes[a].host} to {nodes[b].host}" for a, b, _ in problems if b != worst]:
        told += f"; nor is there a way from {some(rest, 4)}"
    return (
        f"{told}: set {INTERFACE} (and NCCL_SOCKET_IFNAME) on that node to the interface that the others see (`ip -br "
        "addr` lists them), correct its name's address in DNS or /etc/hosts, or open the ports between the nodes"
    )


class FirstMessages:
    """Puts groups' first messages under a clock.

    Args:
        store: the job's.
        own: this process's rank.
    """

    uses: ClassVar[Counter[str]] = Counter()
    """By group: its members use it equally often."""

    def __init__(self, store: dist.Store, own: int) -> None:
        self._store, self._own = store, own
        # A copy: the process's own is locked while the main thread waits in it.
        self._watched = store.clone()

    @contextlib.contextmanager
    def within(self, name: str, ranks: Sequence[int]) -> Iterator[None]:
        """Around the first message of a group of these ranks: when it does not pass within `FIRST_MESSAGE_S`, the
        process ends, and says who is not there."""
        if len(ranks) == 1:
            yield
            return
        key = f"first-message/{name}/{ranks[0]}-{ranks[-1]}-{len(ranks)}"
        self.uses[key] += 1
        key += f"/{self.uses[key]}"
        self._store.set(f"{key}/{self._own}", socket.gethostname())
        timer = threading.Timer(FIRST_MESSAGE_S, self._fail, [key, name, ranks])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _fail(self, key: str, name: str, ranks: Sequence[int]) -> None:
        error = RuntimeError(_what_hangs(self._watched, key, name, ranks))
        # What a thread's failure does is the process's affair (`launch.processes.worker` tells it once for all ranks).
        threading.excepthook(threading.ExceptHookArgs((RuntimeError, error, None, threading.current_thread())))
        os._exit(1)


def _what_hangs(store: dist.Store, key: str, name: str, ranks: Sequence[int]) -> str:
    told = f"{name}: its first message has not passed within {FIRST_MESSAGE_S:g} s; "
    try:
        here = {rank: store.get(f"{key}/{rank}").decode() for rank in ranks if store.check([f"{key}/{rank}"])}
    except RuntimeError as error:
        return f"{told}the place where the processes meet is gone ({error})"
    if missing := [rank for rank in ranks if rank not in here]:
        return f"{told}{ranks_named(missing)} not there: look at what that node says; here are {ranks_on_hosts(here)}"
    return (
        f"{told}all of it are there, {ranks_on_hosts(here)}: is the network up between these nodes, and is "
        f"{INTERFACE} or NCCL_SOCKET_IFNAME the interface that they share?"
    )
