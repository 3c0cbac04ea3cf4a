"""Start the ranks of a run on this node: torchrun's agent and options, without its noise, passing signals on.

`python -m launch.processes.agent OPTIONS -m MODULE ARGUMENTS...` takes torchrun's options. torchrun itself buries the
reason of a failure under a banner whose 'root cause' is a guess among ranks that fail within the same second, and kills
the ranks 30 s after a signal, however long saving takes.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from launch.processes.claims import CLAIM_FOLDER
from launch.processes.first_failure import FirstFailure
from launch.processes.meeting import MeetingWatch, RunEnded, check_endpoint, check_names, is_range
from launch.processes.passing import SignalPasser
from launch.processes.worker import FOLLOWED, INTERRUPTED, marked_end
from launch.processes.world import LOOPBACK, check_port
from pipeline.training.stopping import JOB_FOLDER, PASSED_ON, STOPPED

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig


def launch_workers(
    module: str, arguments: Sequence[str], nproc: int, master_port: int | None = None, max_restarts: int = 0
) -> int:
    """Run `python -m module arguments...` as `nproc` ranks on this machine and wait for them.

    Args:
        master_port: port on which the ranks meet; None takes a free one.
        max_restarts: when a rank fails, end the others and start all again, so many times at the most.

    Returns:
        See `run_agent`.

    Raises:
        ValueError: the port is in use.
    """
    port = 0 if master_port is None else check_port(master_port)
    options = ["--nproc-per-node", str(nproc), "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{LOOPBACK}:{port}"]
    options += ["--rdzv-id", uuid.uuid4().hex, "--local-addr", LOOPBACK, "--max-restarts", str(max_restarts)]
    return run_agent([*options, "-m", module, *arguments])


def run_agent(torchrun_arguments: Sequence[str]) -> int:
    """Run this node's ranks, as many nodes as the options say, and wait for them.

    Signals are passed on to the ranks, which may finish their step and leave (`launch.processes.passing`). When a rank
    fails, the others are ended.

    Returns:
        0 when every rank returned 0; `STOPPED` when they were told to stop and have saved; `FOLLOWED` when they left
        because of another node's; else the exit code of the rank that failed first, or 128 + the signal's number.

    Raises:
        ValueError: the nodes cannot meet.
    """
    # One thread per rank: ranks on one machine share its cores. The libraries' own warnings about a peer that is gone
    # would bury the reason.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A limit on the run's time counts restarts in (`pipeline.training.resilience.StopRequest`).
    os.environ["INFINI_LAUNCH_TIME"] = str(time.time())
    quiet = os.environ.get("INFINI_DEBUG") != "1" and "TORCH_CPP_LOG_LEVEL" not in os.environ
    if quiet:  # read when torch is loaded: what goes wrong here is said in a line, where torch has thirty
        os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"

    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import PContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousTimeoutError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    if quiet:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # the ranks'
    if os.environ.get("INFINI_DEBUG") != "1":
        # Each of these loggers has a level of its own. They also report the store's end when nodes leave one by one.
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("torch.distributed.elastic"):
                logging.getLogger(name).setLevel(logging.CRITICAL)

    with (
        tempfile.TemporaryDirectory(prefix="infini-") as logs,
        SignalPasser(Path(logs)) as passer,
    ):
        # The agent would kill the ranks 30 s after any other signal; those are passed on instead.
        options = ["--log-dir", logs, "--signals-to-handle", "SIGQUIT"]
        args = parse_args([*options, *torchrun_arguments])
        os.environ[CLAIM_FOLDER] = logs
        elastic = is_range(args.nnodes)
        if args.max_restarts > 0 or elastic:
            # By default all attempts share the agent's store, in which ranks then find the addresses of dead ones
            # ('connection refused'). Without sharing every attempt has a store of its own.
            os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        config, entrypoint, entrypoint_arguments = config_from_args(args)
        endpoint = args.rdzv_endpoint or f"{args.master_addr}:{args.master_port}"
        check_names(endpoint, args.nnodes)
        check_endpoint(endpoint, args.nnodes)
        first = FirstFailure(Path(logs), passer, PContext.close)
        # Not the object itself: of a class's attributes only functions are bound.
        close = mock.patch.object(PContext, "close", lambda ranks, *args, **kwargs: first.close(ranks, *args, **kwargs))
        try:
            with MeetingWatch(endpoint, args.nnodes, Path(logs)), close, _agents(config, Path(logs), elastic):
                elastic_launch(config, entrypoint)(*entrypoint_arguments)
        except ChildFailedError as error:
            return _explain(error, first, passer.ending)
        except RunEnded as end:
            return _told_end(end, endpoint)
        except (RendezvousError, DistError) as error:
            if any(Path(logs).iterdir()):  # the ranks had been started
                print(f"infini: error: the launcher at {endpoint} has ended, or its node is lost", file=sys.stderr)
                return FOLLOWED
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if isinstance(error, RendezvousTimeoutError):
                raise ValueError(
                    f"not all of {args.nnodes} nodes have come to {endpoint} in time (RDZV_CONF=join_timeout=SECONDS "
                    "gives more): were all started with the same RDZV_ENDPOINT and RDZV_ID, do their clocks agree?"
                ) from error
            raise ValueError(
                f"the nodes cannot meet at {endpoint}: is the address right, is the port closed or another program's, "
                f"were all {args.nnodes} node(s) started, do their clocks agree? ({reason})"
            ) from error
        return marked_end(Path(logs))


def _agents(config: LaunchConfig, logs: Path, elastic: bool) -> AbstractContextManager[None]:
    """Inside, torchrun takes our agents."""
    from launch.processes.elastic import elastic_launch, fixed_launch

    return elastic_launch(logs, config.nproc_per_node) if elastic else fixed_launch()


def _told_end(end: RunEnded, endpoint: str) -> int:
    """Exit code of a node that was not among those which trained to the end."""
    how = {0: "well", STOPPED: "stopped, and saved", None: "how, is not known here"}.get(end.code, f"with {end.code}")
    print(f"infini: the run at {endpoint} has ended ({how}) without this node", file=sys.stderr)
    return FOLLOWED if end.code not in (0, STOPPED) else end.code


def _explain(error: ChildFailedError, first: FirstFailure, ending: int | None) -> int:
    """Exit code for failed ranks. They or `first` have said why, unless they followed, or a signal ended them all."""
    if ending == signal.SIGINT:
        return 128 + ending
    # The ranks' own reason goes before a TERM: srun sends it as soon as another node's launcher has left.
    if first.code is not None:
        return first.code
    spoke = [(f.exitcode, rank) for rank, f in sorted(error.failures.items()) if f.exitcode > 0]
    if own := [found for found in spoke if found[0] != FOLLOWED]:
        code, rank = own[0]
        if code == INTERRUPTED:
            print(f"infini: error: rank {rank} was interrupted", file=sys.stderr)
        return code
    if ending is not None:
        return 128 + ending
    print("infini: error: the ranks of this node left because a rank elsewhere failed", file=sys.stderr)
    return FOLLOWED


def _told_to_job(code: int) -> int:
    """Leave this node's exit code for the batch job, which may wait for an srun that never returns.

    srun takes every code but 0 for a failure, and ends the other nodes, of which one may be about to say why: a stop is
    told to the job alone, and so is that this node has followed another.
    """
    if folder := os.environ.get(JOB_FOLDER):
        try:
            Path(folder, f"ended-{os.environ.get('SLURM_NODEID', '0')}").write_text(f"{code}\n")
        except OSError:
            return code
        return 0 if code in (STOPPED, FOLLOWED) else code
    return code


if __name__ == "__main__":
    # For good: until the ranks are there, and while the last lines run, nothing may end this process half-way.
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    try:
        code = run_agent(sys.argv[1:])
    except ValueError as problem:
        print(f"infini: error: {problem}", file=sys.stderr)
        code = 2
    sys.exit(_told_to_job(code))
