"""Evaluation of a run: held-out loss by segment index, passkey retrieval and synthetic tasks, each with its controls.

Every process of the layout calls `evaluate_run`; the first one writes. The layout is the evaluation's own: a checkpoint
can be read on any.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data.files import Place, place
from data.prepared.shards import PreparedSet
from data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from model.config import same_function
from pipeline.checkpoint.find_tokenizer import check_tokenizer
from pipeline.checkpoint.folder import find_checkpoint
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.config.evaluation import evaluation_config
from pipeline.config.load import ConfigError
from pipeline.config.schema import Config
from pipeline.evaluation import passkey, report
from pipeline.evaluation.work import Work, own_sets
from pipeline.inference.generate import Generator
from pipeline.inference.memory_file import Identity
from pipeline.inference.streaming import Document, Streamer, open_checkpoint
from pipeline.parallel.setup import versions
from pipeline.parallel.topology import Topology, initialize, on_main
from pipeline.reporting.console import progress

FORMAT_VERSION = 2
STATISTICS_SEGMENTS = 16
"""Segments in which the gates are measured."""
LONGEST_WAIT = datetime.timedelta(days=7)
"""For the results of other ranks: each runs its documents at its own pace."""


def evaluate_run(
    run_dir: str | Path, *, overrides: Sequence[str] = (), checkpoint: str | Path | None = None, **options: Any
) -> dict[str, Any]:
    """Evaluate a run; collective. `launch.processes.world.join_world` (or torchrun) must have set the environment.

    Args:
        run_dir: the run's folder.
        overrides: `key=value` settings of the evaluation, such as `evaluate.documents=64` or `parallel.tensor=2`.
        checkpoint: a checkpoint's folder; None takes the run's newest.
        options: see `evaluate_checkpoint`, which also says what is returned and raised.
    """
    run_dir = place(run_dir)
    config, topology = join(run_dir, overrides)
    # One looks for all: a run that is going on moves what is its newest.
    path = on_main(lambda: find_checkpoint(place(checkpoint) if checkpoint is not None else run_dir))
    return evaluate_checkpoint(config, topology, run_dir, path, overrides=overrides, **options)


def evaluate_checkpoint(
    config: Config,
    topology: Topology,
    run_dir: Place,
    path: Place,
    *,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    data: Sequence[str] = (),
    with_synthetic: bool = True,
    with_perplexity: bool = True,
    with_passkey: bool = False,
) -> dict[str, Any]:
    """Evaluate a checkpoint on processes that have joined; collective.

    Args:
        config, topology: what `join` gives for `run_dir` and `overrides`.
        path: the checkpoint's folder.
        out: folder for the results; None is `evaluation/<checkpoint>` in the run's folder, which is on a disk then.
        data: prepared sets whose held-out documents are used in place of the run's own.
        with_synthetic, with_perplexity: leave a part out.
        with_passkey: measure the passkey grid even where none were trained, see `passkey.grid_wanted`.

    Returns:
        What `results.json` holds, on every process.

    Raises:
        ValueError: settings, data or checkpoint do not fit (`ConfigError`, `CheckpointError` and their like).
        OSError: something cannot be read or written.
    """
    started = time.perf_counter()
    streamer, reader = open_checkpoint(config, topology, path)
    _check_model(reader, config)
    streamer.group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    notes: list[str] = []
    if not streamer.has_memory:
        notes.append(
            "model.memory.rule is none: there is no memory to turn off, exchange or empty, so there are no controls"
        )
    evaluate = config.evaluate
    sets = _held_out_sets(config, data, reader, notes) if with_perplexity and evaluate.documents else []
    tasks = evaluate.tasks if with_synthetic else []
    grid, note = passkey.grid_wanted(config, overrides, with_passkey) if with_synthetic else (False, "")
    notes.extend([note] if note else [])
    tokenizer = _tokenizer(config, data, reader) if tasks or grid else None
    work = Work(config, sets, tasks, _passkey_rows(config, tokenizer, notes) if grid else [], tokenizer, notes)
    if work.is_empty:
        raise ValueError("; ".join([f"nothing to evaluate in {run_dir}", *notes]))

    results: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "run": str(run_dir),
        "name": config.name,
        "checkpoint": str(path),
        "step": reader.summary.step,
        "training_tokens": reader.summary.tokens,
        "layout": {
            "tensor": topology.tensor_size,
            "context": topology.context_size,
            "pipeline": topology.pipeline_size,
            "data": topology.data_size,
        },
        "seed": evaluate.seed,
        "config": asdict(config),
        "versions": versions(),
        "notes": notes,
        "memory": {},
    }
    told = f"evaluating {config.name} step {results['step']}, tokens"
    generator = None
    if config.parallel.context > 1 or config.parallel.sequence_parallel:
        if any(cell.writes is not None for task in work.tasks for cell in work.cells[task.spec]):
            notes.append(
                "what benchmarks score is left out: nothing is written with parallel.context or sequence_parallel"
            )
    elif tasks:
        identity = Identity(asdict(config.model), reader.summary.sha256, tokenizer.hash)
        generator = Generator(streamer, tokenizer, identity, reader.summary.vocab_size, reader=reader)
    found = work.measure(streamer, lambda total: _progress(topology, total, told), generator)
    tokens = found.pop("tokens")
    results |= found
    if streamer.has_memory:
        documents, eos_id = work.examples()
        results["memory"] = _memory(streamer, documents[: streamer.max_lanes], eos_id)
    seconds = [time.perf_counter() - started]
    dist.broadcast_object_list(seconds, src=0)
    dist.destroy_process_group(streamer.group)
    results["seconds"] = seconds[0]
    results["tokens_per_s"] = tokens / results["seconds"]
    folder = Path(out) if out is not None else run_dir / "evaluation" / path.name
    results = report.without_nan(results | {"folder": str(folder)})
    on_main(lambda: _report(results, folder, run_dir, own_folder=out is not None))
    return results


def _report(results: dict[str, Any], folder: Path, run_dir: Place, *, own_folder: bool) -> None:
    report.write(results, folder, run_dir, own_folder=own_folder)
    report.show(results, folder)


def join(run_dir: Place, overrides: Sequence[str]) -> tuple[Config, Topology]:
    """The configuration of the evaluation, and the processes in its layout; collective."""
    config = evaluation_config(run_dir, overrides, int(os.environ.get("WORLD_SIZE", "1")))
    parallel = config.parallel
    layout = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context}
    return config, initialize(**layout, timeout_s=parallel.timeout_s)


@contextmanager
def _progress(topology: Topology, total: int, description: str) -> Iterator[Callable[[int], None]]:
    if not topology.is_main:
        yield lambda tokens: None
        return
    with progress(total, description) as advance:
        yield advance


def _check_model(reader: CheckpointReader, config: Config) -> None:
    """Refuse another model than the trained one: with some settings the weights load and mean other things. How it is
    computed is the machine's affair."""
    problems = []

    def compare(key: str, trained: Any, wanted: Any) -> None:
        if isinstance(trained, dict):
            for name in trained:
                compare(f"{key}.{name}", trained[name], wanted.get(name))
        elif trained != wanted:
            problems.append(f"{key} is {wanted!r}, but {reader.folder} was trained with {trained!r}")

    compare("model", *(asdict(same_function(model)) for model in (reader.config.model, config.model)))
    if problems:
        raise ConfigError(problems)


def _held_out_sets(
    config: Config, data: Sequence[str], reader: CheckpointReader, notes: list[str]
) -> list[PreparedSet]:
    """Sets with held-out documents: those of `data`, else the run's own, see `own_sets`."""
    sets = [PreparedSet(path, "valid") for path in data] if data else own_sets(config, notes)
    for source in sets:
        if source.vocab_size > reader.summary.vocab_size:
            raise ConfigError(
                [f"{source.path} has tokens up to {source.vocab_size}; the model knows {reader.summary.vocab_size}"]
            )
    untold: list[str] = []
    for source in sets:
        untold = check_tokenizer(reader, source.tokenizer_hash, source.path)
    notes.extend(untold)
    hashes = {source.tokenizer_hash: str(source.path) for source in sets}
    path = config.data.sets[0].path if config.data.sets else None
    if path and (place(path) / "manifest.json").is_file():
        hashes.setdefault(PreparedSet(path).tokenizer_hash, path)  # of the training data
    if len(hashes) > 1:
        raise ConfigError([f"{' and '.join(hashes.values())} were prepared with different tokenizers"])
    return sets


def _memory(streamer: Streamer, documents: list[Document], eos_id: int) -> dict[str, Any]:
    """Gates and the like of every layer, in the first segments of some documents (see `MemoryStatistics`)."""
    batch = streamer.window(documents, 0, STATISTICS_SEGMENTS, eos_id)
    found = streamer.measure(batch, streamer.empty_memory(len(documents)))
    return {
        str(layer): {
            "mix_gate": numbers.mix_gate.tolist(),
            "write_gate": numbers.write_gate.tolist(),
            "write_gate_histogram": numbers.write_gate_histogram.sum(dim=0).tolist(),
            "share_of_output": numbers.memory_share.tolist(),
            "effective_rank": numbers.effective_rank.tolist(),
            "read_variation": numbers.read_variation.tolist(),
        }
        for layer, numbers in found.items()
    }


def _tokenizer(config: Config, data: Sequence[str], reader: CheckpointReader) -> Tokenizer:
    """The tokenizer of the run's first set, or of the first of `data`."""
    paths = [entry.path for entry in config.data.sets if place(entry.path).is_dir()] or list(data)
    if not paths:
        raise ConfigError(
            [
                "the passkey documents need the run's tokenizer, but none of data.sets is there any more: give a "
                "prepared set with --data, or leave them out with --no-passkey"
            ]
        )
    tokenizer = load_tokenizer(paths[0])
    if tokenizer.vocab_size > reader.summary.vocab_size:
        raise ConfigError(
            [
                f"the tokenizer of {paths[0]} has {tokenizer.vocab_size} tokens; the model knows "
                f"{reader.summary.vocab_size}"
            ]
        )
    check_tokenizer(reader, tokenizer.hash, paths[0])
    return tokenizer


def _passkey_rows(config: Config, tokenizer: Tokenizer, notes: list[str]) -> list[passkey.Row]:
    evaluate, length = config.evaluate, config.model.segment_length
    rows = [
        passkey.Row(tokens // length, tuple(row.depths), row.documents, _seeds(evaluate.seed, row.seeds))
        for row in evaluate.passkey_grid
        for tokens in row.lengths
    ] or [
        passkey.Row(segments, tuple(evaluate.passkey_depths), evaluate.passkey_documents, (evaluate.seed,))
        for segments in evaluate.passkey_lengths
        if evaluate.passkey_depths
    ]
    shortest = passkey.shortest_length(tokenizer, length)
    left_out = [row.segments for row in rows if row.segments < shortest]
    if left_out:
        notes.append(
            f"passkey lengths {', '.join(map(str, left_out))} left out: with this tokenizer a document needs "
            f"{shortest} segments of {length} tokens"
        )
    return [row for row in rows if row.segments >= shortest]


def _seeds(first: int, count: int) -> tuple[int, ...]:
    return tuple(range(first, first + count))
