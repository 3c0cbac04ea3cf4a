"""Runs of two ranks whose data and checkpoints lie in an S3 server: nothing is lost, whatever the server does."""

from __future__ import annotations

import re
import shutil
import threading
import time
from typing import Any

import pytest
import torch

from data.files import StorePath
from pipeline.checkpoint.folder import find_checkpoint, whole_checkpoints
from pipeline.checkpoint.reader import CheckpointReader
from tests.data.test_stores import needs_s3fs, upload
from tests.data.test_stores import s3 as s3
from tests.distributed import cases, evaluation_cases, generation_cases, store_cases
from tests.distributed.runs import Run, wait_for
from tests.prepared import write_set
from tests.s3_server import Server

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240), needs_s3fs]


def environment(server: Server, patience_s: int) -> dict[str, str]:
    """What ranks must know of the server."""
    credentials = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_EC2_METADATA_DISABLED": "true"}
    return credentials | {"AWS_ENDPOINT_URL": server.url, "INFINI_STORE_PATIENCE_S": str(patience_s)}


def test_a_run_goes_on_from_its_store_on_another_disk(pools, tmp_path, s3):
    """Its server takes nothing for a while, and is given the rest later. A machine without a file of the run goes on,
    and the server is killed and comes back."""
    data = upload(write_set(tmp_path / "set", [37, 500, 130, 64, 250, 90, 17, 400]), "s3://bucket/set")
    settings = ["train.steps=8", "checkpoint.interval=2", "parallel.zero_stage=2", "checkpoint.keep=2"]

    def train(name: str, store: str, *more: str, patience_s: int = 1, **arguments):
        arguments |= {"folder": str(tmp_path / name), "data": data, "server": str(s3.folder)}
        arguments["overrides"] = [*settings, f"checkpoint.store=s3://bucket/{store}", *more]
        arguments["environment"] = environment(s3, patience_s)
        return pools.run(2, store_cases.train, **arguments)

    undisturbed = train("a", "a")
    there = StorePath("s3://bucket/a")
    assert undisturbed[0]["error"] is None and "uploaded step_00000008 to s3://bucket/a" in undisturbed[0]["printed"]
    assert [path.name for path in whole_checkpoints(there / "checkpoints")] == ["step_00000006", "step_00000008"]
    CheckpointReader(find_checkpoint(there)).verify()
    assert (there / "config.yaml").size() == (tmp_path / "a" / "config.yaml").stat().st_size

    at_once = ["train.steps=4", "checkpoint.asynchronous=false"]
    broken = train("b", "b", *at_once, faults={3: "read-only"})
    assert "UPLOAD TO s3://bucket/b FAILED" in broken[0]["printed"]
    assert broken[0]["error"] == broken[1]["error"] and "all is trained and saved" in broken[0]["error"]
    assert "s3://bucket/b/checkpoints/step_00000004" in broken[0]["error"]
    s3.order()
    assert find_checkpoint(StorePath("s3://bucket/b")).name == "step_00000002"
    assert find_checkpoint(tmp_path / "b").name == "step_00000004"
    again = train("b", "b", *at_once, resume="latest")  # has nothing left to train
    assert again[0]["error"] is None and find_checkpoint(StorePath("s3://bucket/b")).name == "step_00000004"

    shutil.rmtree(tmp_path / "b")
    sign = tmp_path / "step-5"
    away = threading.Thread(target=lambda: _stay_away(s3, sign))
    away.start()
    resumed = train("c", "b", resume="latest", patience_s=60, stop_at=(0, 5, str(sign)))
    away.join()
    assert find_checkpoint(StorePath("s3://bucket/b")).name == "step_00000008"
    for rank, other in zip(resumed, undisturbed, strict=True):
        assert rank["error"] is None and rank["step"] == 8 and rank["lanes"] == other["lanes"]
        tensors, expected = rank["tensors"], other["tensors"]
        assert tensors.keys() == expected.keys()
        assert [name for name in tensors if not torch.equal(tensors[name], expected[name])] == []


def _stay_away(server, sign) -> None:
    wait_for(sign.exists, "step 5")
    server.kill()
    time.sleep(1)
    server.start()


def test_a_run_in_a_store_is_read_like_the_one_on_the_disk(pools, tmp_path, s3):
    """Evaluated, continued in text, and trained on from its weights, by two ranks in layouts of their own."""
    data = upload(write_set(tmp_path / "set", [300, 90, 41, 200]), "s3://bucket/set")
    run = tmp_path / "run"

    def ranks(case, **arguments):
        return pools.run(2, store_cases.within, environment=environment(s3, 60), case=case, **arguments)[0]

    def use(at: str, name: str) -> dict[str, Any]:
        out = str(tmp_path / name)
        small = ["evaluate.documents=2", "evaluate.max_segments=4"]
        found = ranks(evaluation_cases.evaluate, run=at, overrides=small, out=f"{out}-evaluation")
        assert found["checkpoint"] == f"{at}/checkpoints/step_00000002"
        begun = {"folder": out, "data": data, "overrides": [f"train.init_from={at}", "parallel.tensor=2"], "steps": 1}
        return {key: found[key] for key in ("step", "perplexity", "memory")} | {
            "texts": ranks(generation_cases.completions, run=at, overrides=["parallel.tensor=2"]),
            "losses": ranks(cases.train_steps, **begun)["losses"],
        }

    ranks(cases.train_steps, folder=str(run), data=data, overrides=["train.steps=4"], steps=2, save=True)
    url, here = upload(run, "s3://bucket/run"), use(str(run), "here")
    shutil.rmtree(run)
    assert use(url, "there") == here and here["step"] == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_whose_set_is_fetched_while_it_trains(tmp_path, s3):
    """Each step draws ten documents from all over a set of twenty times the cache. The server is killed in the middle:
    it comes back, or it does not and the run goes on later."""
    data = upload(write_set(tmp_path / "set", [400] * 8000), "s3://bucket/set")
    settings = ["train.steps=30", "train.segments_per_window=64", "metrics.interval=1", "checkpoint.interval=2"]

    def start(name: str, *options: str, patience_s: int = 60) -> Run:
        run = Run(tmp_path / name, data, *settings)
        run.start(*options, INFINI_STORE_CACHE_MIB="1", INFINI_STORE_PATIENCE_S=str(patience_s))
        return run

    def kill_server_at(run: Run, step: int) -> None:
        wait_for(lambda: run.newest() >= step, f"the checkpoint of step {step}")
        s3.kill()
        wait_for(lambda: re.search(r"s3://bucket/set/train-\d+\.tar .*: try 1 failed", run.text()), "a failed request")

    undisturbed = start("undisturbed")
    assert undisturbed.wait() == 0, undisturbed.text()

    waits = start("waits")
    kill_server_at(waits, 4)
    time.sleep(2)
    s3.start()
    assert waits.wait() == 0, waits.text()
    assert "the store answers again" in waits.text()
    assert waits.losses() == undisturbed.losses() and waits.result() == undisturbed.result()

    stops = start("stops", patience_s=1)
    kill_server_at(stops, 4)
    assert stops.wait() == 2
    assert re.search(r"error: s3://bucket/set/train-\d+\.tar \(bytes [^)]*\): the store failed \d+ times", stops.text())
    assert 4 <= stops.newest() < 30
    s3.start()
    resumed = start("stops", "--resume")
    assert resumed.wait() == 0, resumed.text()
    assert resumed.losses() == undisturbed.losses() and resumed.result() == undisturbed.result()
