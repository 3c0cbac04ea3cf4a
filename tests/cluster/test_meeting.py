"""Launchers on two nodes that cannot meet, each for a reason of its own: told in a line, in seconds."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.cluster.lab import NAMESPACES, Lab, Node
from tests.distributed.runs import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

ENDPOINT = "n1:29400"
SCRIPT = f"bash {ROOT}/launch/torchrun.sh greet"
PROGRAM = "import os; print('rank', os.environ['RANK'])"


MEASURE = """
from launch.processes.quiet import quiet_libraries
quiet_libraries()
from pipeline.parallel.links import link_notes
from pipeline.parallel.topology import initialize, shutdown
print(*link_notes(initialize(tensor=1, pipeline=1, timeout_s=60)), sep="\\n", flush=True)
shutdown()
"""


def launch(
    lab: Lab, node: str | Node, *before: str, program: str = PROGRAM, command: str = SCRIPT, **settings: str
) -> subprocess.Popen:
    """`launch/torchrun.sh` on a node, after commands of the shell there."""
    node = lab.nodes[node] if isinstance(node, str) else node
    script = [*before, f"exec {command}"]
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "PYTHONPATH": str(lab.folder)}
    environment |= {"NNODES": "2", "NPROC": "1", "RDZV_ENDPOINT": ENDPOINT, "MODULE": "greeting"} | settings
    (lab.folder / "greeting.py").write_text(program)
    return subprocess.Popen(
        ["nsenter", "--target", str(node.pid), *NAMESPACES, "bash", "-c", "\n".join(script)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*launchers: subprocess.Popen) -> list[tuple[int, str]]:
    try:
        return [(launcher.communicate(timeout=200)[0], launcher.returncode)[::-1] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()


def test_a_name_that_means_the_node_itself_alone_is_said_and_they_meet(lab, tmp_path):
    """As Debian writes it into /etc/hosts."""
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 n2\n10.77.0.1 n1\n")
    own = f"mount --bind {tmp_path}/hosts /etc/hosts; {SCRIPT}"
    first, second = finish(
        launch(lab, "n1", RDZV_ID="names"), launch(lab, "n2", f"exec unshare --mount bash -c '{own}'", RDZV_ID="names")
    )
    assert (first[0], second[0]) == (0, 0), (first, second)
    said, greeting = second[1].splitlines()
    assert said.startswith("infini: this node's own name, n2, has the address 127.0.1.1 here")
    assert {first[1].strip(), greeting} == {"rank 0", "rank 1"}


def test_a_node_whose_own_name_has_no_address_says_so(lab):
    ghost = f"exec unshare --uts bash -c 'hostname ghost; {SCRIPT}'"
    ((code, output),) = finish(launch(lab, "n2", ghost))
    assert code == 2
    assert (
        output.startswith("infini: error: this node's own name, ghost, has no address here: ")
        and output.count("\n") == 1
    )


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""], ids=["talks", "silent"])
def test_another_program_at_the_place_to_meet_is_told(lab, answer):
    foreign = (
        "import socket\ns = socket.create_server(('', 29400))\nprint('up', flush=True)\nkept = []\n"
        f"while True:\n kept.append(s.accept()[0])\n try: kept[-1].sendall({answer!r})\n except OSError: pass\n"
    )
    command = ["nsenter", "--target", str(lab.nodes["n1"].pid), "--net", sys.executable, "-c", foreign]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout.readline() == b"up\n"
            found = finish(launch(lab, "n1"), launch(lab, "n2"))
        finally:
            server.kill()
    for code, output in found:
        assert code == 2, found
        assert output.startswith(f"infini: error: another program listens at the place to meet, {ENDPOINT}, "), output
        assert output.count("\n") == 1


def test_a_node_with_a_slow_link_is_named(lab):
    """Of three, one that sends and gets 20 Mbit/s; the others, as fast as this machine copies."""
    with lab.guest("n3") as third:
        lab.slow_down(third, "20mbit")
        settings = {"program": MEASURE, "NNODES": "3", "RDZV_ID": "links"}
        found = finish(*(launch(lab, node, **settings) for node in ("n1", "n2", third)))
    assert [code for code, _ in found] == [0, 0, 0], found
    usual, slow = "".join(output for _, output in found).split("\n", 1)
    assert usual.startswith("links between 3 nodes: ")
    assert slow.startswith("SLOW, the links between nodes: rank ") and re.search(r"rank \d on n3: [\d.]+ MB/s", slow), (
        found
    )
    assert " on n1" not in slow and " on n2" not in slow
