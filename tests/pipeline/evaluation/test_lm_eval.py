"""lm-evaluation-harness on a checkpoint (`infini`) and on its export (the harness's own `hf`): the same tokens and
numbers, over many segments and in padded batches."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch.distributed as dist

pytest.importorskip("transformers", reason="the extra `hf` is not installed")
lm_eval = pytest.importorskip("lm_eval", reason="the extra `lm-eval` is not installed")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import pipeline.evaluation.lm_harness  # noqa: E402, F401 (registers the model `infini`)
from launch.cli import USER_ERROR, main  # noqa: E402
from launch.processes.world import VARIABLES  # noqa: E402
from pipeline.huggingface.export_model import export_model  # noqa: E402
from pipeline.parallel.topology import initialize, shutdown  # noqa: E402
from tests.lm_eval_tasks import CHOICES, DOCUMENTS, TASKS, write_tasks  # noqa: E402
from tests.tiny_run import write_run  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A run and its export, both in float64."""
    folder = tmp_path_factory.mktemp("models")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    initialize(tensor=1, pipeline=1, timeout_s=60)
    run = write_run(folder / "run", "delta", "hard")
    export_model(run, folder / "hf")
    own = get_model("infini").create_from_arg_obj({"checkpoint": str(run)}, {"batch_size": 3})
    arguments = {"pretrained": str(folder / "hf"), "trust_remote_code": True, "dtype": "float64"}
    yield own, get_model("hf").create_from_arg_obj(arguments, {"batch_size": 3, "device": "cpu"})
    shutdown()


@pytest.mark.usefixtures("remote_modules")
def test_every_request_of_a_task_is_answered_as_by_the_export(models, tmp_path):
    folder = write_tasks(tmp_path / "tasks")
    results = [
        lm_eval.simple_evaluate(
            model, tasks=TASKS, task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=0, num_fewshot=1
        )
        for model in models
    ]
    counted = 0
    for task in TASKS:
        ours, theirs = (sorted(found["samples"][task], key=lambda sample: sample["doc_id"]) for found in results)
        assert len(ours) == len(theirs) == len(DOCUMENTS)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine["arguments"] == other["arguments"]
            for (own,), (expected,) in zip(mine["resps"], other["resps"], strict=True):
                if isinstance(expected, tuple):
                    assert own == (pytest.approx(expected[0], rel=1e-9), expected[1])
                else:
                    assert own == (expected if isinstance(expected, str) else pytest.approx(expected, rel=1e-9))
                counted += 1
    assert counted == len(DOCUMENTS) * (len(CHOICES) + 2)
    assert results[0]["results"]["choose"] == results[1]["results"]["choose"]


def test_texts_become_the_same_tokens(models):
    own, other = models
    for context, end in [("a b ", "c"), ("Größe", " 1"), ("x" * 40, "\n"), (" ", "y")]:
        assert own._encode_pair(context, end) == other._encode_pair(context, end)
    assert own.prefix_token_id == other.prefix_token_id and own.eot_token_id == other.eot_token_id
    requests = [Instance("loglikelihood", {}, ("", " the cat sat on the mat"), 0)]
    ((ours, _),), ((theirs, _),) = own.loglikelihood(requests), other.loglikelihood(requests)
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_likelihoods_of_all_next_tokens_are_a_distribution(models):
    """Independent of both models' sums: over all bytes and the end token, probabilities sum to one."""
    own, _ = models
    context = own.tok_encode(DOCUMENTS[2])
    found = own._loglikelihood_tokens([(("", ""), context, [token]) for token in range(257)])
    assert sum(math.exp(total) for total, _ in found) == pytest.approx(1.0, abs=1e-9)
    assert sum(greedy for _, greedy in found) == 1


def test_settings_that_would_be_left_out_are_refused(models):
    own, _ = models
    request = Instance("generate_until", {}, ("a", {"until": ["x"], "num_beams": 4}), 0)
    with pytest.raises(ValueError, match="num_beams = 4"):
        own.generate_until([request])
    with pytest.raises(ValueError, match="continuation is empty"):
        own._loglikelihood_tokens([(("a", ""), [1], [])])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lm-eval-limit", "3"], "--lm-eval-limit is for the tasks of --lm-eval"),
        (["--lm-eval", "choose", "--passkey"], "leave --passkey out"),
        (["--lm-eval", "choose", "--lm-eval-tasks", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_contradictions_are_refused(arguments, message, capsys):
    assert main(["evaluate", "run", *arguments]) == USER_ERROR
    assert message in capsys.readouterr().err


def test_the_command_writes_results_and_answers(models, tmp_path):
    run = models[0].generator.reader.folder.parents[1]
    folder = write_tasks(tmp_path / "tasks")
    command = [sys.executable, "-m", "launch.cli", "evaluate", str(run)]
    options = ["--lm-eval", "choose", "--lm-eval-tasks", str(folder)]
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment["HF_DATASETS_CACHE"] = str(tmp_path / "datasets")
    ran = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    shown = ran.stdout
    (target,) = (run / "evaluation").glob("*/lm_eval")
    results = json.loads((target / "results.json").read_text())
    samples = [json.loads(line) for line in (target / "samples_choose.jsonl").read_text().splitlines()]
    assert len(samples) == results["n-samples"]["choose"]["effective"] == len(DOCUMENTS)
    right = sum(sample["acc"] for sample in samples) / len(samples)
    assert results["results"]["choose"]["acc,none"] == pytest.approx(right)
    assert f"{right:.4f}" in shown
