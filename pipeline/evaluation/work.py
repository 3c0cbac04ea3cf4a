"""What an evaluation measures: documents that are chosen, and tasks whose options fit, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from data.prepared.shards import PreparedSet
from data.synthetic import is_synthetic
from data.tokenizer.tokenizer import Tokenizer
from pipeline.config.schema import Config, EvaluateConfig
from pipeline.config.task_spec import Task
from pipeline.evaluation import answers, heldout, passkey, written
from pipeline.evaluation.tasks import task_cells, task_results
from pipeline.inference.generate import Generator
from pipeline.inference.streaming import Document, Streamer

PASSKEY = "passkey"
"""Name of the passkey grid's cells; a task's is its spec."""

Shown = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""From the tokens that there are to run, what is told how many of them are done."""


class Work:
    """Held-out documents, tasks and a passkey grid, each possibly empty.

    Args:
        config: whose `evaluate` and segment length count.
        sets: held-out documents.
        tasks: specs of tasks.
        rows: of the passkey grid.
        tokenizer: of tasks and grid; None without them.
        notes: gets what a reader should know.

    Raises:
        ValueError: a set has no document to evaluate, or a task does not fit.
    """

    def __init__(
        self,
        config: Config,
        sets: Sequence[PreparedSet],
        tasks: Sequence[str],
        rows: Sequence[passkey.Row],
        tokenizer: Tokenizer | None,
        notes: list[str],
    ) -> None:
        self.segment_length, self.seed = config.model.segment_length, config.evaluate.seed
        self.reset_every = config.evaluate.reset_every
        self.tokenizer, self.rows = tokenizer, rows
        self.held_out = [(source, _documents(source, config.evaluate, self.segment_length, notes)) for source in sets]
        self.tasks = [Task.parse(spec) for spec in tasks]
        self.cells = {task.spec: task_cells(task, tokenizer, self.segment_length, self.seed) for task in self.tasks}
        if rows:
            self.cells[PASSKEY] = passkey.passkey_cells(rows, tokenizer, self.segment_length)

    @property
    def is_empty(self) -> bool:
        return not self.held_out and not self.cells

    def examples(self) -> tuple[list[Document], int]:
        """Some documents, and the token that pads them."""
        if self.held_out:
            source, documents = self.held_out[0]
            return documents, source.eos_id
        return [cell.make(0) for own in self.cells.values() for cell in own], self.tokenizer.eos_id

    def measure(self, streamer: Streamer, shown: Shown, generator: Generator | None = None) -> dict[str, Any]:
        """Run all of it; collective.

        Args:
            generator: the same model, to write what benchmarks score; None leaves that out.

        Returns:
            `tokens` that were run; `perplexity` by the path of the set: what `heldout.summarize` says, and
            `each_document`; `passkey`: `passkey.passkey_results`, None without rows; `tasks` by their specs:
            `tasks.task_results`.

        Raises:
            Interrupted: see `Streamer`.
        """
        plans = {name: answers.plan(streamer, own) for name, own in self.cells.items()}
        total = sum(document.length - 1 for _, documents in self.held_out for document in documents)
        total += sum(own.tokens for own in plans.values())
        writing = [] if generator is None else [cell for task in self.tasks for cell in self.cells[task.spec]]
        total += written.tokens_to_read(writing, self.segment_length)
        results: dict[str, Any] = {"tokens": total, "perplexity": {}, "passkey": None, "tasks": {}}
        counts = {}
        with shown(total) as advance:
            for source, documents in self.held_out:
                sums = heldout.segment_losses(streamer, documents, source.eos_id, advance, reset_every=self.reset_every)
                each = heldout.each_document(sums, [document.name for document in documents])
                results["perplexity"][str(source.path)] = heldout.summarize(sums, self.seed) | {"each_document": each}
            for name, own in plans.items():
                counts[name] = answers.measure(streamer, own, self.tokenizer.eos_id, advance)
            scores = written.written_scores(generator, writing, advance) if writing else []
        if self.rows:
            results["passkey"] = passkey.passkey_results(self.rows, counts[PASSKEY], self.segment_length, self.seed)
        for task in self.tasks:
            count = len(self.cells[task.spec])
            results["tasks"][task.spec] = task_results(task, counts[task.spec], self.seed, scores[:count])
            scores = scores[count:]
        return results


def own_sets(config: Config, notes: list[str]) -> list[PreparedSet]:
    """A run's sets that hold documents out, without the synthetic ones, unless there are only these."""
    sets = []
    for path in dict.fromkeys(entry.path for entry in config.data.sets):
        if "valid" in PreparedSet(path).manifest.splits:
            sets.append(PreparedSet(path, "valid"))
        else:
            notes.append(f"{path} holds no documents out: nothing to evaluate in it")
    text = [source for source in sets if not _is_synthetic(source)]
    if text:
        notes.extend(f"{source.path}: synthetic documents only, not used" for source in sets if source not in text)
        sets = text
    return sets


def _is_synthetic(source: PreparedSet) -> bool:
    sources = source.manifest.sources
    return bool(sources) and all(is_synthetic(entry.spec) for entry in sources)


def _documents(source: PreparedSet, evaluate: EvaluateConfig, segment_length: int, notes: list[str]) -> list[Document]:
    documents = heldout.choose_documents(
        source,
        documents=evaluate.documents,
        max_segments=evaluate.max_segments,
        segment_length=segment_length,
        seed=evaluate.seed,
    )
    full = sum(document.segments(segment_length) == evaluate.max_segments for document in documents)
    if full < evaluate.documents:
        notes.append(
            f"{source.path}: {len(documents)} held-out documents, {full} of them with the {evaluate.max_segments} "
            f"segments of {segment_length} tokens asked for"
        )
    if len(documents) == 1:
        notes.append(
            f"{source.path}: of one document there is no 95 % interval, and no other whose memory it could read"
        )
    return documents
