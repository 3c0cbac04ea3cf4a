"""Which process of how many this is: what torchrun sets, filled in under srun, in a pod and for a single process.

| started by | what is there | what is filled in |
| --- | --- | --- |
| torchrun | all of `VARIABLES` | nothing |
| one process per pod (Kubeflow's PyTorchJob) | RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT | LOCAL_RANK 0 of 1 |
| srun | the step's SLURM_ variables | all, from those |
| nobody | nothing | a world of one |
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import sys
from collections.abc import Iterator

from data.files import shown
from pipeline.training.elastic import this_attempt

LOOPBACK = "127.0.0.1"
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MAX_PROCESSES = 1_000_000


def join_world(master_port: int | None = None) -> int:
    """Make RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT stand in the environment.

    Args:
        master_port: port of a world of one; None takes a free one.

    Returns:
        The number of processes.

    Raises:
        ValueError: the port is in use, or the variables do not say which process of how many this is.
    """
    env = os.environ
    # SLURM_PROCID alone stands in batch scripts too; the step's variables only in tasks that srun started.
    slurm = "RANK" not in env and "SLURM_STEP_ID" in env and "SLURM_PROCID" in env
    if master_port is not None and ("RANK" in env or slurm):
        raise ValueError(
            f"--master-port {master_port} is for processes that this command starts, but this one was started as a "
            "rank of a run: leave it out, MASTER_PORT says where they meet"
        )
    if "RANK" in env:
        _from_ranks()
    elif slurm:
        _from_slurm()
    else:
        if env.get("WORLD_SIZE", "1") != "1":
            raise ValueError(
                f"WORLD_SIZE={shown(env['WORLD_SIZE'])} stands in the environment, but RANK, which of them this "
                "process is, does not: start the processes with torchrun, srun or --nproc, or unset WORLD_SIZE"
            )
        port = free_port() if master_port is None else check_port(master_port)
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        env.update(MASTER_ADDR=LOOPBACK, MASTER_PORT=str(port))
    return _check_world()


@contextlib.contextmanager
def leaving_no_trace() -> Iterator[None]:
    """What is made of `VARIABLES` inside ends with the block: a process may run another command after this one, and
    libraries take what they find for a launcher's."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def refuse_nproc_in_a_rank() -> None:
    """Raises: ValueError: `--nproc` was given to a process that is one rank of a run."""
    env = os.environ
    if "RANK" not in env:
        return
    who = "torchrun has set" if "TORCHELASTIC_RUN_ID" in env else "the environment has"
    variables = " and ".join(f"{name}={shown(env[name])[1:-1]}" for name in ("RANK", "WORLD_SIZE") if name in env)
    raise ValueError(
        f"--nproc starts processes, but {who} {variables}: this process is one rank of a run. "
        "Leave --nproc out; or start all ranks here with `env -u RANK -u WORLD_SIZE infini ...`; several on "
        "each of several machines are launch/torchrun.sh's"
    )


def attempt_id() -> str:
    """A name that all processes of this launch share: a restart or another launch has another one."""
    env = os.environ
    if attempt := this_attempt():  # nodes that have come later count fewer restarts
        parts = [attempt.launch, str(attempt.number)]
    elif "TORCHELASTIC_RUN_ID" in env:
        parts = [env["TORCHELASTIC_RUN_ID"], env.get("TORCHELASTIC_RESTART_COUNT", "0")]
    else:
        # Where neither torchrun nor Slurm names the launch, the place to meet does.
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
        parts = [env.get(name, "0") for name in names]
    return "".join(c if c.isalnum() else "-" for c in "-".join(parts))


def be_alone() -> None:
    """Make this process, and each that it starts, a world of one: meeting nobody, it needs no address and no port."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")


def free_port() -> int:
    """A TCP port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def check_port(port: int) -> int:
    """Return `port` when it can be listened on.

    Raises:
        ValueError: it is in use or not allowed.
    """
    with socket.socket() as probe:
        # As the store does: a port that lingers after an earlier run is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError) as error:
            in_use = getattr(error, "errno", None) == errno.EADDRINUSE
            reason = "is in use on this machine" if in_use else f"cannot be used ({error})"
            raise ValueError(
                f"--master-port {port} {reason}: give another, or leave it out to take a free one"
            ) from error
    return port


def _from_ranks() -> None:
    """RANK is set. What one process per machine leaves out is filled in."""
    env = os.environ
    if "WORLD_SIZE" not in env:
        raise ValueError(
            f"RANK={shown(env['RANK'])} stands in the environment, but WORLD_SIZE, the number of processes, does not: "
            "set both, or unset RANK for a run of one process"
        )
    if "LOCAL_RANK" not in env:
        if env.get("LOCAL_WORLD_SIZE", "1") != "1":
            raise ValueError(
                f"LOCAL_WORLD_SIZE={shown(env['LOCAL_WORLD_SIZE'])}, but LOCAL_RANK, which says which process of this "
                "machine this is, is not set"
            )
        env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"] = "0", "1"
        if env["WORLD_SIZE"] != "1" and env["RANK"] == "0":
            print("infini: LOCAL_RANK is not set: taken as one process on every machine", file=sys.stderr)
    env.setdefault("LOCAL_WORLD_SIZE", "1" if env["WORLD_SIZE"] == "1" else str(int_variable("LOCAL_RANK") + 1))
    if env["WORLD_SIZE"] == "1":
        env.setdefault("MASTER_ADDR", LOOPBACK)
        env.setdefault("MASTER_PORT", str(free_port()))


def _from_slurm() -> None:
    env = os.environ
    tasks = "SLURM_STEP_NUM_TASKS" if env.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    world = int_variable(tasks)
    if env.get("WORLD_SIZE", str(world)) != str(world):
        raise ValueError(
            f"WORLD_SIZE={shown(env['WORLD_SIZE'])} and {tasks}={world} contradict each other: unset WORLD_SIZE, srun "
            "says how many tasks there are"
        )
    env["WORLD_SIZE"] = str(world)
    env["RANK"] = str(int_variable("SLURM_PROCID"))
    env["LOCAL_RANK"] = str(int_variable("SLURM_LOCALID"))
    env.setdefault("LOCAL_WORLD_SIZE", str(_tasks_on_this_node(int_variable("SLURM_LOCALID") + 1)))
    if "MASTER_ADDR" not in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
        env["MASTER_ADDR"] = LOOPBACK if world == 1 else first_node(nodes)
    # Jobs that share a node must not meet: spread them over the ports by job and step, below those that the kernel
    # gives to outgoing connections (32768 and up), where somebody may sit already.
    step = int(env["SLURM_STEP_ID"]) if env["SLURM_STEP_ID"].isdecimal() else 0
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(20000 + (int_variable("SLURM_JOB_ID") * 10 + step) % 10000)


def first_node(nodes: str) -> str:
    """The first host of a node list in Slurm's notation: `n3` of `n[3-4,7],m1`.

    `scontrol show hostnames` would say it, too, but is not there in a container.

    Raises:
        ValueError: it is none.
    """
    first = re.match(r"((?:[^,\[\]]|\[[^\[\]]*\])*)(?:,|$)", nodes)
    host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[1]) if first else ""
    if not re.fullmatch(r"[\w.-]+", host, re.ASCII):
        raise ValueError(f"cannot find the first node of SLURM_STEP_NODELIST={shown(nodes)}: set MASTER_ADDR")
    return host


def _tasks_on_this_node(least: int) -> int:
    """From SLURM_STEP_TASKS_PER_NODE, such as `4(x2),3`, and SLURM_NODEID; `least` where they do not say."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d{1,6})(?:\(x(\d{1,6})\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = os.environ.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else least


def _check_world() -> int:
    """WORLD_SIZE, when all of `VARIABLES` fit together.

    Raises:
        ValueError: they do not.
    """
    env = os.environ
    world, local_world = (int_variable(name) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if not 1 <= world <= MAX_PROCESSES:
        raise ValueError(f"WORLD_SIZE={world}: must be from 1 to {MAX_PROCESSES:,}")
    if not 1 <= local_world <= world:
        raise ValueError(f"LOCAL_WORLD_SIZE={local_world}: must be from 1 to WORLD_SIZE={world}")
    for name, size in (("RANK", world), ("LOCAL_RANK", local_world)):
        if not 0 <= int_variable(name) < size:
            raise ValueError(f"{name}={int_variable(name)}: must be from 0 to {size - 1}, there are {size} processes")
    if not env.get("MASTER_ADDR"):
        raise ValueError("MASTER_ADDR is not set: it must be the address of rank 0's machine")
    if not 1 <= int_variable("MASTER_PORT") <= 65535:
        raise ValueError(f"MASTER_PORT={int_variable('MASTER_PORT')}: must be a port, from 1 to 65535")
    return world


def int_variable(name: str) -> int:
    """The whole number in an environment variable.

    Raises:
        ValueError: it is not set, or no whole number.
    """
    text = os.environ.get(name)
    if text is None:
        raise ValueError(f"{name} is not set in the environment; {', '.join(VARIABLES)} or none of them must be")
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise ValueError(f"{name}={shown(text)} in the environment is no whole number")
    return int(text)
