"""A run folder's lock: against processes that live, that are dead, and that are on another machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from pipeline.config.load import ConfigError
from pipeline.training import run_lock
from pipeline.training.elastic import ATTEMPT
from pipeline.training.run_lock import NAME, RunLock

ROOT = Path(__file__).parents[3]
OWNER = """
import sys, time
from pathlib import Path
from pipeline.training.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]), beat_s=0.1, watch_s=1)
lock.acquire()
print("has it", flush=True)
sys.stdin.readline()
lock.release()
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "has it\n"
    yield process
    process.kill()
    process.communicate()


def quick(folder: Path) -> RunLock:
    return RunLock(folder, beat_s=0.05, watch_s=1.0)


def test_a_second_run_is_refused_by_name(tmp_path, owner):
    with pytest.raises(ConfigError, match=f"in use by process {owner.pid} on {socket.gethostname()}, since 20"):
        quick(tmp_path).acquire()
    owner.communicate("\n")
    assert owner.returncode == 0 and list(tmp_path.iterdir()) == []
    lock = quick(tmp_path)
    lock.acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_owner_is_told_at_once_on_its_machine(tmp_path, owner, capsys):
    owner.kill()  # a zombie until somebody waits for it
    lock = RunLock(tmp_path)  # would watch for 45 s
    while lock._read()[1].lives_here():
        time.sleep(0.01)
    start = time.monotonic()
    lock.acquire()
    assert time.monotonic() - start < 5
    assert f"process {owner.pid} on" in capsys.readouterr().out
    lock._done.set()


def test_a_number_that_has_a_new_process_is_no_owner(tmp_path):
    lock = quick(tmp_path)
    lock.own = run_lock.msgspec.structs.replace(lock.own, started=lock.own.started - 3600)
    assert lock._create() and lock._read()[1].lives_here() is False


def test_another_machines_run_is_watched(tmp_path, capsys):
    """Alive while its file changes, whatever the clocks say; dead when it does not."""
    other = quick(tmp_path)
    other.own = run_lock.msgspec.structs.replace(other.own, machine="another boot", host="n7", job="41")
    other.acquire()
    with pytest.raises(ConfigError, match="on n7, Slurm job 41"):
        quick(tmp_path).acquire()
    other._done.set()  # no sign of life from now on
    other._thread.join()
    mine = quick(tmp_path)
    mine.acquire()
    assert "is gone, its lock is taken over" in capsys.readouterr().out
    other.release()  # not its own any more
    assert mine._is_own()
    mine.release()


def test_an_earlier_start_of_the_same_launch_is_not_watched(tmp_path, monkeypatch, capsys):
    """Its ranks have ended when the launchers meet again, whatever became of the node that had the lock."""

    def start(number: int, launch: str) -> RunLock:
        attempt = {"number": number, "launch": launch, "min_nodes": 1, "max_nodes": 2}
        monkeypatch.setenv(ATTEMPT, json.dumps(attempt))
        return quick(tmp_path)

    before = start(0, "this")
    elsewhere = msgspec.structs.replace(before.own, machine="another boot", host="n2")
    (tmp_path / NAME).write_text(json.dumps(msgspec.to_builtins(elsewhere)))
    after = start(1, "this")
    after.acquire()
    assert "on n2" in (said := capsys.readouterr().out) and "taken over" in said and "watching" not in said
    after.release()
    (tmp_path / NAME).write_text(json.dumps(msgspec.to_builtins(elsewhere)))
    other = start(1, "other")
    other.acquire()
    assert "watching" in capsys.readouterr().out
    other.release()


def test_an_owner_that_has_lost_it_leaves(tmp_path, owner):
    content = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps(content | {"token": "somebody", "host": "n7"}))
    assert owner.wait(60) == 1


def test_half_a_lock_is_watched_too(tmp_path):
    (tmp_path / NAME).write_text('{"token": "ab')
    lock = quick(tmp_path)
    lock.acquire()
    lock.release()


def test_of_many_that_take_a_dead_ones_place_one_gets_it(tmp_path, owner, monkeypatch):
    monkeypatch.setattr("builtins.print", lambda *_, **__: None)
    owner.kill()
    owner.wait()
    locks = [RunLock(tmp_path, beat_s=30, watch_s=0.2) for _ in range(8)]
    got, ready = [], threading.Barrier(len(locks))

    def take(lock: RunLock) -> None:
        ready.wait()
        try:
            lock.acquire()
            got.append(lock)
        except ConfigError:
            pass

    threads = [threading.Thread(target=take, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and got[0]._is_own() and os.listdir(tmp_path) == [NAME]
    got[0].release()
