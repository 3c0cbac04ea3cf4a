"""Forward passes over whole documents, a window at a time: a document of any length costs the memory of one window.

Context ranks share the segments of a window. What is left of it where their number does not divide it every one of them
runs by itself, and so they do with a window of fewer segments than ranks.

Documents are the lanes of a batch, all entered at their beginning. The memory is an argument and a result, so a caller
can keep it, exchange it between documents, or run the same window twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.files import Place, some
from data.lanes.loader import WindowBatch
from model.decoder import DecoderStage
from model.layers.statistics import MemoryStatistics
from model.rules.context import ContextGroup
from model.rules.state import Memory, memory_tensors
from pipeline.checkpoint.folder import CheckpointError
from pipeline.checkpoint.loading import load_weights, open_verified
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.config.schema import Config
from pipeline.parallel.memory_statistics import gather_statistics
from pipeline.parallel.setup import build_stage
from pipeline.parallel.topology import Topology
from pipeline.schedule.executor import Executor, StepResult
from pipeline.schedule.operations import build_forward_schedule

WINDOW_TOKENS = {"cpu": 2_048, "cuda": 16_384}
"""Tokens of one window, all lanes together: enough that matrix products, not Python, take the time; on a CPU no more
than its caches hold (2,048 tokens against 16,384 of a model with hidden size 128: 1.25 times as fast)."""
LOGITS = {"cpu": 1 << 25, "cuda": 1 << 29}
"""Logits of one window (128 MiB in float32, 2 GiB on a GPU): with a large vocabulary they, not the layers, set the
limit. A GPU is not filled by few tokens: with 49,152 of them the CPU's limit would be 682 tokens at a time."""
MAX_LANES = 64
MIN_LANES = 3
"""An even split into batches of at most this many leaves no document without another to exchange memory with."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Document:
    """A document to evaluate."""

    name: str
    length: int
    """Tokens n; n - 1 of them are labels."""
    read: Callable[[int, int], np.ndarray]
    """Tokens [start, stop)."""
    answers: Sequence[tuple[int, int]] = ()
    """Spans [start, stop) of answer tokens."""

    shared: int = 0
    """First tokens that it has in common with the other documents of its kind."""

    def segments(self, segment_length: int) -> int:
        return -(-(self.length - 1) // segment_length)

    def labels(self, segment: int, segment_length: int) -> int:
        """Labels in a segment; 0 behind the document's end."""
        return min(max(self.length - 1 - segment * segment_length, 0), segment_length)


class Output(NamedTuple):
    """What a window gives on the last stage's ranks; on the others only `memory` is set."""

    loss: Tensor | None
    """`[B, T, S]`, nats."""
    correct: Tensor | None
    """Bool `[B, T, S]`: greedy decoding gives the label."""
    memory: Memory


def window(
    documents: Sequence[Document], first: int, segments: int, segment_length: int, eos_id: int, device: torch.device
) -> WindowBatch:
    """Segments [first, first + segments) of every document; past its end a lane is padded with weight 0."""
    lanes, positions = len(documents), segments * segment_length
    tokens = np.full((lanes, positions), eos_id, dtype=np.int64)
    labels = np.full((lanes, positions), eos_id, dtype=np.int64)
    weight = np.zeros((lanes, positions), dtype=np.float32)
    answers = np.zeros((lanes, positions), dtype=bool)
    start = first * segment_length
    for row, document in enumerate(documents):
        count = min(positions, document.length - 1 - start)
        if count <= 0:
            continue
        text = document.read(start, start + count + 1)
        tokens[row, :count], labels[row, :count] = text[:-1], text[1:]
        weight[row, :count] = 1
        for answer_start, answer_stop in document.answers:  # token i is the label of position i - 1
            answers[row, max(answer_start - 1 - start, 0) : max(min(answer_stop - 1 - start, count), 0)] = True
    shape = (lanes, segments, segment_length)
    reset = torch.zeros(lanes, segments, dtype=torch.bool)
    reset[:, 0] = first == 0

    def to_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).view(shape).to(device)

    return WindowBatch(
        tokens=to_device(tokens),
        labels=to_device(labels),
        loss_weight=to_device(weight),
        answer_mask=to_device(answers),
        reset=reset.to(device),
        position_in_document=(start + segment_length * torch.arange(segments)).expand(lanes, segments).to(device),
        lane_ids=torch.arange(lanes),
        padded_tokens=int((weight == 0).sum()),
        documents=[[document.name] for document in documents],
    )


def segments_to_read(tokens: Tensor) -> WindowBatch:
    """Whole segments `[B, T, S]` that go on where each lane's memory ends; nothing is predicted."""
    shape, device = tokens.shape, tokens.device
    return WindowBatch(
        tokens=tokens,
        labels=tokens,
        loss_weight=torch.zeros(shape, device=device),
        answer_mask=torch.zeros(shape, dtype=torch.bool, device=device),
        reset=torch.zeros(shape[:2], dtype=torch.bool, device=device),
        position_in_document=torch.zeros(shape[:2], dtype=torch.int64, device=device),
        lane_ids=torch.arange(shape[0]),
        padded_tokens=0,
        documents=[[] for _ in range(shape[0])],
    )


def some_segments(batch: WindowBatch, first: int, last: int) -> WindowBatch:
    """Segments [first, last) of a window without probes."""
    names = ("tokens", "labels", "loss_weight", "answer_mask", "reset", "position_in_document")
    return replace(batch, **{name: getattr(batch, name)[:, first:last] for name in names})


class Interrupted(Exception):
    """Somebody wants no more windows."""


class Streamer:
    """A model that runs forward over documents. Nothing of it changes.

    Args:
        stage: this process's part of the model.
        topology: the process grid; data-parallel ranks run other documents, at their own pace.
    """

    def __init__(self, stage: DecoderStage, topology: Topology) -> None:
        self.stage, self.topology = stage, topology
        self.group: dist.ProcessGroup | None = None
        """Where results are exchanged; None is all processes with the timeout of the layout."""
        self.interrupted: Callable[[], bool] = lambda: False
        """Asked before every window, on all processes of a model copy, which give the same answer: `add_up` is then the
        end, for the other copies too."""
        self.waiting: Callable[[], AbstractContextManager] = nullcontext
        """Around the exchange of results, where a copy that is done waits for the others."""
        config = stage.config
        self.segment_length = config.segment_length
        self.has_memory = config.memory.rule != "none"
        self.local_reach = config.num_layers if config.local_context == "sliding" else 0
        """Segments before its own that the local attention of all layers together sees."""
        self.executor = Executor(stage, topology, chunks=1, carry_gradient=False)
        kind = "cpu" if topology.device.type == "cpu" else "cuda"
        tokens = min(WINDOW_TOKENS[kind], LOGITS[kind] // self.stage.vocab_size)
        self.tokens_per_window = max(self.segment_length, tokens)

    def load(self, reader: CheckpointReader) -> None:
        """Take the weights of a checkpoint that was written on any layout; collective.

        Raises:
            CheckpointError: they do not fit, or some are not finite; the same on all ranks.
        """
        load_weights(reader, self.stage)
        bad = {name: int((~torch.isfinite(p)).sum()) for name, p in self.stage.global_parameters()}
        everyone: list[dict[str, int]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, {name: count for name, count in bad.items() if count})
        if found := [f"{name} ({count:,})" for own in everyone for name, count in own.items()]:
            raise CheckpointError(
                f"{reader.folder} holds weights that are NaN or infinite in {self.stage.compute_dtype}: "
                f"{some(found, 4)}. Nothing can be computed with it: take an earlier checkpoint"
            )

    @property
    def max_lanes(self) -> int:
        """Documents of one batch at most."""
        return max(MIN_LANES, min(MAX_LANES, self.tokens_per_window // self.segment_length))

    def batches(self, items: Sequence[Item]) -> list[list[Item]]:
        """Split documents (or what stands for them), in order, into as few batches as fit, of about equal size."""
        count = -(-len(items) // self.max_lanes)
        bounds = [round(i * len(items) / count) for i in range(count + 1)]
        return [list(items[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]

    def segments_per_window(self, lanes: int) -> int:
        """Segments of a window that stays within the token limit, on each of the ranks that share it."""
        return max(1, self.tokens_per_window // (lanes * self.segment_length)) * self.topology.context_size

    def window(self, documents: Sequence[Document], first: int, segments: int, eos_id: int) -> WindowBatch:
        """See the function `window`."""
        return window(documents, first, segments, self.segment_length, eos_id, self.topology.device)

    def empty_memory(self, lanes: int) -> Memory:
        return self.stage.empty_memory(lanes, self.topology.device)

    def run(self, batch: WindowBatch, memory: Memory, *, memory_off: bool = False, correct: bool = False) -> Output:
        """Run one window of every lane from `memory`, which is not changed; collective over this copy of the model.

        Args:
            memory_off: give the local attention all of the output.
            correct: also say where greedy decoding gives the label.

        Raises:
            Interrupted: see `interrupted`; on all processes, sooner or later.
        """
        return self._run(batch, memory, memory_off=memory_off, correct=correct)

    def read(self, batch: WindowBatch, memory: Memory, *, memory_off: bool = False) -> Memory:
        """The memory after a window, without the price of the output matrix."""
        return self._run(batch, memory, losses=False, memory_off=memory_off).memory

    def measure(self, batch: WindowBatch, memory: Memory) -> dict[int, MemoryStatistics]:
        """What the memory of every layer does in a window, on every process; collective over all of them."""
        # All lanes at once: statistics of microbatches would be averaged, and a mean of ratios is another number.
        result = self._execute(batch, memory, 1, losses=False, statistics=True)
        return gather_statistics(result.statistics, self.topology, self.stage.config)

    def _run(self, batch: WindowBatch, memory: Memory, **options: bool) -> Output:
        microbatches = _microbatches(batch.tokens.shape[0], self.topology.pipeline_size)
        context, segments = self.topology.context, batch.tokens.shape[1]
        if context is None:
            result = self._execute(batch, memory, microbatches, **options)
            return Output(result.token_loss, result.token_correct, result.memory)
        shared = segments - segments % context.size
        losses, hits = [], []
        if shared:
            result = self._execute_shared(some_segments(batch, 0, shared), memory, microbatches, context, **options)
            losses, hits, memory = [result.token_loss], [result.token_correct], result.memory
        if shared < segments:
            result = self._execute(some_segments(batch, shared, segments), memory, microbatches, **options)
            losses, hits, memory = [*losses, result.token_loss], [*hits, result.token_correct], result.memory
        return Output(*(None if found[0] is None else torch.cat(found, dim=1) for found in (losses, hits)), memory)

    @torch.inference_mode()
    def _execute_shared(
        self, batch: WindowBatch, memory: Memory, microbatches: int, context: ContextGroup, **options: bool
    ) -> StepResult:
        """Run a window whose segments the context ranks share; what it gives is whole, on all of them."""
        own = batch.tokens.shape[1] // context.size
        part = some_segments(batch, context.rank * own, (context.rank + 1) * own)
        result = self._execute(replace(part, reset=batch.reset), memory, microbatches, shared=True, **options)
        found = []
        for x in (result.token_loss, result.token_correct):
            if x is not None:
                parts = [torch.empty_like(x) for _ in range(context.size)]
                dist.all_gather(parts, x.contiguous(), group=context.group)
                x = torch.cat(parts, dim=1)
            found.append(x)
        # The first rank's copy counts: the others know nothing of the tokens right before the next window.
        for x in memory_tensors(result.memory):
            dist.broadcast(x, group=context.group, group_src=0)
        return replace(result, token_loss=found[0], token_correct=found[1])

    @torch.inference_mode()
    def _execute(
        self, batch: WindowBatch, memory: Memory, microbatches: int, *, shared: bool = False, **options: bool
    ) -> StepResult:
        if self.interrupted():
            self._agree(interrupted=True)
        lanes = batch.tokens.shape[0]
        with nullcontext() if shared else self.stage.unshared():
            return self.executor.run(
                build_forward_schedule(
                    stages=self.topology.pipeline_size,
                    stage=self.topology.pipeline_rank,
                    microbatches=microbatches,
                    chunks=1,
                ),
                batch,
                memory,
                lanes_per_microbatch=lanes // microbatches,
                **options,
            )

    def add_up(self, sums: np.ndarray) -> np.ndarray:
        """The sum over the data-parallel ranks of what their last stages have, on every process; collective.

        Raises:
            Interrupted: one of them ran no further.
        """
        self._agree(interrupted=False)
        topology = self.topology
        speaks = topology.is_last_stage and topology.tensor_rank == topology.context_rank == 0
        mine = sums if speaks else np.zeros_like(sums)
        return np.array(self.topology.all_reduce(mine.flatten().tolist(), group=self.group)).reshape(sums.shape)

    def _agree(self, *, interrupted: bool) -> None:
        """Wait until all copies have come to an end, or one of them was interrupted."""
        with self.waiting():
            (some,) = self.topology.all_reduce([float(interrupted)], op=dist.ReduceOp.MAX, group=self.group)
        if some:
            raise Interrupted


def _microbatches(lanes: int, stages: int) -> int:
    """The largest number of equal microbatches that fills the pipeline without making them small."""
    most = 1 if stages == 1 else 2 * stages
    return max(count for count in range(1, most + 1) if lanes % count == 0)


def array_document(name: str, tokens: np.ndarray, answers: Sequence[tuple[int, int]] = ()) -> Document:
    """A document whose tokens are in memory."""
    return Document(name, len(tokens), lambda start, stop: tokens[start:stop], answers)


def repeating_document(
    name: str, pieces: Sequence[tuple[np.ndarray, int]], answers: Sequence[tuple[int, int]] = (), shared: int = 0
) -> Document:
    """A document of pieces that are each repeated so many times; of any length, without its tokens in memory."""
    pieces = [(tokens, times) for tokens, times in pieces if len(tokens) and times]
    ends = np.cumsum([len(tokens) * times for tokens, times in pieces])

    def read(start: int, stop: int) -> np.ndarray:
        parts, first = [], 0
        for (tokens, _), end in zip(pieces, ends.tolist(), strict=True):
            if start < end and stop > first:
                parts.append(tokens[np.arange(max(start, first) - first, min(stop, end) - first) % len(tokens)])
            first = end
        return np.concatenate(parts)

    return Document(name, int(ends[-1]), read, answers, shared)


def open_checkpoint(config: Config, topology: Topology, path: Place) -> tuple[Streamer, CheckpointReader]:
    """The model of the checkpoint at `path`.

    Raises:
        CheckpointError: it is missing, damaged or does not fit the configuration.
    """
    reader = open_verified(path)
    streamer = Streamer(build_stage(config, topology, reader.summary.vocab_size, drawn=False), topology)
    streamer.load(reader)
    return streamer, reader
