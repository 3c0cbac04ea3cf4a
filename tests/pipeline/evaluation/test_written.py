"""What a model writes after a benchmark's prompt: which tokens it is given, and how its words become a score."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from data.tokenizer.tokenizer import byte_tokenizer
from pipeline.config.task_spec import Task
from pipeline.evaluation import plots
from pipeline.evaluation.answers import CONTROLS, COUNTS
from pipeline.evaluation.task_report import BENCHMARK, plot_tasks
from pipeline.evaluation.tasks import task_cells, task_results
from pipeline.evaluation.written import benchmark_score, written_scores

BYTES = byte_tokenizer()


class Writer:
    """Stands for a generator: answers from the prompt, by the text alone; one of two copies of the model."""

    def __init__(self, copy: int) -> None:
        topology = SimpleNamespace(data_size=2, data_rank=copy)
        streamer = SimpleNamespace(topology=topology, max_lanes=3, segment_length=64, add_up=lambda scores: scores)
        self.model = SimpleNamespace(streamer=streamer)
        self.prompts: list[str] = []

    def generate(self, prompts, *, max_new_tokens):
        assert max_new_tokens == 128
        texts = [BYTES.decode(prompt) for prompt in prompts]
        self.prompts += texts
        return [SimpleNamespace(text=self.answer(text)) for text in texts]

    def answer(self, text: str) -> str:
        assert text.endswith(" mentioned in the provided text are")
        return "It is " + text.partition(" is: ")[2].partition(".")[0]  # one of the four values that are asked for


def test_copies_share_the_documents_and_words_in_the_text_count(monkeypatch, tmp_path):
    (tmp_path / "essays.txt").write_text("A mill stood there. " * 30)
    task = Task.parse(f"niah_multivalue:8,length=2K/3K,filler={tmp_path / 'essays.txt'}")
    cells = task_cells(task, BYTES, 64, seed=1)
    copies = [Writer(0), Writer(1)]
    found = [written_scores(copy, cells, lambda tokens: None) for copy in copies]
    scores = [np.add(*pair) for pair in zip(*found, strict=True)]
    assert [own.tolist() for own in scores] == [[0.25] * 8, [0.25] * 8]  # every document once, one value of four
    prompts = [prompt for copy in copies for prompt in copy.prompts]
    assert len(set(prompts)) == len(prompts) == 16
    assert all(0 < len(copy.prompts) < 16 for copy in copies)
    counts = np.ones((len(CONTROLS), 8, COUNTS))
    results = task_results(task, [counts, counts], 1, scores)
    on = [cell for cell in results["cells"] if "benchmark_score" in cell]
    assert [cell["control"] for cell in on] == ["on", "on"]
    assert [cell["benchmark_score"] for cell in on] == pytest.approx([0.25, 0.25])
    whole = {"name": "run", "step": 1, "tasks": {"needles": results}}
    whole["config"] = {"model": {"memory": {"rule": "delta"}}}
    drawn = {}
    monkeypatch.setattr(plots, "score_curves", lambda path, curves, title, **options: drawn.update(options, on=curves))
    plot_tasks(whole, tmp_path, {control: control for control in CONTROLS})
    assert drawn["measure"] == "exact match or score"
    assert [*drawn["on"]] == [*CONTROLS, BENCHMARK]


def test_no_hits_are_no_certainty():
    low, high = benchmark_score(np.zeros(12), 1)["benchmark_score_interval"]
    assert low == pytest.approx(0) and high == pytest.approx(3.8415 / (12 + 3.8415), rel=1e-3)  # Wilson at 0 of 12


def test_other_tasks_are_not_written():
    cells = task_cells(Task.parse("passkey:5,length=1K"), BYTES, 64, seed=1)
    assert written_scores(Writer(0), cells, lambda tokens: None) == [None]
