"""The launcher between its first rank's failure and the end of the others, with ranks that are only codes."""

from __future__ import annotations

import signal
import time
from types import SimpleNamespace

import pytest

from launch.processes import first_failure
from launch.processes.claims import CLAIM_FOLDER, Claim
from launch.processes.first_failure import FirstFailure
from launch.processes.worker import FOLLOWED


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """The launcher's folder; a launch of two nodes, of which this one has ranks 2 and 3."""
    folder = tmp_path / "launcher"
    folder.mkdir()
    monkeypatch.setenv(CLAIM_FOLDER, str(folder))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "17")
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(first_failure.socket, "gethostname", lambda: "n2")
    return folder


def ranks(*codes):
    """Of this node. A code that is a function is asked each time."""
    polls = [code if callable(code) else (lambda code=code: code) for code in codes]
    return SimpleNamespace(
        subprocess_handlers={
            place: SimpleNamespace(proc=SimpleNamespace(poll=poll)) for place, poll in enumerate(polls)
        },
        envs={place: {"RANK": str(2 + place), "TORCHELASTIC_RESTART_COUNT": "0"} for place in range(len(codes))},
    )


def end(launcher, found, ending=None) -> FirstFailure:
    """What comes of it when these ranks are closed."""
    closed = []
    first = FirstFailure(launcher, SimpleNamespace(ending=ending), lambda *arguments: closed.append(arguments))
    first.close(found, None, 30)
    first.close(found, signal.SIGTERM, 30)
    assert closed == [(found, None, first_failure.KILL_S), (found, signal.SIGTERM, first_failure.KILL_S)]
    return first


@pytest.mark.parametrize(
    ("code", "said", "told"),
    [
        (-signal.SIGKILL, "rank 3 on n2 was killed by SIGKILL; the kernel does that when memory runs out", 137),
        (-signal.SIGSEGV, "rank 3 on n2 was killed by SIGSEGV", 139),
        (3, "rank 3 on n2 ended with code 3, and has not said why", 3),
    ],
)
def test_a_rank_that_ends_without_a_word_is_claimed_for_on_all_nodes(launcher, tmp_path, capsys, code, said, told):
    elsewhere = Claim(tmp_path / "run")
    assert end(launcher, ranks(None, code)).code == told
    assert capsys.readouterr().err == f"infini: error: {said}\n"
    assert elsewhere.is_taken() and not elsewhere.take()


@pytest.mark.parametrize("code", [-signal.SIGKILL, 2])
def test_who_ends_after_another_ones_claim_is_not_the_reason(launcher, tmp_path, capsys, code):
    assert Claim(tmp_path / "run").take()
    assert end(launcher, ranks(None, code)).code is None
    assert capsys.readouterr().err == ""


def test_ranks_that_the_launcher_has_interrupted_are_no_failures(launcher, tmp_path, capsys):
    claim = Claim(tmp_path / "run")
    assert end(launcher, ranks(None, -signal.SIGKILL), ending=signal.SIGINT).code is None
    assert end(launcher, ranks(None, -signal.SIGHUP), ending=signal.SIGHUP).code is None
    assert capsys.readouterr().err == "" and not claim.is_taken()


def test_a_rank_that_had_no_place_for_its_claim_yet_is_named(launcher, capsys):
    """Killed before it knew the run folder; one that ends then with a code has said why itself."""
    assert end(launcher, ranks(-signal.SIGKILL, None)).code == 137
    assert "rank 2 on n2 was killed" in capsys.readouterr().err
    assert end(launcher, ranks(2, None)).code is None
    assert capsys.readouterr().err == ""


def test_a_follower_does_not_have_the_one_killed_that_is_saying_why(launcher):
    speaks_until = time.monotonic() + 0.3
    end(launcher, ranks(lambda: None if time.monotonic() < speaks_until else 2, FOLLOWED))
    assert time.monotonic() >= speaks_until


def test_the_one_that_fails_has_so_long_and_no_longer(launcher, monkeypatch):
    """It is elsewhere, say, and this node's last rank hangs."""
    monkeypatch.setattr(first_failure, "SPEAK_S", 0.2)
    began = time.monotonic()
    end(launcher, ranks(None, FOLLOWED))
    assert 0.2 <= time.monotonic() - began < 10
