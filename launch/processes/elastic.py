"""torchrun's agent, and its c10d rendezvous for a number of nodes that may change, with what they lack.

- A rank fails with what another start cannot mend (code 2): with MAX_RESTARTS torchrun starts the ranks again. Here the
  run ends.
- The node where the launchers meet falls silent (power, cable): torchrun waits for it for a quarter of an hour. Here
  for two minutes.

And where the number of nodes may change:

- A rank fails, or a node is lost: torchrun starts the ranks of all nodes again, MAX_RESTARTS times in all. Here so many
  times without a new checkpoint in between.
- A node is lost without a word (power, cable): under torchrun the ranks hang until a collective gives up. Here its
  launcher's heartbeat is missed, and the ranks are started again.
- A node comes: torchrun kills the ranks. Here they finish their step and save before, and only if more of them can
  train then.
- Nodes are there that the layout cannot use: their ranks wait (`launch.processes.reserve`).
- Nodes beyond MAX wait, as under torchrun, and take the place of one that is lost.

What a start is about (its number, which nodes have gone and come, how far the run was) the launchers agree on through
the rendezvous' store, and tell the ranks (`pipeline.training.elastic.Attempt`).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from unittest import mock

import msgspec
from torch.distributed import DistError, Store
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousGracefulExitError,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout
from torch.distributed.launcher import api

from launch.processes.meeting import RunEnded
from launch.processes.worker import INTERRUPTED, NOT_NEEDED, REGROUPED_MARK, STOPPED_MARK, mark_end, marked_end
from pipeline.parallel.silence import give_up_on_silence
from pipeline.training.elastic import (
    ACTIVE,
    ATTEMPT,
    NODES,
    SAVED,
    Attempt,
    Reached,
    progress_of,
    told_by_ranks,
    write_nodes,
)
from pipeline.training.stopping import STOPPED

BEATS = 5
"""A launcher that has missed so many heartbeats is lost."""
NODES_PER_BEAT_S = 100
"""Heartbeats and looks of all launchers together in a second, at the most: each writes, or reads, the whole list."""
LAST_CALL_FIRST_S, LAST_CALL_S = 30, 3
"""Wait for more nodes when the least number is there: at the start of the launch; later, when all that still live have
met already."""
FORCE_S = 5
"""Ranks that another node has left behind have so long to leave by themselves."""
SHOWN = 8
"""Names of nodes in a message."""
ENDED = "infini/ended"
FINAL = (2, INTERRUPTED)
"""Exit codes of ranks after which another start would not help."""


def beat_s(max_nodes: int) -> int:
    """Seconds between two heartbeats of a launcher."""
    return max(2, max_nodes // NODES_PER_BEAT_S)


class _Timeouts(RendezvousTimeout):
    """As given, with a shorter last call once the nodes have met."""

    met = False
    first_call_s = LAST_CALL_FIRST_S

    @property
    def last_call(self) -> timedelta:
        return timedelta(seconds=LAST_CALL_S if self.met else self.first_call_s)


class ElasticRendezvous(DynamicRendezvousHandler):
    """Where the launchers meet, again and again."""

    store: Store
    logs: Path
    """The launcher's own folder."""
    nproc: int
    """Ranks of this node."""
    attempt: Attempt | None = None
    world = 0
    """Nodes of this attempt."""
    missing: Collection[int] = ()
    """Those that have gone."""
    changed = False
    """The ranks are to be started again."""
    _look_at = 0.0

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the others; sets the environment's `ATTEMPT` for the ranks.

        Raises:
            RunEnded: there is nobody to meet any more.
            RendezvousTimeoutError: too few nodes have come.
        """
        left = progress_of(self.logs)
        info = self._meet()
        self.settings.timeout.met = True
        self.world, self.missing, self.changed = info.world_size, (), False
        # The clocks of two nodes may differ: what travels is how long ago it was.
        reached = left and msgspec.structs.replace(left, time=time.time() - left.time)
        info.store.set(f"infini/node/{info.rank}", msgspec.json.encode((_own_name(), reached)).decode())
        if info.rank == 0:
            info.store.set("infini/attempt", msgspec.json.encode(self._agree(info)).decode())
        text = info.store.get("infini/attempt").decode()
        self.attempt = msgspec.json.decode(text, type=Attempt)
        os.environ[ATTEMPT] = text
        if info.rank == 0:
            _say(f"{info.world_size} node(s): {self.attempt}")
        return info

    def _meet(self) -> RendezvousInfo:
        if self.attempt is not None:
            _say(f"{_own_name()}: nodes have gone or come; meeting again, {self.settings.min_nodes} must be there")
        while True:
            try:
                return super().next_rendezvous()
            except RendezvousTimeoutError:
                # Others train, and this node was not needed: it goes on waiting.
                if not self._state_holder.state.complete:
                    raise
            except (RendezvousClosedError, RendezvousGracefulExitError):
                raise RunEnded(self.end_code()) from None

    def _agree(self, info: RendezvousInfo) -> Attempt:
        """What this start is; on the first node alone."""
        store = self.store
        number = store.add("infini/attempts", 1) - 1
        launch = store.compare_set("infini/launch", "", uuid.uuid4().hex).decode()
        told = [info.store.get(f"infini/node/{rank}") for rank in range(info.world_size)]
        nodes = [msgspec.json.decode(text, type=tuple[str, Reached | None]) for text in told]
        names = [name for name, _ in nodes]
        before: list[str] = msgspec.json.decode(store.get("infini/nodes")) if number else names
        store.set("infini/nodes", msgspec.json.encode(names).decode())
        reached = [each for _, each in nodes if each is not None]
        farthest = max(reached, key=lambda each: (each.step, -each.time), default=None)
        return Attempt(
            number=number,
            launch=launch,
            min_nodes=self.settings.min_nodes,
            max_nodes=self.settings.max_nodes,
            lost=_few(sorted(set(before) - set(names))),
            joined=_few(sorted(set(names) - set(before))),
            before=farthest and msgspec.structs.replace(farthest, time=time.time() - farthest.time),
        )

    def look(self) -> bool:
        """See which nodes have gone or come: sets `missing` and `changed`, and tells the ranks what waits. True when
        it was time to look again."""
        now = time.monotonic()
        if now < self._look_at:
            return False
        self._look_at = now + max(1.0, self.settings.max_nodes / NODES_PER_BEAT_S)
        waiting = super().num_nodes_waiting()
        ranks = set(self._state_holder.state.participants.values())
        self.missing = set(range(self.world)) - ranks
        active = told_by_ranks(self.logs, ACTIVE)
        needed = self.world if active is None else -(-int(active) // self.nproc)
        if any(rank < needed for rank in self.missing):
            self.changed = True
        elif waiting:
            nodes = min(len(ranks) + waiting, self.settings.max_nodes)
            write_nodes(self.logs, nodes, nodes * self.nproc)
        return True

    def num_nodes_waiting(self) -> int:
        """What torchrun's agent asks to know whether to start the ranks again."""
        return int(self.changed)

    def tell_end(self, code: int) -> None:
        """The ranks of this node have ended with this code, for good."""
        try:
            self.store.compare_set(ENDED, "", str(code))
        except DistError:
            pass

    def end_code(self) -> int | None:
        """How the run has ended, if a node says so."""
        try:
            return int(self.store.get(ENDED)) if self.store.check([ENDED]) else None
        except DistError:
            return None

    def shutdown(self) -> bool:
        """Close it: nobody can come any more."""
        state = self._state_holder.state
        spares = bool(state.wait_list or state.redundancy_list)
        closed = super().shutdown()
        if closed and spares:
            time.sleep(3)  # those that wait look once a second, and the store may end with this process
        return closed


class FixedAgent(LocalElasticAgent):
    """torchrun's agent of one node of a fixed number. A start that was refused is not tried again: the second one would
    take the folder of another run, for which the first was refused, for its own."""

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, int]:
        give_up_on_silence()  # of the node where the launchers meet
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if _is_final(result):
            self._remaining_restarts = 0
        return result


class ElasticAgent(FixedAgent):
    """The same, where the number of nodes may change."""

    saved: str | None = None
    """The newest checkpoint at the last failure."""

    @property
    def _rendezvous_handler(self) -> ElasticRendezvous:
        return self._worker_group.spec.rdzv_handler

    def run(self, role: str = "default") -> RunResult:
        result = super().run(role)
        failed = [failure.exitcode for failure in result.failures.values()]
        rendezvous = self._rendezvous_handler
        rendezvous.tell_end(max(failed, default=0) if result.is_failed() else marked_end(rendezvous.logs))
        return result

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, int]:
        for name in (NODES, ACTIVE, NOT_NEEDED, REGROUPED_MARK, STOPPED_MARK):
            (self._rendezvous_handler.logs / name).unlink(missing_ok=True)
        return super()._start_workers(worker_group)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        (self._rendezvous_handler.logs / NOT_NEEDED).touch()
        self._shutdown(signal.SIGTERM, FORCE_S)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result, rendezvous = super()._monitor_workers(worker_group), self._rendezvous_handler
        if result.state is WorkerState.HEALTHY:
            if rendezvous.look() and self._is_idle() and (code := rendezvous.end_code()) is not None:
                if code not in (0, STOPPED):
                    raise RunEnded(code)
                mark_end(rendezvous.logs, code)
        elif result.state is WorkerState.SUCCEEDED:
            if (rendezvous.logs / REGROUPED_MARK).exists():
                rendezvous.changed = True
                return RunResult(WorkerState.HEALTHY)
            rendezvous.tell_end(marked_end(rendezvous.logs))
        elif result.state is WorkerState.FAILED:
            if not _is_final(result) and (saved := told_by_ranks(rendezvous.logs, SAVED)) != self.saved:
                self.saved, self._remaining_restarts = saved, worker_group.spec.max_restarts
        return result

    def _is_idle(self) -> bool:
        """Whether no rank of this node trains."""
        active = told_by_ranks(self._rendezvous_handler.logs, ACTIVE)
        return active is not None and self._worker_group.workers[0].global_rank >= int(active)

    def _exit_barrier(self) -> None:
        if self._rendezvous_handler.missing:  # they do not come
            self._exit_barrier_timeout = 5
        super()._exit_barrier()


def _is_final(result: RunResult) -> bool:
    return any(failure.exitcode in FINAL for failure in result.failures.values())


@contextmanager
def fixed_launch() -> Iterator[None]:
    """Inside, torchrun's launcher takes `FixedAgent`."""
    with mock.patch.object(api, "LocalElasticAgent", FixedAgent):
        yield


@contextmanager
def elastic_launch(logs: Path, nproc: int) -> Iterator[None]:
    """Inside, torchrun's launcher takes this module's rendezvous and agent.

    Args:
        logs: this launcher's folder.
        nproc: ranks of this node.
    """

    def create(parameters: RendezvousParameters) -> ElasticRendezvous:
        beat = parameters.get_as_int("keep_alive_interval", beat_s(parameters.max_nodes))
        timeouts = _Timeouts(join=_seconds(parameters, "join_timeout"))
        timeouts.first_call_s = parameters.get_as_int("last_call_timeout", LAST_CALL_FIRST_S)
        backend, store = create_backend(parameters)
        handler = ElasticRendezvous.from_backend(
            parameters.run_id,
            store,
            backend,
            parameters.min_nodes,
            parameters.max_nodes,
            parameters.local_addr,
            timeouts,
            keep_alive_interval=beat,
            keep_alive_max_attempt=parameters.get_as_int("keep_alive_max_attempt", BEATS),
        )
        handler.store, handler.logs, handler.nproc = store, logs, nproc
        return handler

    with (
        mock.patch.object(api.rdzv_registry, "get_rendezvous_handler", create),
        mock.patch.object(api, "LocalElasticAgent", ElasticAgent),
    ):
        yield


def _seconds(parameters: RendezvousParameters, name: str) -> timedelta | None:
    given = parameters.get_as_int(name)
    return None if given is None else timedelta(seconds=given)


def _own_name() -> str:
    """Of this launcher: several on one host are several nodes."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _few(names: list[str]) -> list[str]:
    """So many that they fit into a line, and into the environment."""
    return names if len(names) <= SHOWN else [*names[:SHOWN], f"{len(names) - SHOWN} more"]


def _say(text: str) -> None:
    print(f"infini: {text}", file=sys.stderr, flush=True)
