"""Runs of two ranks whose data and checkpoints lie in an S3 server: nothing is lost, whatever the server does."""

from __future__ import annotations

import shutil
import threading
import time

import pytest
import torch

from data.files import StorePath
from pipeline.checkpoint.folder import find_checkpoint, whole_checkpoints
from pipeline.checkpoint.reader import CheckpointReader
from tests.data.test_stores import needs_s3fs, upload
from tests.data.test_stores import s3 as s3
from tests.distributed import store_cases
from tests.distributed.runs import wait_for
from tests.prepared import write_set

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240), needs_s3fs]


def test_a_run_goes_on_from_its_store_on_another_disk(pools, tmp_path, s3):
    """Its server takes nothing for a while, and is given the rest later. A machine without a file of the run goes on,
    and the server is killed and comes back."""
    data = upload(write_set(tmp_path / "set", [37, 500, 130, 64, 250, 90, 17, 400]), "s3://bucket/set")
    credentials = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_EC2_METADATA_DISABLED": "true"}
    settings = ["train.steps=8", "checkpoint.interval=2", "parallel.zero_stage=2", "checkpoint.keep=2"]

    def train(name: str, store: str, *more: str, patience_s: int = 1, **arguments):
        arguments |= {"folder": str(tmp_path / name), "data": data, "server": str(s3.folder)}
        arguments["overrides"] = [*settings, f"checkpoint.store=s3://bucket/{store}", *more]
        arguments["environment"] = credentials | {
            "AWS_ENDPOINT_URL": s3.url,
            "INFINI_STORE_PATIENCE_S": str(patience_s),
        }
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
