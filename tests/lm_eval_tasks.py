"""Tasks of lm-evaluation-harness over a file, without any download."""

from __future__ import annotations

import json
from pathlib import Path

DOCUMENTS = [f"{'the cat sat on the mat. ' * repeats}Who sat?" for repeats in (1, 3, 7)]
CHOICES = [" the cat", " a zebra with stripes"]
TASKS = ["choose", "go_on", "whole"]
"""Which choice is likelier, what comes next, and how likely a text is."""


def write_tasks(folder: Path) -> Path:
    folder.mkdir()
    rows = [{"document": document, "choices": CHOICES, "answer": 0} for document in DOCUMENTS]
    (folder / "cats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "cats.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{document}}",
        "target_delimiter": "",
    }
    choose = {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}]}
    choose |= {"doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
    go_on = {"output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}
    go_on |= {"doc_to_target": "{{choices[0]}}"}
    go_on |= {"generation_kwargs": {"max_gen_toks": 9, "do_sample": False, "until": ["no such thing"]}}
    whole = {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "byte_perplexity"}]}
    whole |= {"doc_to_text": "", "doc_to_target": "{{document}}"}
    for name, task in zip(TASKS, (choose, go_on, whole), strict=True):
        (folder / f"{name}.yaml").write_text(json.dumps(common | {"task": name} | task))  # JSON is YAML
    return folder
