"""Processes that meet: threads of this one around one store; tests/cluster has real nodes."""

from __future__ import annotations

import concurrent.futures
import re
import socket
import threading
import time

import pytest
import torch.distributed as dist

from pipeline.parallel import first_contact
from pipeline.parallel.first_contact import INTERFACE, FirstMessages, Node, meet, own_address

here = threading.local()
"""Which node a thread is."""


@pytest.fixture
def nodes(monkeypatch):
    """Every thread is a node of its own, n0, n1, ..., and answers at this machine's loopback."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(first_contact.socket, "gethostname", lambda: f"n{here.rank}")
    monkeypatch.setattr(first_contact, "own_address", lambda: ("127.0.0.1", "its name's address"))


def met(world: int, present: int | None = None, timeout_s: float = 60.0) -> list[str]:
    """What comes of it for every process: an error's message, or nothing."""
    store = dist.HashStore()

    def come(rank: int) -> str:
        here.rank = rank
        try:
            meet(store, rank, world, timeout_s)
        except (ValueError, RuntimeError) as error:
            return str(error)
        return ""

    with concurrent.futures.ThreadPoolExecutor(world) as threads:
        return list(threads.map(come, range(world if present is None else present)))


def test_nodes_that_reach_one_another_say_nothing_and_leave_nothing_open(nodes):
    before = threading.active_count()
    assert met(3) == [""] * 3
    deadline = time.monotonic() + 30
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda node: node._replace(address="127.0.0.9", source=f"{INTERFACE}=lo"), "Connection refused"),
        (lambda node: node._replace(token="other"), "another program answers"),
    ],
)
def test_a_node_that_the_others_do_not_reach_is_named_on_all(nodes, monkeypatch, wrong, why):
    answering = first_contact._answering
    monkeypatch.setattr(
        first_contact, "_answering", lambda stack: wrong(answering(stack)) if here.rank == 1 else answering(stack)
    )
    told = met(3)
    assert len(set(told)) == 1
    told = told[0]
    assert re.match(
        rf"n1 at 127\.0\.0\.\d \(.*\) is not reached from n0 \({why}\), n2 \({why}\): set {INTERFACE}", told
    )


def test_who_has_not_come_is_said_again_and_again_and_then_refused(nodes, monkeypatch, capsys):
    monkeypatch.setattr(first_contact, "SAY_EVERY_S", 0.1)
    monkeypatch.setattr(first_contact, "REACH_S", 0.1)
    told = met(4, present=2, timeout_s=0.5)
    assert told[0] == "ranks 2, 3 of 4 have not come within 0.5 s: look at what their nodes say"
    assert capsys.readouterr().err.count("infini: waiting for ranks 2, 3 of 4, for 0 s\n") > 1


def test_many_nodes_try_some_and_few_try_all(monkeypatch):
    asked = []
    monkeypatch.setattr(first_contact, "_reach", lambda node: asked.append(node.port) or None)
    for count, tries in ((5, {0, 1, 3, 4}), (1000, {3, 4, 6, 10, 18, 34, 66, 130, 258, 514})):
        asked.clear()
        first_contact._try(2, [Node(f"n{each}", "", "", each, "") for each in range(count)])
        assert set(asked) == tries


def test_of_two_that_do_not_reach_one_another_the_one_is_named_that_nobody_reaches():
    nodes = [Node(f"n{each}", f"10.0.0.{each}", "its name's address", 1, "") for each in range(4)]
    lost = "Connection timed out"
    told = first_contact._verdict(nodes, [{"2": lost}, {"2": lost}, {"0": lost, "1": lost, "3": lost}, {"2": lost}])
    assert told.startswith(f"n2 at 10.0.0.2 (its name's address) is not reached from n0 ({lost}), n1 ({lost}), n3")
    assert "nor is there a way from n2 to n0, n2 to n1, n2 to n3" in told


def test_the_address_is_the_interfaces_or_the_names(monkeypatch):
    monkeypatch.setenv(INTERFACE, "lo")
    assert own_address() == ("127.0.0.1", f"{INTERFACE}=lo")
    monkeypatch.setenv(INTERFACE, "ib7")
    with pytest.raises(ValueError, match=rf"{INTERFACE}=ib7: \S+ has no such interface with an address; it has .*lo"):
        own_address()
    monkeypatch.delenv(INTERFACE)
    monkeypatch.setattr(first_contact.socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("10.1.2.3", 0))])
    assert own_address() == ("10.1.2.3", "its name's address")

    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(first_contact.socket, "getaddrinfo", unknown)
    assert own_address() == ("127.0.0.1", "its name has no address")


def test_a_first_message_that_does_not_pass_names_who_is_not_there(nodes, monkeypatch):
    failures = []
    monkeypatch.setattr(first_contact, "FIRST_MESSAGE_S", 0.2)
    monkeypatch.setattr(threading, "excepthook", lambda failure: failures.append(str(failure.exc_value)))
    left = threading.Event()
    monkeypatch.setattr(first_contact.os, "_exit", lambda code: left.set())
    store = dist.HashStore()
    here.rank = 0
    monkeypatch.setattr(first_contact.socket, "gethostname", lambda: "n0")
    for ranks, told in (([0, 3], "rank 3 not there: look at what that node says; here are rank 0 on n0"), ([0], None)):
        left.clear()
        with FirstMessages(store, 0).within("data parallelism", ranks):
            assert left.wait(30 if told else 0.5) is (told is not None)
        if told:
            assert failures == [f"data parallelism: its first message has not passed within 0.2 s; {told}"]
    with FirstMessages(store, 0).within("parallel.tensor", [0, 1]):
        store.set("first-message/parallel.tensor/0-1-2/1/1", "n1")
        assert left.wait(30)
    assert "all of it are there, rank 0 on n0, rank 1 on n1: is the network up" in failures[1]
    with FirstMessages(store, 0).within("parallel.tensor", [0, 1]):
        pass
    time.sleep(0.5)
    assert len(failures) == 2
