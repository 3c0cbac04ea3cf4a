"""What the ranks run in the tests of lm-evaluation-harness."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.evaluation.harness_tasks import HarnessOptions, evaluate_tasks
from pipeline.inference import generate
from tests.distributed.grid import join
from tests.lm_eval_tasks import TASKS
from tests.tiny_run import write_run

generate.initialize = join  # groups of an earlier case for the same layout


def write(folder: str) -> str:
    join(tensor=1, pipeline=1, timeout_s=60)
    return str(write_run(Path(folder), "delta", "hard"))


def answers(run: str, tasks: str, cache: str, out: str, overrides: list[str]) -> dict[str, Any] | None:
    """What the harness says of every task, and every answer; from the main process."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    import datasets

    datasets.config.HF_DATASETS_CACHE = cache
    evaluate_tasks(run, HarnessOptions(tuple(TASKS), folder=tasks), overrides=overrides, out=out)
    if dist.get_rank():
        return None
    samples = {
        task: [json.loads(line) for line in Path(out, f"samples_{task}.jsonl").read_text().splitlines()]
        for task in TASKS
    }
    return {
        "results": json.loads(Path(out, "results.json").read_text()),
        "answers": {
            task: [sample["resps"] for sample in sorted(own, key=lambda sample: sample["doc_id"])]
            for task, own in samples.items()
        },
    }


def unequal_requests(run: str) -> str:
    """The message with which a model refuses requests that differ between processes."""
    from pipeline.evaluation.lm_harness import InfiniLM

    model = InfiniLM(run)
    try:
        model._score([([1, 2], [dist.get_rank()])])
    except ValueError as error:
        return str(error)
    raise AssertionError("it went on")
