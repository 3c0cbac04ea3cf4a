"""What the ranks run in the tests of the evaluation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data.prepared.shards import PreparedSet
from data.tokenizer.tokenizer import byte_tokenizer
from model.rules.state import named_tensors
from pipeline.checkpoint.folder import find_checkpoint
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.config.evaluation import evaluation_config
from pipeline.config.schema import Config
from pipeline.config.task_spec import Task
from pipeline.evaluation import answers, evaluate, heldout
from pipeline.evaluation.tasks import task_cells
from pipeline.inference.streaming import Document, Streamer, array_document, open_checkpoint, window
from pipeline.parallel.setup import build_stage
from tests.distributed import bptt_cases
from tests.distributed.grid import join

evaluate.initialize = join  # groups of an earlier case for the same layout
evaluate_run = evaluate.evaluate_run


def evaluate(run: str, **arguments: Any) -> dict[str, Any]:
    """`evaluate_run` as one of the ranks."""
    return evaluate_run(run, **arguments)


def refusal(run: str, **arguments: Any) -> str:
    """The message with which `evaluate_run` refuses."""
    try:
        evaluate_run(run, **arguments)
    except ValueError as error:
        return str(error)
    raise AssertionError("it was evaluated")


def _open(run: str, **model_memory: Any) -> tuple[Config, Streamer, CheckpointReader]:
    config = evaluation_config(Path(run), [], dist.get_world_size() if dist.is_initialized() else 1)
    memory = dataclasses.replace(config.model.memory, **model_memory)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, memory=memory))
    topology = join(tensor=1, pipeline=1, timeout_s=60)
    return config, *open_checkpoint(config, topology, find_checkpoint(Path(run)))


def _documents(data: str, segment_length: int) -> tuple[list[Document], int]:
    source = PreparedSet(data, "valid")
    chosen = heldout.choose_documents(source, documents=4, max_segments=8, segment_length=segment_length, seed=5)
    return chosen, source.eos_id


def _losses(batch, output) -> torch.Tensor:
    """Summed loss per document and segment."""
    return (output.loss.double() * batch.loss_weight).sum(dim=2)


def streamed_and_whole(run: str, data: str) -> dict[str, Any]:
    """The same documents in one window, in windows of 1, 2 and 4 segments, and by `heldout.segment_losses`."""
    config, streamer, _ = _open(run)
    documents, eos = _documents(data, config.model.segment_length)
    results = {}
    for step in (8, 4, 2, 1):
        memory, pieces = streamer.empty_memory(len(documents)), []
        for first in range(0, 8, step):
            batch = streamer.window(documents, first, step, eos)
            output = streamer.run(batch, memory)
            memory = output.memory
            pieces.append(_losses(batch, output))
        results[step] = torch.cat(pieces, dim=1)
    return {"windows": results, "sums": heldout.segment_losses(streamer, documents, eos, lambda tokens: None)}


def controls(run: str, data: str) -> dict[str, Any]:
    """What the controls are said to be, computed another way."""
    config, streamer, _ = _open(run)
    documents, eos = _documents(data, config.model.segment_length)
    sums = heldout.segment_losses(streamer, documents, eos, lambda tokens: None, reset_every=3)

    _, plain, _ = _open(run, rule="none")
    batch = plain.window(documents, 0, 8, eos)
    without_memory = _losses(batch, plain.run(batch, plain.empty_memory(len(documents))))

    # Segment 3 of document 0 behind the first three segments of document 1.
    first, second = documents[:2]
    history = window([second], 0, 3, config.model.segment_length, eos, torch.device("cpu"))
    memory = streamer.run(history, streamer.empty_memory(1)).memory
    batch = window([first], 3, 1, config.model.segment_length, eos, torch.device("cpu"))
    exchanged = _losses(batch, streamer.run(batch, memory))
    windows = [streamer.window(documents, start, min(3, 8 - start), eos) for start in (0, 3, 6)]
    alone = [_losses(batch, streamer.run(batch, streamer.empty_memory(len(documents)))) for batch in windows]
    return {
        "sums": sums,
        "without_memory": without_memory,
        "exchanged": float(exchanged),
        "emptied": torch.cat(alone, dim=1),
    }


def sliding_off(run: str) -> dict[str, Any]:
    """Answer counts of passkey documents with a sliding context: as evaluated, and with the memory off throughout."""
    config = evaluation_config(Path(run), [], 1)
    topology = join(tensor=1, pipeline=1, timeout_s=60)
    streamer, _ = open_checkpoint(config, topology, find_checkpoint(Path(run)))
    tokenizer = byte_tokenizer()
    (cell,) = task_cells(Task.parse("passkey:4,length=600,depth=0.5"), tokenizer, streamer.segment_length, seed=1)
    documents = [cell.make(number) for number in range(4)]
    found = answers.measure(streamer, answers.plan(streamer, [cell]), tokenizer.eos_id, lambda tokens: None)
    length = streamer.segment_length
    last = min((document.answers[0][0] - 1) // length for document in documents)
    rest = max(document.segments(length) for document in documents) - last
    memory = streamer.empty_memory(4)
    for segment in range(last):
        memory = streamer.read(streamer.window(documents, segment, 1, tokenizer.eos_id), memory, memory_off=True)
    batch = streamer.window(documents, last, rest, tokenizer.eos_id)
    whole = streamer.run(batch, memory, memory_off=True, correct=True)
    back = max(0, last - streamer.local_reach)
    earlier = streamer.empty_memory(4)
    for segment in range(back):
        earlier = streamer.read(streamer.window(documents, segment, 1, tokenizer.eos_id), earlier)
    with_memory = earlier
    for segment in range(back, last):
        window = streamer.window(documents, segment, 1, tokenizer.eos_id)
        earlier = streamer.read(window, earlier, memory_off=True)
        with_memory = streamer.read(window, with_memory)
    losses = [_losses(batch, streamer.run(batch, state, memory_off=True)) for state in (memory, earlier, with_memory)]
    return {"losses": losses, "counts": found[0], "whole": answers.count_right(batch, whole, documents, last * length)}


def shared_windows(overrides: list[str], windows: list[int]) -> dict[int, dict[str, Any]]:
    """Three documents in windows of so many segments, run by each of two processes and by both together, float64."""
    config = bptt_cases.load([*overrides, "model.segment_length=4"])
    tokens = np.random.default_rng(3).integers(0, bptt_cases.VOCAB, (3, sum(windows) * 4 - 6))
    documents = [array_document(str(i), row) for i, row in enumerate(tokens)]  # they end inside the last window
    found = {}
    for context in (1, 2):
        topology = join(tensor=1, pipeline=1, context=context, timeout_s=60)
        streamer = Streamer(build_stage(config, topology, bptt_cases.VOCAB), topology)
        memory, first, outputs = streamer.empty_memory(3), 0, []
        for segments in windows:
            batch = streamer.window(documents, first, segments, 0)
            outputs.append(streamer.run(batch, memory, correct=True))
            memory, first = outputs[-1].memory, first + segments
        weights = [(output.loss * batch.loss_weight).sum().item() for output in outputs[-1:]]
        found[context] = {
            "loss": torch.cat([output.loss for output in outputs], dim=1),
            "correct": torch.cat([output.correct for output in outputs], dim=1).double(),
            "memory": dict(named_tensors(streamer.stage.layers, memory)),
            "sums": streamer.add_up(np.array(weights)),
        }
    return found
