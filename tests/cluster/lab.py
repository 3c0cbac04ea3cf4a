"""A real Slurm on two nodes that are namespaces of this machine: own network, processes, mounts and host name each.

    switch (in `ctl`): 10.77.0.10       slurmctld
      |-- n1 10.77.0.1                  slurmd
      |-- n2 10.77.0.2                  slurmd
      `-- n3 10.77.0.3                  for tests of launchers alone, while one has it

Nothing of it outlives the test session, however that ends: a node is a process that reads from a pipe which the session
holds, and what runs in its process namespace ends with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psutil

HOSTS = {"ctl": "10.77.0.10", "n1": "10.77.0.1", "n2": "10.77.0.2", "n3": "10.77.0.3"}
NODES = ("n1", "n2")
COMMANDS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "ip", "nsenter", "unshare")
"""Debian: slurm-wlm, iproute2, util-linux."""
NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid")
PATIENCE_S = 240
"""For a busy machine."""
SMALL_DISK = "256k"

# Preemption by partition: `urgent` takes the nodes of `debug` (a minute of grace) and `abrupt` (none).
CONFIGURATION = """\
ClusterName=lab
SlurmctldHost=ctl(10.77.0.10)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmctldPidFile={dir}/ctl.pid
SlurmdPidFile={dir}/%n.pid
SlurmdSpoolDir={dir}/%n
StateSaveLocation={dir}/state
SlurmctldLogFile={dir}/ctl.log
SlurmdLogFile={dir}/%n.log
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
KillWait=10
MinJobAge=300
SchedulerParameters=bf_interval=2,sched_interval=2
JobRequeue=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeAddr=10.77.0.1 CPUs=8 RealMemory=4000
NodeName=n2 NodeAddr=10.77.0.2 CPUs=8 RealMemory=4000
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=60
PartitionName=abrupt Nodes=n1,n2 MaxTime=60 State=UP PriorityTier=1 GraceTime=0
PartitionName=urgent Nodes=n1,n2 MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""

# Process 1 of a node. It waits for its cable, starts its daemon, and ends with the pipe; as bash it reaps what others
# leave behind.
INIT = """
mount --bind "$1/hosts" /etc/hosts
hostname "$2"
ip link set lo up
echo up
read -r
shift 2
"$@" < /dev/null &
while read -r; do :; done
"""

Found = TypeVar("Found")


def why_not() -> str | None:
    """Why there can be no such Slurm here; None when there can."""
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: slurm-wlm, iproute2)"
    tried = subprocess.run(["unshare", *NAMESPACES, "--fork", "--mount-proc", "true"], capture_output=True, text=True)
    if tried.returncode:
        return f"no right to make namespaces: {tried.stderr.strip()}"
    return None


def wait_for(condition: Callable[[], Found], what: str, patience_s: float = PATIENCE_S) -> Found:
    """Poll until `condition()` is true; returns its value."""
    deadline = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {patience_s} s for {what}"
        time.sleep(0.05)
    return found


def _is_daemon(process: psutil.Process) -> bool:
    try:
        return process.name() == "slurmd"
    except psutil.NoSuchProcess:
        return True


class Node:
    """One machine: a process with its namespaces."""

    def __init__(self, name: str, folder: Path, *daemon: str) -> None:
        self.name = name
        self._folder = folder
        with open(folder / f"{name}.out", "wb") as log:
            self._holder = subprocess.Popen(
                ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "bash", "-c", INIT]
                + ["init", str(folder), name, *daemon],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"SLURM_CONF": str(folder / "slurm.conf")},
            )
        assert self._holder.stdout.readline() == b"up\n", (folder / f"{name}.out").read_text()
        (self._init,) = psutil.Process(self._holder.pid).children()

    @property
    def pid(self) -> int:
        """Of its first process, as this machine counts."""
        return self._init.pid

    def start_daemon(self) -> None:
        self._holder.stdin.write(b"\n")
        self._holder.stdin.flush()

    def run(self, *command: str, cwd: Path | str = "/") -> str:
        """What a command says that runs on this machine; an error is the test's."""
        enter = ["nsenter", "--target", str(self.pid), *NAMESPACES, "sh", "-c", 'cd "$1"; shift; exec "$@"', "sh"]
        environment = os.environ | {"SLURM_CONF": str(self._folder / "slurm.conf")}
        done = subprocess.run(
            [*enter, str(cwd), *command], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == 0, f"{self.name}: {' '.join(command)}: {done.stderr}"
        return done.stdout

    @property
    def is_up(self) -> bool:
        return self._init.is_running()

    def processes(self) -> list[psutil.Process]:
        """What runs on it, its first process left out."""
        return self._init.children(recursive=True)

    def stop(self) -> None:
        """The machine is gone at once, with all that ran on it, and says nobody goodbye."""
        self._holder.kill()
        self._holder.wait()
        self._holder.stdin.close()
        self._holder.stdout.close()


class Lab:
    """The controller and the two nodes."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="infini-lab-"))
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(dir=self.folder))
        table = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in HOSTS.items())]
        (self.folder / "hosts").write_text("\n".join(table) + "\n")
        self.small_disk = self.folder / "small"
        """Full with `SMALL_DISK`. The nodes see it, this machine and nodes that are booted again do not."""
        self.small_disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "lab", str(self.small_disk)], check=True)
        self.controller = Node("ctl", self.folder, "slurmctld", "-D")
        self.controller.run("ip", "link", "add", "switch", "type", "bridge")
        self.controller.run("ip", "addr", "add", f"{HOSTS['ctl']}/24", "dev", "switch")
        self.controller.run("ip", "link", "set", "switch", "up")
        self.controller.start_daemon()
        self.nodes: dict[str, Node] = {}
        for name in NODES:
            self.boot(name)
        # Every node has taken a copy of the mount along.
        subprocess.run(["umount", str(self.small_disk)], check=True)
        self.await_nodes()

    def boot(self, name: str) -> None:
        """Bring up a node that is not there, or no longer."""
        node = self.nodes[name] = Node(name, self.folder, "slurmd", "-D")
        self._connect(node)
        node.start_daemon()

    @contextmanager
    def guest(self, name: str) -> Iterator[Node]:
        """One more node, of which Slurm knows nothing."""
        node = Node(name, self.folder, "sleep", "infinity")
        try:
            self._connect(node)
            node.start_daemon()
            yield node
        finally:
            node.stop()

    def _connect(self, node: Node) -> None:
        name = node.name
        cable = f"to-{name}"
        ends = [cable, "netns", str(self.controller.pid), "type", "veth", "peer", "eth0", "netns", str(node.pid)]
        subprocess.run(["ip", "link", "add", *ends], check=True)
        self.controller.run("ip", "link", "set", cable, "master", "switch")
        self.controller.run("ip", "link", "set", cable, "up")
        # A node that comes again has its old one: others remember it for a minute.
        node.run("ip", "link", "set", "eth0", "address", f"02:00:00:00:00:0{HOSTS[name][-1]}")
        node.run("ip", "addr", "add", f"{HOSTS[name]}/24", "dev", "eth0")
        node.run("ip", "link", "set", "eth0", "up")

    def cut(self, name: str) -> None:
        """Pull a node's cable at the switch: to both sides it looks as if the other had fallen silent."""
        self.controller.run("ip", "link", "set", f"to-{name}", "nomaster")

    def slow_down(self, node: Node, rate: str) -> None:
        """So much, as tc counts, a node sends and gets from now on."""
        limit = ["root", "tbf", "rate", rate, "burst", "32kbit", "latency", "400ms"]
        node.run("tc", "qdisc", "add", "dev", "eth0", *limit)
        self.controller.run("tc", "qdisc", "add", "dev", f"to-{node.name}", *limit)

    def mend(self, name: str) -> None:
        self.controller.run("ip", "link", "set", f"to-{name}", "master", "switch")

    def await_nodes(self) -> None:
        """Until all nodes have nothing to do, and nothing is left on them: the srun which a lost node's job leaves
        behind goes on to end its step, and that of the requeued job has the same number."""

        def left() -> list[psutil.Process]:
            return [process for node in self.nodes.values() for process in node.processes() if not _is_daemon(process)]

        # `idle` alone would do with one node.
        wait_for(lambda: self._idle_nodes() == len(NODES) and not left(), "all of Slurm's nodes")

    def _idle_nodes(self) -> int:
        found = subprocess.run(
            ["nsenter", "--target", str(self.controller.pid), *NAMESPACES, "sinfo", "-h", "-p", "debug", "-t", "idle"]
            + ["-o", "%D"],
            env=os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")},
            capture_output=True,
            text=True,
        ).stdout.strip()
        return int(found or 0)

    def run(self, *command: str, cwd: Path | str = "/") -> str:
        """What a command says that runs on the controller."""
        return self.controller.run(*command, cwd=cwd)

    def close(self) -> None:
        for node in (*self.nodes.values(), self.controller):
            node.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
