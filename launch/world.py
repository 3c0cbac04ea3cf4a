"""Which process of how many this is: what torchrun sets, filled in under srun and for a single process."""

from __future__ import annotations

import errno
import os
import socket
import subprocess

LOOPBACK = "127.0.0.1"


def join_world(master_port: int | None = None) -> int:
    """Make RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT stand in the environment.

    torchrun sets them. Under srun they follow from Slurm's variables. Without a launcher this is a world of one.

    Args:
        master_port: port of a world of one; None takes a free one.

    Returns:
        The number of processes.

    Raises:
        ValueError: the port is in use.
    """
    env = os.environ
    if "RANK" not in env:
        # SLURM_PROCID alone stands in batch scripts too; the step's variables only in tasks that srun started.
        if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
            _from_slurm()
        else:
            port = free_port() if master_port is None else check_port(master_port)
            env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
            env.update(MASTER_ADDR=LOOPBACK, MASTER_PORT=str(port))
    return int(env["WORLD_SIZE"])


def attempt_id() -> str:
    """A name that all processes of this launch share: a restart or another launch has another one."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        parts = [env["TORCHELASTIC_RUN_ID"], env.get("TORCHELASTIC_RESTART_COUNT", "0")]
    else:
        # Where neither torchrun nor Slurm names the launch, the place to meet does.
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
        parts = [env.get(name, "0") for name in names]
    return "".join(c if c.isalnum() else "-" for c in "-".join(parts))


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


def _from_slurm() -> None:
    env = os.environ
    env["RANK"] = env["SLURM_PROCID"]
    env["WORLD_SIZE"] = env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    env.setdefault("LOCAL_WORLD_SIZE", env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0])
    if "MASTER_ADDR" not in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        if listed.returncode or not listed.stdout.split():
            raise ValueError(f"cannot find the first node of {nodes} with scontrol: set MASTER_ADDR")
        env["MASTER_ADDR"] = listed.stdout.split()[0]
    # Jobs that share a node must not meet: spread them over the ports by job and step, below those that the kernel
    # gives to outgoing connections (32768 and up), where somebody may sit already.
    step = int(env["SLURM_STEP_ID"]) if env["SLURM_STEP_ID"].isdigit() else 0
    env.setdefault("MASTER_PORT", str(20000 + (int(env["SLURM_JOB_ID"]) * 10 + step) % 10000))
