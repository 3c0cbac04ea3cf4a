"""Reading prompts of any length and decoding token by token, at a memory that does not depend on what was read.

Whole segments go through the window-parallel forward, all lanes that have some at once. The last, partial segment of a
lane lives in a cache of keys and values (`model.layers.segment_cache`); when it is full it is written to the memory.
Lanes are independent: each has its own position in its segment.

One token of a lane, the last one known, is always kept back: the next token is predicted by feeding it. So reading
needs no predictions, and a state can be kept after a document and continued with anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.decoder import DecoderStage
from model.device import Recording, on_device
from model.layers.segment_cache import SegmentCache, Span
from model.megatron import gather_from_tensor_model_parallel_region
from model.rules.state import Memory, put_lanes, take_lanes
from pipeline.inference.streaming import Streamer, segments_to_read

EXTEND_TOKENS = 2048
"""Tokens, all lanes together, that go through the cache at once: their scores against the segment take memory."""


@dataclass
class LaneState:
    """What has been read: B documents, each at its own place."""

    memory: Memory
    """At the beginning of every lane's current segment."""
    cache: list[SegmentCache]
    """Per layer of the stage: the current segments, but for the token that is kept back."""
    segment: list[list[int]]
    """Tokens of the current segment, the one kept back included; empty before anything was read."""
    position: list[int]
    """Tokens of the document before the current segment."""
    step: RecordedStep | None = None
    """What predicts the next token, where that is recorded; of this memory and this cache."""

    @property
    def lanes(self) -> int:
        return len(self.segment)

    @property
    def tokens_read(self) -> list[int]:
        return [before + len(tokens) for before, tokens in zip(self.position, self.segment, strict=True)]

    def select(self, lanes: Sequence[int]) -> LaneState:
        """A copy of some lanes; a lane may be taken more than once."""
        index = torch.tensor(lanes, dtype=torch.int64, device=self.cache[0].key.device)
        return LaneState(
            take_lanes(self.memory, index),
            [SegmentCache(*(x[index] for x in layer)) for layer in self.cache],
            [list(self.segment[i]) for i in lanes],
            [self.position[i] for i in lanes],
        )


class RecordedStep:
    """The pass of one token in every lane, recorded: on a GPU it is a thousand small kernels, and Python takes longer
    to start them than the GPU to run them. It attends to a whole segment, of which a mask hides what is not there yet.

    Args:
        stage: the whole model.
        memory, cache: of a `LaneState`; the cache is written in place.
    """

    def __init__(self, stage: DecoderStage, memory: Memory, cache: list[SegmentCache]) -> None:
        self.stage, self.memory, self.cache = stage, memory, cache
        key = cache[0].key
        self._numbers = torch.zeros(2, len(key), dtype=torch.int64, device=key.device)
        """Of every lane its token, and the token's place in the segment."""
        self._recording = Recording(self._step, key.device)

    def run(self, tokens: Sequence[int], places: Sequence[int]) -> Tensor:
        """Logits `[B, vocabulary]` of the tokens that follow, until the next call."""
        given = on_device([[*tokens, *places]], self._numbers.device)[0]
        self._numbers.copy_(given.view_as(self._numbers))
        return self._recording.run()

    def _step(self) -> Tensor:
        tokens, places = self._numbers
        span = Span.at(places, self.stage.config.segment_length)
        hidden = self.stage.extend(tokens[:, None], self.memory, self.cache, span)
        return self.stage.next_token_logits(hidden[0])


class _Source:
    """Tokens that come in arrays of any size, taken in pieces of any other."""

    def __init__(self, kept_back: Sequence[int], arrays: Iterable[np.ndarray]) -> None:
        self._arrays: Iterator[np.ndarray] = iter(arrays)
        self._buffer = np.array(kept_back, dtype=np.int64)
        self._ended = False

    def available(self, wanted: int) -> int:
        """Tokens that can be taken, counted up to `wanted`."""
        parts, count = [self._buffer], len(self._buffer)
        while count < wanted and not self._ended:
            array = next(self._arrays, None)
            if array is None:
                self._ended = True
            else:
                parts.append(np.asarray(array, dtype=np.int64))
                count += len(parts[-1])
        if len(parts) > 1:
            self._buffer = np.concatenate(parts)
        return min(count, wanted)

    def take(self, count: int) -> np.ndarray:
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken


class IncrementalModel:
    """A loaded model that reads and predicts lane by lane; every process of a model copy makes the same calls.

    Args:
        streamer: with the checkpoint's weights.
        vocab_size: of the model (not padded).
    """

    def __init__(self, streamer: Streamer, vocab_size: int) -> None:
        self.streamer, self.stage, self.topology = streamer, streamer.stage, streamer.topology
        self.length = streamer.segment_length
        self.vocab_size = vocab_size
        self.group = self.topology.model_group
        """The processes of this copy of the model; other copies, where there are any, have their own texts."""
        ranks: list[int | None] = [None] * dist.get_world_size(self.group)
        has_logits = self.topology.is_last_stage and self.topology.tensor_rank == 0
        dist.all_gather_object(ranks, dist.get_rank() if has_logits else None, group=self.group)
        self.chooser: int = next(rank for rank in ranks if rank is not None)
        """Global rank of the process that has the logits and chooses the tokens."""
        self.records = False
        """Whether steps of one token are recorded, which only a model in one process can: set it before the first."""

    def start(self, lanes: int) -> LaneState:
        """Lanes that have read nothing."""
        device = self.topology.device
        cache = self.stage.empty_cache(lanes, device)
        return LaneState(self.streamer.empty_memory(lanes), cache, [[] for _ in range(lanes)], [0] * lanes)

    def read(
        self,
        state: LaneState,
        texts: Sequence[Iterable[np.ndarray]],
        on_read: Callable[[int], None] | None = None,
    ) -> None:
        """Read one text per lane, given as arrays of tokens that join to it; `state` moves on.

        Args:
            on_read: called after every window with the tokens that all lanes together have read.
        """
        sources = []
        for lane, arrays in enumerate(texts):
            sources.append(_Source(state.segment[lane][-1:], arrays))
            del state.segment[lane][-1:]
        while self._read_segments(state, sources) or self._read_partial(state, sources):
            if on_read is not None:
                on_read(sum(state.tokens_read))
        for lane, source in enumerate(sources):
            state.segment[lane] += source.take(source.available(1)).tolist()

    def _read_segments(self, state: LaneState, sources: list[_Source]) -> bool:
        """Whole segments of the lanes that stand at the beginning of one; false when there are none."""
        fresh = [i for i in range(state.lanes) if not state.segment[i]]
        fresh = [i for i in fresh if sources[i].available(self.length + 1) > self.length][: self.streamer.max_lanes]
        if not fresh:
            return False
        most = self.streamer.segments_per_window(len(fresh))
        count = min((sources[i].available(most * self.length + 1) - 1) // self.length for i in fresh)
        tokens = np.stack([sources[i].take(count * self.length) for i in fresh])
        tokens = torch.from_numpy(tokens).view(len(fresh), count, self.length).to(self.topology.device)
        index = torch.tensor(fresh, device=self.topology.device)
        after = self.streamer.read(segments_to_read(tokens), take_lanes(state.memory, index))
        state.memory = put_lanes(state.memory, index, after)
        for i in fresh:
            state.position[i] += count * self.length
        return True

    def _read_partial(self, state: LaneState, sources: list[_Source]) -> bool:
        """Tokens of partial segments, as far as the segments and the limit go; false when there are none."""
        limit = max(1, EXTEND_TOKENS // state.lanes)
        room = [min(limit, self.length - len(tokens)) for tokens in state.segment]
        count = [max(0, source.available(n + 1) - 1) for source, n in zip(sources, room, strict=True)]
        if not any(count):
            return False
        self._extend(state, [source.take(n).tolist() for source, n in zip(sources, count, strict=True)])
        return True

    def next_logits(self, state: LaneState) -> Tensor | None:
        """Logits `[B, vocabulary]` of the token after the last one of every lane, on the chooser; else None. They hold
        until the next call.

        The tokens kept back go into the caches. Call `append` before anything else.
        """
        last = [tokens.pop() for tokens in state.segment]
        if self.records:
            if state.step is None or state.step.memory is not state.memory:
                state.step = RecordedStep(self.stage, state.memory, state.cache)
            logits = state.step.run(last, [len(tokens) for tokens in state.segment])
            self._advance(state, [[token] for token in last])
            return logits[:, : self.vocab_size]
        hidden = self._extend(state, [[token] for token in last])
        if hidden is None:
            return None
        logits = gather_from_tensor_model_parallel_region(self.stage.next_token_logits(hidden[0]))
        return logits[:, : self.vocab_size] if dist.get_rank() == self.chooser else None

    def append(self, state: LaneState, tokens: Tensor | None) -> list[int]:
        """Put one token behind every lane; returns them everywhere. Where they are on the device, this waits for it.

        Args:
            tokens: int64 `[B]` of the chooser, on its device or on the host; None on the others.
        """
        if dist.get_world_size(self.group) > 1:
            chosen = torch.zeros(state.lanes, dtype=torch.int64, device=self.topology.device)
            if tokens is not None:
                chosen.copy_(tokens)
            dist.broadcast(chosen, src=self.chooser, group=self.group)
            tokens = chosen if tokens is None else tokens
        found = tokens.tolist()
        for segment, token in zip(state.segment, found, strict=True):
            segment.append(token)
        return found

    def _extend(self, state: LaneState, new: list[list[int]]) -> Tensor | None:
        """Put tokens (some lanes may have none) into the caches, and `_advance`.

        Returns:
            The last stage's hidden states `[c, B, h]`; None on the others.
        """
        count = [len(tokens) for tokens in new]
        width, device = max(count), self.topology.device
        span = Span.build([len(tokens) for tokens in state.segment], count, device)
        if self.stage.is_first:
            padded = [token for tokens in new for token in tokens + [0] * (width - len(tokens))]
            inputs = on_device([padded], device)[0].view(-1, width)
        else:
            shape = (width, state.lanes, self.stage.config.hidden_size)
            inputs = torch.empty(shape, dtype=self.stage.compute_dtype, device=device)
            dist.recv(inputs, self.topology.previous_rank, group=self.topology.forward_group)
        hidden = self.stage.extend(inputs, state.memory, state.cache, span)
        if not self.stage.is_last:
            dist.send(hidden.contiguous(), self.topology.next_rank, group=self.topology.forward_group)
        self._advance(state, new)
        return hidden if self.stage.is_last else None

    def _advance(self, state: LaneState, new: list[list[int]]) -> None:
        """Count tokens that are in the caches, and write the segments that are full to the memory."""
        for segment, tokens in zip(state.segment, new, strict=True):
            segment += tokens
        full = [i for i, segment in enumerate(state.segment) if len(segment) == self.length]
        if full:
            (lanes,) = on_device([full], self.topology.device)
            state.memory = self.stage.commit(state.memory, state.cache, lanes)
        for i in full:
            state.segment[i] = []
            state.position[i] += self.length
