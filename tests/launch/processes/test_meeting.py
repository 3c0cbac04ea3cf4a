"""What is said while nodes look for one another."""

from __future__ import annotations

import socket
import time

import pytest

from launch.processes import meeting
from launch.processes.meeting import HERE, NODES, MeetingWatch, check_names
from pipeline.training.stopping import JOB_FOLDER


@pytest.fixture
def names(monkeypatch):
    """Host names and their addresses; this node is `n2`."""
    known = {"n1": "10.0.0.1", "n2": "10.0.0.2"}

    def getaddrinfo(host, port):
        if host not in known:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (known[host], 0))]

    monkeypatch.setattr(meeting.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(meeting.socket, "gethostname", lambda: "n2")
    for name in (JOB_FOLDER, "SLURMD_NODENAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    return known


def test_names_that_are_well_are_passed_over(names, capsys):
    check_names("n1:29400", "2")
    names.clear()
    check_names("127.0.0.1:0", "1")  # one node alone meets nobody
    assert capsys.readouterr().err == ""


def test_an_endpoint_without_an_address_is_refused(names):
    with pytest.raises(ValueError, match=r"the place to meet, typo:29400 \(RDZV_ENDPOINT or MASTER_ADDR\), cannot be"):
        check_names("typo:29400", "2")


def test_a_node_without_an_address_is_refused(names):
    del names["n2"]
    with pytest.raises(ValueError, match="this node's own name, n2, has no address here"):
        check_names("n1:29400", "2")


def test_a_name_that_means_the_node_itself_alone_is_said(names, capsys, monkeypatch):
    names["n2"] = "127.0.1.1"
    check_names("n1:29400", "1:4")
    assert "n2, has the address 127.0.1.1 here" in (said := capsys.readouterr().err) and "GLOO_SOCKET_IFNAME" in said
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    check_names("n1:29400", "2")
    assert capsys.readouterr().err == ""


def test_one_node_of_a_job_says_who_is_missing(names, monkeypatch, tmp_path):
    monkeypatch.setenv(JOB_FOLDER, str(tmp_path))
    (tmp_path / NODES).write_text("n1\nn2\nn3\nn4\n")
    with MeetingWatch("n1:7", "4", tmp_path) as _:
        pass
    watch = MeetingWatch("n1:7", "4", tmp_path)
    assert watch.line() == "1 of 4 nodes wait at n1:7; missing: n1, n3, n4"
    (tmp_path / f"{HERE}n1").touch()
    assert watch.line() is None  # n1 says it
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    assert watch.line() == "2 of 4 nodes wait at n1:7; missing: n3, n4"
    for name in ("n3", "n4"):
        (tmp_path / f"{HERE}{name}").touch()
    assert watch.line().startswith("all 4 nodes have started, and cannot meet yet at n1:7")


def test_it_is_said_again_and_again_until_the_ranks_are_there(names, tmp_path, capsys):
    said = ""
    with MeetingWatch("n1:7", "2", tmp_path, every_s=0.02):
        deadline = time.monotonic() + 60
        while said.count("n2 is waiting at n1:7 until 2 nodes are there, for") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
            said += capsys.readouterr().err
        (tmp_path / "attempt_0").touch()
        time.sleep(0.2)
        capsys.readouterr()
        time.sleep(0.2)
        assert capsys.readouterr().err == ""
