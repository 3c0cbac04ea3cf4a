"""While the launchers of several nodes look for one another: what is wrong with names, and who is still missing."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from pathlib import Path

from data.files import some
from pipeline.training.stopping import JOB_FOLDER

EVERY_S = 30.0
"""Between two lines about who is missing."""
ANSWER_S = 5.0
"""A launcher's store that listens answers within milliseconds; torch waits for one that never does."""
NODES, HERE = "nodes", "here-"
"""In the batch job's folder: the names of its nodes, in order; one file for each whose launcher has started."""


class RunEnded(Exception):
    """The run has ended without this node, which waited or came too late; `code` says how, where that is known."""

    def __init__(self, code: int | None) -> None:
        super().__init__("the run has ended")
        self.code = code


def is_range(nodes: str) -> bool:
    """Whether torchrun's number of nodes, `MIN:MAX`, leaves it open."""
    least, _, most = nodes.partition(":")
    return bool(most) and least != most


def check_names(endpoint: str, nodes: str) -> None:
    """Look whether this node can be found, and can find the place to meet.

    Args:
        endpoint: host, or host:port.
        nodes: number of nodes, as torchrun takes it; for `1`, or several on this machine, nothing is looked at.

    Raises:
        ValueError: a name has no address.
    """
    host, own = endpoint.rpartition(":")[0] or endpoint, socket.gethostname()
    if nodes in ("1", "1:1") or host in ("127.0.0.1", "localhost"):
        return
    _address(host, f"the place to meet, {endpoint} (RDZV_ENDPOINT or MASTER_ADDR), cannot be found from {own}")
    address = _address(own, f"this node's own name, {own}, has no address here: the others could not connect to it")
    if address.startswith("127.") and "GLOO_SOCKET_IFNAME" not in os.environ:
        _say(
            f"this node's own name, {own}, has the address {address} here (a line in /etc/hosts, as Debian writes it), "
            "where no other node reaches it over gloo: set GLOO_SOCKET_IFNAME to the interface that they see (`ip -br "
            "addr` lists them), or correct the line"
        )


def check_endpoint(endpoint: str, nodes: str) -> None:
    """Look whether it is a launcher that listens at the place to meet, if anybody does yet; as `check_names`.

    Raises:
        ValueError: it is another program.
    """
    host, _, port = endpoint.rpartition(":")
    if nodes in ("1", "1:1") or not port.isdecimal() or port == "0":
        return
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except OSError:
        return  # nobody yet, or no way there: the launcher goes on trying
    from torch.distributed import DistError, TCPStore

    answered = threading.Event()

    def ask() -> None:
        patience = datetime.timedelta(seconds=ANSWER_S)
        with contextlib.suppress(DistError):
            TCPStore(host, int(port), is_master=False, timeout=patience, wait_for_workers=False)
            answered.set()

    asking = threading.Thread(target=ask, name="endpoint", daemon=True)
    asking.start()
    asking.join(2 * ANSWER_S)
    if not answered.is_set():
        raise ValueError(
            f"another program listens at the place to meet, {endpoint}, and not a launcher: give another port, with "
            "RDZV_PORT to launch/slurm/train.sbatch, else in RDZV_ENDPOINT or MASTER_PORT"
        )


def _address(host: str, problem: str) -> str:
    try:
        return str(socket.getaddrinfo(host, None)[0][4][0])
    except OSError as error:
        raise ValueError(f"{problem} ({error}): correct DNS or /etc/hosts, or give an address") from error


class MeetingWatch:
    """Says every `every_s` seconds who is missing, until the ranks have been started; while it is entered.

    Args:
        endpoint: where the launchers meet.
        nodes: how many.
        logs: the launcher's folder, in which something lies when the ranks have been started.
    """

    def __init__(self, endpoint: str, nodes: str, logs: Path, *, every_s: float = EVERY_S) -> None:
        self.endpoint, self.nodes, self.logs, self.every_s = endpoint, nodes, logs, every_s
        folder = os.environ.get(JOB_FOLDER)
        self.job = Path(folder) if folder else None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="meeting", daemon=True)

    def __enter__(self) -> None:
        if self.job is not None:
            with contextlib.suppress(OSError):
                (self.job / f"{HERE}{os.environ.get('SLURMD_NODENAME', socket.gethostname())}").touch()
        if self.nodes not in ("1", "1:1"):
            self._thread.start()

    def __exit__(self, *_) -> None:
        self._done.set()

    def _watch(self) -> None:
        start = time.monotonic()
        while not self._done.wait(self.every_s) and not any(self.logs.iterdir()):
            if line := self.line():
                _say(f"{line}, for {time.monotonic() - start:.0f} s")

    def line(self) -> str | None:
        """Who is missing; None where another node says it."""
        own = os.environ.get("SLURMD_NODENAME", socket.gethostname())
        everywhere = f"{own} is waiting at {self.endpoint} until {self.nodes} nodes are there"
        if self.job is None:
            return everywhere
        try:
            nodes = (self.job / NODES).read_text().split()
        except OSError:
            return everywhere
        here = {path.name.removeprefix(HERE) for path in self.job.glob(f"{HERE}*")}
        if own in nodes and any(node in here for node in nodes[: nodes.index(own)]):
            return None
        missing = [node for node in nodes if node not in here]
        if not missing:
            return f"all {len(nodes)} nodes have started, and cannot meet yet at {self.endpoint}: is its port open?"
        return f"{len(here)} of {len(nodes)} nodes wait at {self.endpoint}; missing: {some(missing, 8)}"


def _say(text: str) -> None:
    print(f"infini: {text}", file=sys.stderr, flush=True)
