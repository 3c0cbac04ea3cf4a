"""lm-evaluation-harness runs a task of its own kind on an exported model, over many segments and in padded batches."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers", reason="the extra `hf` is not installed")
lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (docs/huggingface.md)")

from lm_eval.tasks import TaskManager  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from pipeline.huggingface.export_model import export_model  # noqa: E402
from pipeline.inference.generate import Generator  # noqa: E402
from pipeline.parallel.topology import initialize, shutdown  # noqa: E402
from tests.tiny_run import write_run  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

DOCUMENTS = [f"{'the cat sat on the mat. ' * repeats}Who sat?" for repeats in (1, 3, 7)]
CHOICES = [" the cat", " a zebra with stripes"]
TASK = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{document}}",
    "target_delimiter": "",
}


@pytest.fixture
def tasks(tmp_path):
    """Two tasks over a file: which choice is likelier, and what comes next."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"document": document, "choices": CHOICES, "answer": 0} for document in DOCUMENTS]
    (folder / "cats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_kwargs": {"data_files": {"test": str(folder / "cats.jsonl")}}}
    choose = {"task": "choose", "output_type": "multiple_choice", "metric_list": [{"metric": "acc"}]}
    choose |= {"doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
    go_on = {"task": "go_on", "output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}
    go_on |= {"doc_to_target": "{{choices[0]}}"}
    go_on |= {"generation_kwargs": {"max_gen_toks": 9, "do_sample": False, "until": ["no such thing"]}}
    for task in (choose, go_on):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(TASK | data | task))  # JSON is YAML
    return folder


@torch.no_grad()
def test_a_local_task_gives_the_models_own_numbers(tasks, tmp_path, monkeypatch, remote_modules):
    for offline in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(offline, "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    initialize(tensor=1, pipeline=1, timeout_s=60)
    run = write_run(tmp_path / "run", "delta", "hard")
    mine = [completion.text for completion in Generator.open(run).generate(DOCUMENTS, max_new_tokens=9)]
    shutdown()
    export_model(run, tmp_path / "hf")
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "hf"), "trust_remote_code": True, "dtype": "float32"},
        tasks=["choose", "go_on"],
        task_manager=TaskManager(include_path=str(tasks)),
        device="cpu",
        batch_size=3,
        bootstrap_iters=0,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    samples = sorted(results["samples"]["choose"], key=lambda sample: sample["doc_id"])
    hits = []
    for document, sample in zip(DOCUMENTS, samples, strict=True):
        expected = []
        for choice in CHOICES:
            tokens = torch.tensor([list((document + choice).encode())])
            losses = model(tokens).logits[0, :-1].log_softmax(dim=-1).gather(1, tokens[0, 1:, None])
            expected.append(float(losses[-len(choice) :].sum()))
        found = [float(response[0]) for response in sample["filtered_resps"]]
        assert found == pytest.approx(expected, rel=1e-4)
        hits.append(expected[0] > expected[1])
    assert results["results"]["choose"]["acc,none"] == pytest.approx(sum(hits) / len(hits))
    samples = sorted(results["samples"]["go_on"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"][0] for sample in samples] == mine
