"""What the tests bring up goes with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil

from tests.cluster.lab import wait_for
from tests.distributed.runs import ROOT

HOLDER = """
import sys
from pathlib import Path
from tests.cluster.lab import Node
node = Node("n1", Path(sys.argv[1]), "sleep", "600")
node.start_daemon()
while not node.processes():
    pass
print(node.pid, node.processes()[0].pid, flush=True)
sys.stdin.read()
"""


def test_a_node_ends_with_the_process_that_has_brought_it_up(lab, tmp_path):
    (tmp_path / "hosts").touch()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    left = [int(number) for number in holder.stdout.readline().split()]
    assert len(left) == 2 and all(map(psutil.pid_exists, left))
    holder.send_signal(signal.SIGTERM)
    holder.wait()
    wait_for(lambda: not any(map(psutil.pid_exists, left)), "the end of what was left behind", 30)
