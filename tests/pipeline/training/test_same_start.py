"""What is found before the first step: with stand-ins for the other processes; tests/cluster has real nodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.training import same_start
from pipeline.training.same_start import check_clocks, check_same_start, check_shared_folder, code_hashes, start_facts


class Store(dict):
    """The job's store."""

    def set(self, key, value):
        self[key] = value.encode()

    def get(self, key):
        return self[key]


@pytest.fixture
def rank(monkeypatch):
    """Says which of two ranks the test is, both in one process."""
    store = Store()
    monkeypatch.setattr(same_start.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(same_start.dist.distributed_c10d, "_get_default_store", lambda: store)

    def be(number: int, host: str) -> None:
        monkeypatch.setattr(same_start.dist, "get_rank", lambda: number)
        monkeypatch.setattr(same_start.socket, "gethostname", lambda: host)

    return be


def test_alike_is_well(rank):
    config = load_config(None, [])
    for number, host in enumerate(("n1", "n2")):
        rank(number, host)
        check_same_start(config)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda facts: facts["setting"].update({"optimizer.lr": "0.5"}), "optimizer.lr is 0.001 here, 0.5 there"),
        (lambda facts: facts["version"].update(torch="1.0"), "torch is "),
        (lambda facts: facts["code"].update({"model/decoder.py": "0" * 12}), "model/decoder.py has other contents"),
        (lambda facts: facts["code"].pop("model/decoder.py"), r"model/decoder.py is \w+ here, missing there"),
    ],
)
def test_what_differs_is_named_with_both_nodes(rank, monkeypatch, change, told):
    config = load_config(None, [])
    facts = json.loads(json.dumps(start_facts(config)))
    change(facts)
    rank(0, "n1")
    own = start_facts
    monkeypatch.setattr(same_start, "start_facts", lambda config: facts)
    check_same_start(config)
    monkeypatch.setattr(same_start, "start_facts", own)
    rank(1, "n2")
    with pytest.raises(ValueError, match=f"rank 1 on n2 is not started like rank 0 on n1: {told}"):
        check_same_start(config)


def test_a_hash_for_every_module():
    hashes = code_hashes()
    assert "pipeline/training/same_start.py" in hashes and not any("tests" in name for name in hashes)


class Together:
    """A topology whose reductions give what a test says."""

    def __init__(self, *reduced: list[float]) -> None:
        self.reduced = list(reduced)

    def all_reduce(self, values, op=None):
        return self.reduced.pop(0) if self.reduced else values


def test_a_folder_that_only_this_node_does_not_have_is_refused(rank, monkeypatch, tmp_path):
    rank(1, "n2")
    monkeypatch.setattr(same_start, "SEEN_WITHIN_S", 0.3)
    monkeypatch.setattr(same_start, "on_main", lambda action: Path(tmp_path / "not-here"))
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match=r"run_dir: \S+ on n2 \(rank 1\) is not the folder that rank 0 writes to"):
        check_shared_folder(tmp_path, Together([1.0]))


def test_a_clock_that_is_wrong_is_named(rank, monkeypatch):
    rank(1, "n2")
    now = 1_000_000.0
    monkeypatch.setattr(same_start.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(same_start.time, "time", lambda: now)

    def gather(everyone, own):
        everyone[:] = [(now, "n1"), (now + 61, "n7"), own][: len(everyone)]

    monkeypatch.setattr(same_start.dist, "all_gather_object", gather)
    check_clocks(Together([0.0], [now + 5, -now]))
    with pytest.raises(ValueError, match="the clock of n7 is 61 s ahead of the others'"):
        check_clocks(Together([0.0], [now + 61, -now]))
    monkeypatch.setattr(same_start.dist, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="the clocks of n1 and n7 differ by 61 s"):
        check_clocks(Together([0.0], [now + 61, -now]))
