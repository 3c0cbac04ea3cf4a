"""The lock of a run folder, and of a store: against processes that live, that are dead, or are on another machine."""

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

from data.files import StoreError, StorePath, decode_json, store
from pipeline.config.load import ConfigError
from pipeline.training import run_lock
from pipeline.training.elastic import ATTEMPT
from pipeline.training.lock_file import DiskLockFile, StoreLockFile
from pipeline.training.run_lock import NAME, RunLock
from tests.data.test_stores import FailingMemory
from tests.data.test_stores import fresh as fresh  # the stores are empty, and impatient

ROOT = Path(__file__).parents[3]
OWNER = """
import sys, time
from pathlib import Path
from pipeline.training.lock_file import DiskLockFile
from pipeline.training.run_lock import RunLock
lock = RunLock(DiskLockFile(Path(sys.argv[1]) / ".lock"), "run_dir", beat_s=0.1, watch_s=1)
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


def locked(folder: Path, **times: float) -> RunLock:
    return RunLock(DiskLockFile(folder / NAME), "run_dir", **times)


def quick(folder: Path) -> RunLock:
    return locked(folder, beat_s=0.05, watch_s=1.0)


def holder(lock: RunLock) -> run_lock.Holder:
    """Whose the lock is."""
    return decode_json(lock.file.read(), run_lock.Holder, NAME)


def taken_at_once(locks: list[RunLock]) -> list[RunLock]:
    """Those of the locks that are had by whoever asks for them, all at the same time."""
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
    return got


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
    lock = locked(tmp_path)  # would watch for 45 s
    while holder(lock).lives_here():
        time.sleep(0.01)
    start = time.monotonic()
    lock.acquire()
    assert time.monotonic() - start < 5
    assert f"process {owner.pid} on" in capsys.readouterr().out
    lock._done.set()


def test_a_number_that_has_a_new_process_is_no_owner(tmp_path):
    lock = quick(tmp_path)
    lock.own = msgspec.structs.replace(lock.own, started=lock.own.started - 3600)
    assert lock.own.lives_here() is False


def test_another_machines_run_is_watched(tmp_path, capsys):
    """Alive while its file changes, whatever the clocks say; dead when it does not."""
    other = quick(tmp_path)
    other.own = msgspec.structs.replace(other.own, machine="another boot", host="n7", job="41")
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


@pytest.mark.parametrize("written", ["", '{"token": "ab'])
def test_half_a_lock_is_watched_too(tmp_path, written):
    (tmp_path / NAME).write_text(written)
    lock = quick(tmp_path)
    lock.acquire()
    lock.release()


def test_of_many_that_take_a_dead_ones_place_one_gets_it(tmp_path, owner, monkeypatch):
    monkeypatch.setattr("builtins.print", lambda *_, **__: None)
    owner.kill()
    owner.wait()
    locks = [locked(tmp_path, beat_s=30, watch_s=0.2) for _ in range(8)]
    got = taken_at_once(locks)
    assert len(got) == 1 and got[0]._is_own() and os.listdir(tmp_path) == [NAME]
    got[0].release()


# In a store

STORE = StorePath("failing://bucket/run")


def in_store(host: str = "n1", settle_s: float = 0.3, **times: float) -> RunLock:
    """That of a run on another machine than the test's, and than those of other hosts."""
    lock = RunLock(StoreLockFile(STORE / NAME, settle_s=settle_s), "checkpoint.store", **{"beat_s": 0.05} | times)
    lock.own = msgspec.structs.replace(lock.own, host=host, machine=host)
    return lock


def test_a_second_run_at_a_store_is_refused_by_name(capsys):
    first = in_store("n7")
    first.acquire()
    with pytest.raises(
        ConfigError, match="checkpoint.store: failing://bucket/run is in use by .* on n7.*choose another"
    ):
        in_store("n8", watch_s=2).acquire()
    first.release()
    assert FailingMemory.store == {}
    second = in_store("n8")
    second.acquire()
    second._done.set()  # no sign of life from now on
    second._thread.join()
    third = in_store("n9", watch_s=0.5)
    third.acquire()
    assert "on n8" in (said := capsys.readouterr().out) and "is gone, its lock is taken over" in said
    assert third.gone == second.own.token
    second.release()  # not its own any more
    assert third._is_own()
    third.release()
    # A dead owner of the run folder's lock is the same process here, and need not be watched.
    in_store("n8").file.write(run_lock._encoded(second.own))
    fourth = in_store("n9")
    fourth.acquire(gone=second.own.token)
    assert "watching" not in capsys.readouterr().out
    fourth.release()


def test_of_many_that_come_to_a_store_at_once_one_gets_it(monkeypatch):
    monkeypatch.setattr("builtins.print", lambda *_, **__: None)
    locks = [in_store(f"n{number}", beat_s=0.2, watch_s=1) for number in range(6)]
    got = taken_at_once(locks)
    assert len(got) == 1 and got[0]._is_own()
    got[0].release()


def test_one_that_was_held_up_takes_a_store_and_the_other_leaves(monkeypatch):
    """The one race that a store leaves: it ends with one owner, the other before it copies anything more."""
    left: list[str] = []
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    monkeypatch.setattr(threading, "excepthook", lambda args: left.append(str(args.exc_value)))
    first, second = in_store("n1", beat_s=30), in_store("n2", beat_s=30, settle_s=0.0)
    late = StoreLockFile.write

    def write(file: StoreLockFile, contents: bytes) -> None:
        if file is second.file:
            first.acquire()  # between the second's last look and its writing
        late(file, contents)

    with monkeypatch.context() as patch:
        patch.setattr(StoreLockFile, "write", write)
        second.acquire()
    with pytest.raises(SystemExit):
        first.confirm()
    assert "failing://bucket/run has been taken over by" in left[0] and "on n2" in left[0]
    second.confirm()
    assert second._is_own()
    first._done.set()
    second.release()


def test_a_store_that_does_not_answer_is_locked_before_the_first_copy(monkeypatch):
    lock = in_store()
    monkeypatch.setenv(store.PATIENCE, "0")
    FailingMemory.faults = [RuntimeError("no route")] * 2
    for attempt in (lock.acquire, lock.confirm):
        with pytest.raises(StoreError, match="no route"):
            attempt()
    lock.confirm()
    assert lock._is_own()
    lock.release()
