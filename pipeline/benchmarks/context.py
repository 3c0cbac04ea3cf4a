"""One document as one window, with exact gradients through all of it, on one process and on several that share it.

The loss is that of the last segment alone, and its gradient is looked at where the document begins: the first segment
has tokens of its own, half of the vocabulary, so that their rows of the embedding's gradient are what has come back
through the memory of all segments between.

A process counts its live tensors at most, its resident set, and what the collectives of context parallelism carry. It
computes in float64, where one process and several must agree to rounding.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.files import write_whole
from data.lanes.window import WindowBatch, WindowPart
from model.device import give_memory_back
from pipeline.accounting.live_bytes import LiveBytes
from pipeline.benchmarks.contestants import Sizes, own_config
from pipeline.benchmarks.measuring import peak_rss_bytes
from pipeline.benchmarks.repeated_step import Step, random_batch
from pipeline.config.schema import Config
from pipeline.parallel.topology import initialize

PRECISION = "fp64"


@dataclass(frozen=True)
class ContextRun:
    """Forward and backward of one document."""

    processes: int
    tokens: int
    loss: float
    """Of the last segment, the mean of its tokens."""
    first_gradient: list[list[float]]
    """Of the loss by the embeddings of the first segment's tokens, `[vocab / 2, h]`."""
    live_bytes: list[int]
    """Tensors at most, of every process: all that was made from the window's first operation to its last, weights and
    batch not counted."""
    start_bytes: list[int]
    """Resident set of every process before."""
    peak_bytes: list[int]
    """At most."""
    sent_bytes: float
    """By one process for one layer, forward, again and backward."""
    seconds: float
    """Of the first process, everything counted."""


def config_of(processes: int, sizes: Sizes, rule: str, settings: list[str]) -> Config:
    """A configuration whose only window is the document."""
    own = [f"parallel.context={processes}", "bptt.recompute=layer", "bptt.recompute_logits=true"]
    return own_config(sizes, rule, PRECISION, [*own, *settings])


def document(config: Config) -> WindowBatch:
    """Random tokens of the vocabulary's first half, but of its second half in the first segment; what is learnt is the
    last segment."""
    batch, half = random_batch(config), config.model.vocab_size // 2
    first = batch.tokens[:, :1] % half + half
    batch.tokens, batch.labels = batch.tokens % half, batch.labels % half
    batch.tokens[:, :1] = first
    batch.loss_weight[:, :-1] = 0
    return batch


class SentBytes(TorchDispatchMode):
    """Inside `with`, what this process sends in collectives: in a ring that gathers, its own part and those of others
    but the next one's."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if name.startswith("c10d.") and "recv" not in name:
            ranks = next(dist.ProcessGroup.unbox(x).size() for x in args if isinstance(x, torch.ScriptObject))
            largest = max(x.nbytes for x in tree_leaves(args) if isinstance(x, torch.Tensor))
            self.bytes += largest if "send" in name else largest * (ranks - 1) / ranks
        return function(*args, **(kwargs or {}))


def own_segments(batch: WindowBatch, part: WindowPart) -> WindowBatch:
    """What a process has of a window that several share."""
    names = ("tokens", "labels", "loss_weight", "answer_mask", "position_in_document")
    return replace(batch, part=part, **{name: part.own(getattr(batch, name)) for name in names})


def measure(*, tokens: list[int], sizes: list[int], rule: str, settings: list[str]) -> list[ContextRun]:
    """Documents of all lengths, the shortest first, on as many processes as there are; called on every one.

    Args:
        tokens: lengths, of whole segments for every process.
        sizes: the fields of `Sizes`; the tokens do not count.
    """
    give_memory_back()
    processes, found = int(os.environ["WORLD_SIZE"]), []
    for length in sorted(tokens):
        config = config_of(processes, Sizes(*sizes)._replace(tokens=length), rule, settings)
        found.append(_measure(config, processes, length))
    return found


def _measure(config: Config, processes: int, tokens: int) -> ContextRun:
    step = Step(config, initialize(tensor=1, pipeline=1, context=processes, timeout_s=3600))
    part = WindowPart(config.bptt.chunks_per_window, step.topology.context_rank, processes)
    whole = document(config)
    batch, weight = own_segments(whole, part), float(whole.loss_weight.sum())
    del whole
    start, began = psutil.Process().memory_info().rss, time.perf_counter()
    with LiveBytes() as live, SentBytes() as sent:
        result = step.run(batch, config, weight=weight)
    seconds, peak = time.perf_counter() - began, peak_rss_bytes()
    # Each process has what came back to its own segments.
    gradient = step.stage.embedding.weight.grad
    if processes > 1:
        dist.all_reduce(gradient)
    everyone = [None] * processes
    mine = (live.peak, start, peak, float(result.token_loss[:, -1].mean()))
    dist.all_gather_object(everyone, mine)
    live_bytes, start_bytes, peak_bytes, losses = zip(*everyone, strict=True)
    return ContextRun(
        processes=processes,
        tokens=tokens,
        loss=losses[-1],  # the last segment is the last process's
        first_gradient=gradient[config.model.vocab_size // 2 :].tolist(),
        live_bytes=list(live_bytes),
        start_bytes=list(start_bytes),
        peak_bytes=list(peak_bytes),
        sent_bytes=sent.bytes / config.model.num_layers,
        seconds=seconds,
    )


def write_results(path: Path, results: list[ContextRun]) -> None:
    """Write results as JSON, for `read_results` in another process."""
    write_whole(path, json.dumps([asdict(result) for result in results]))


def read_results(path: Path) -> list[ContextRun]:
    """What `write_results` wrote."""
    return [ContextRun(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
