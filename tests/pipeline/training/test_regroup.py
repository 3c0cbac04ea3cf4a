"""Who trains when nodes have gone or come, and when it is worth starting again."""

from __future__ import annotations

import time

import pytest

from pipeline.config.layout import usable_processes
from pipeline.config.load import load_config
from pipeline.training import elastic
from pipeline.training.elastic import ATTEMPT, CLAIM_FOLDER, NODES, Attempt, Reached
from pipeline.training.regroup import Regroup, check_least, recovery, told_idle


def configured(tensor: int, pipeline: int, lanes: int, **others: int):
    heads = ["model.num_attention_heads=8", "model.num_query_groups=8", "model.num_layers=8"]
    layout = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"train.lanes={lanes}"]
    return load_config(None, [*heads, *layout, *(f"train.{key}={value}" for key, value in others.items())])


@pytest.mark.parametrize(
    ("layout", "world", "usable"),
    [
        ((1, 1, 64), 64, 64),
        ((1, 1, 64), 63, 32),  # 63 does not divide the lanes, nor does any number down to 33
        ((1, 1, 60), 7, 6),
        ((8, 1, 12), 56, 48),  # seven copies of the model would fit
        ((2, 4, 16), 7, 0),  # no copy fits
        ((8, 4, 1024), 8192, 8192),
        ((8, 4, 1024), 8184, 4096),  # one node of 1,024 is lost
        ((8, 4, 1020), 8184, 8160),  # the same with a number of lanes that has more divisors
    ],
)
def test_the_most_processes_that_can_train(layout, world, usable):
    assert usable_processes(configured(*layout), world) == usable


def test_context_ranks_go_together():
    layout = ["parallel.context=4", "parallel.tensor=2", "train.lanes=6", "train.segments_per_window=8"]
    config = load_config(None, layout)
    assert [usable_processes(config, world) for world in (7, 8, 23, 48, 63)] == [0, 8, 16, 48, 48]
    assert "8 for parallel.tensor = 2 x parallel.context = 4 x parallel.pipeline = 1" in told_idle(config, 23, 16)


def test_lanes_of_a_microbatch_count():
    assert usable_processes(configured(1, 1, 12, lanes_per_microbatch=4), 4) == 3


def attempt(**changes) -> Attempt:
    return Attempt(**({"number": 1, "launch": "x", "min_nodes": 2, "max_nodes": 4} | changes))


def test_the_least_number_of_nodes_must_hold_the_model():
    check_least(configured(8, 2, 16), attempt(), 8)
    with pytest.raises(ValueError, match=r"NNODES=2:4: 2 node\(s\) of 4 .* must be 4"):
        check_least(configured(8, 2, 16), attempt(), 4)


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    monkeypatch.setenv(CLAIM_FOLDER, str(tmp_path))
    monkeypatch.setenv(ATTEMPT, "set")
    monkeypatch.setenv("LOCAL_RANK", "0")
    return tmp_path


def test_ranks_start_again_only_where_more_of_them_can_train(launcher):
    regroup = Regroup(configured(1, 1, 64), 32)
    assert regroup.wanted() == (False, None)
    elastic.write_nodes(launcher, 5, 40)
    wanted, told = regroup.wanted()
    assert not wanted and "5 nodes are there, but 40 processes could not be used better: 32 train" in told
    assert regroup.wanted() == (False, None)  # said once
    elastic.write_nodes(launcher, 8, 64)
    wanted, told = regroup.wanted()
    assert wanted and "64 processes in place of 32" in told


def test_nothing_is_told_where_the_number_of_nodes_is_fixed(launcher, monkeypatch):
    monkeypatch.delenv(ATTEMPT)
    elastic.write_nodes(launcher, 8, 64)
    elastic.tell_progress(3, 300)
    assert Regroup(configured(1, 1, 64), 32).wanted() == (False, None)
    assert [path.name for path in launcher.iterdir()] == [NODES]


def test_the_launcher_knows_how_far_the_ranks_were(launcher):
    assert elastic.progress_of(launcher) is None
    elastic.tell_progress(3, 300)
    elastic.tell_progress(4, 400)
    reached = elastic.progress_of(launcher)
    assert (reached.step, reached.tokens) == (4, 400) and time.time() - reached.time < 60
    assert {path.name for path in launcher.iterdir()} == {elastic.PROGRESS}


def test_what_a_change_has_cost():
    before = Reached(step=57, tokens=5700, time=time.time() - 30)
    told, values = recovery(
        attempt(number=2, lost=["n2:7"], before=before), start_step=50, start_tokens=5000, data_size=3
    )
    assert values["recovery/steps_recomputed"] == 7 and values["recovery/tokens_recomputed"] == 700
    assert values["recovery/seconds"] == pytest.approx(30, abs=5)
    assert "attempt 2, without n2:7" in told and "from step 57" in told and "to step 51" in told
    told, values = recovery(attempt(), start_step=50, start_tokens=5000, data_size=3)
    assert "not known" in told and "recovery/seconds" not in values
