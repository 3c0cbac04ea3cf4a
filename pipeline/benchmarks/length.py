"""What a document's length costs, trained on and generated from: with a memory, a sliding window, full attention.

Training carries the memory from window to window, forward and backward in each, as a run does. Times of a long and of a
short document are to be compared, on a machine that other work disturbs: the long one is read in blocks, and before or
behind each of them the short one is read anew, in the same process. Full attention has no blocks: its document is one
graph.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

import torch

from model.device import give_memory_back
from model.rules.state import Memory
from pipeline.benchmarks import generate
from pipeline.benchmarks.alternating import Spread, spread, wait_for
from pipeline.benchmarks.contestants import PLAIN, Sizes, llama, own_config
from pipeline.benchmarks.measuring import Progress, peak_rss_bytes, tracked_peak
from pipeline.benchmarks.repeated_step import Step, random_batch
from pipeline.parallel.topology import initialize
from pipeline.training.batches import to_device

SLIDING = "sliding window"
"""This model without a memory, whose local attention sees the segment before as well (Transformer-XL)."""
FULL = "full attention"
"""Llama of transformers."""
PROGRESS_S = 5.0


class TrainingMemory(NamedTuple):
    """Measured by itself: see `give_memory_back`."""

    start_bytes: int
    """Of the process (of the device, if it has its own) before the document."""
    peak_bytes: int
    """At most."""
    live_bytes: int | None
    """Tensors at most while the last window was computed; None where it was not counted."""


@dataclass(frozen=True)
class TrainingCost:
    """Forward and backward of one document, with one model."""

    model: str
    tokens: int
    """Of the document."""
    token_s: Spread
    """Seconds per token, of the rounds; see `Clock`."""
    against_reference: Spread | None
    """How many times the time per token of the short document in the same rounds."""
    memory: TrainingMemory


class Clock:
    """Seconds of one piece of work: processor time where one thread of the processor does it, which other work on the
    machine disturbs less; else wall time."""

    def __init__(self, device: torch.device, threads: int) -> None:
        self.device = device
        self.now = time.process_time if device.type == "cpu" and threads == 1 else time.perf_counter

    def __call__(self, work: Callable[[], object]) -> float:
        wait_for(self.device)
        start = self.now()
        work()
        wait_for(self.device)
        return self.now() - start


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: of the process, or allocated on a device of its own."""
    return peak_rss_bytes() if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)


def own_settings(model: str) -> tuple[str, list[str]]:
    """Rule and further settings of one of our models: a rule's name, or `SLIDING`."""
    return (PLAIN, ["model.local_context=sliding"]) if model == SLIDING else (model, [])


class _Reader:
    """Trains on documents, window after window."""

    def __init__(self, model: str, sizes: Sizes, threads: int) -> None:
        torch.set_num_threads(threads)
        rule, settings = own_settings(model)
        self.config = own_config(sizes, rule, "fp32", settings)
        self.step = Step(self.config, initialize(tensor=1, pipeline=1, timeout_s=600))
        self.device = self.step.topology.device
        self.clock = Clock(self.device, threads)
        self.first = to_device(random_batch(self.config), self.device)
        self.later = replace(self.first, reset=torch.zeros_like(self.first.reset))

    def window(self, memory: Memory | None) -> Memory:
        batch = self.first if memory is None else self.later
        return self.step.run(batch, self.config, memory=memory).memory

    def read(self, windows: int, memory: Memory | None, done: Callable[[float], None]) -> tuple[list[float], Memory]:
        """So many windows of a document that goes on from `memory`; the seconds of each, and the memory behind them."""
        seconds = []
        for _ in range(windows):
            carried: list[Memory] = []
            seconds.append(self.clock(lambda memory=memory, carried=carried: carried.append(self.window(memory))))
            memory = carried[0]
            done(seconds[-1])
        return seconds, memory


def train_carried(
    model: str, sizes: Sizes, tokens: int, reference_tokens: int, rounds: int, threads: int
) -> tuple[Spread, Spread]:
    """Train on a document of `tokens` with the memory carried; to be called in a fresh process.

    Args:
        model: a memory rule, or `SLIDING`.
        sizes: `sizes.tokens` is the window.
        reference_tokens: of the short document that is read once per round.
        rounds: blocks that the document is read in; one of fewer windows is read whole in every round.

    Returns:
        `TrainingCost.token_s` and `TrainingCost.against_reference`.
    """
    reader = _Reader(model, sizes, threads)
    windows, reference = tokens // sizes.tokens, reference_tokens // sizes.tokens
    blocks = [windows * (i + 1) // rounds - windows * i // rounds for i in range(rounds)]
    whole = windows < rounds
    if whole:
        blocks = [windows] * rounds
    progress = Progress(sum(blocks) + rounds * reference, sizes.tokens, "tokens", PROGRESS_S)
    name = f"{model}, {tokens:,} tokens"
    reader.read(2, None, lambda seconds: None)
    memory, times, ratios = None, [], []
    for number, block in enumerate(blocks):
        took: dict[bool, list[float]] = {}
        for short in (True, False) if number % 2 else (False, True):
            count, begin = (reference, None) if short else (block, None if whole else memory)
            took[short], after = reader.read(count, begin, lambda seconds: progress(name, seconds))
            if not short:
                memory = after
        times.append(median(took[False]) / sizes.tokens)
        ratios.append(median(took[False]) / median(took[True]))
    return spread(times), spread(ratios)


def memory_carried(model: str, sizes: Sizes, tokens: int, threads: int) -> TrainingMemory:
    """Read the same document once more, for the memory that it takes; to be called in a fresh process."""
    give_memory_back()
    reader = _Reader(model, sizes, threads)
    reader.read(2, None, lambda seconds: None)
    start, windows = peak_bytes(reader.device), tokens // sizes.tokens
    progress = Progress(windows, sizes.tokens, "tokens", PROGRESS_S)
    name = f"{model}, {tokens:,} tokens, memory"
    _, memory = reader.read(windows, None, lambda seconds: progress(name, seconds))
    peak = peak_bytes(reader.device)
    # The sliding window's mask is a subclass of Tensor that cannot be made while tensors are counted.
    live = None if model == SLIDING else tracked_peak(lambda: reader.window(memory))
    return TrainingMemory(start, peak, live)


class _Whole:
    """Trains full attention on documents, each of them one graph."""

    def __init__(self, sizes: Sizes, tokens: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.device = initialize(tensor=1, pipeline=1, timeout_s=600).device
        torch.manual_seed(0)
        self.built = llama(sizes._replace(tokens=tokens), torch.float32)
        self.built.model.to(self.device).train()
        self.text = torch.randint(0, sizes.vocab, (1, tokens + 1), device=self.device)
        self.clock = Clock(self.device, threads)
        self.read(sizes.tokens)

    def read(self, tokens: int) -> None:
        self.built.loss(self.text[:, : tokens + 1]).backward()


def train_full(sizes: Sizes, tokens: int, rounds: int, threads: int) -> Spread:
    """Train full attention on a document of `tokens`; to be called in a fresh process.

    Returns:
        `TrainingCost.token_s`.
    """
    whole = _Whole(sizes, tokens, threads)
    progress, times = Progress(rounds, tokens, "tokens"), []
    for _ in range(rounds):
        times.append(whole.clock(lambda: whole.read(tokens)) / tokens)
        progress(f"{FULL}, {tokens:,} tokens", times[-1] * tokens)
    return spread(times)


def memory_full(sizes: Sizes, tokens: int, threads: int) -> TrainingMemory:
    """The same once more, for the memory that it takes; to be called in a fresh process."""
    give_memory_back()
    whole = _Whole(sizes, tokens, threads)
    start = peak_bytes(whole.device)
    whole.read(tokens)
    return TrainingMemory(start, peak_bytes(whole.device), None)


@dataclass(frozen=True)
class NewTokenCost:
    """One more token behind a document."""

    model: str
    tokens: int
    """Of the document."""
    token_s: Spread
    """Seconds of a new token, of all of them."""
    state_bytes: int
    """What has to be kept of the document."""


@torch.inference_mode()
def full_new_tokens(sizes: Sizes, tokens: int, new_tokens: int, threads: int) -> NewTokenCost:
    """Generate with full attention behind a document of `tokens`; to be called in a fresh process.

    The cache of keys and values is filled with random numbers, not by reading: what a token costs does not depend on
    them. It has its full size from the beginning (transformers' static cache); one that grows is copied for each token.
    """
    from transformers import StaticCache

    torch.set_num_threads(threads)
    device = initialize(tensor=1, pipeline=1, timeout_s=600).device
    torch.manual_seed(0)
    model = llama(sizes._replace(tokens=tokens + new_tokens), torch.float32).model.to(device).eval()
    cache = StaticCache(config=model.config, max_cache_len=tokens + new_tokens)
    shape = (1, sizes.heads, tokens, sizes.hidden // sizes.heads)
    for layer in range(sizes.layers):
        cache.update(torch.randn(shape, device=device), torch.randn(shape, device=device), layer)
    # The argument has changed its name between versions of transformers 5.
    argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    clock, times = Clock(device, threads), []
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)

    def one() -> None:
        logits = model(token, use_cache=True, **{argument: cache}).logits
        token.copy_(logits[:, -1:].argmax(dim=-1))

    for _ in range(new_tokens):
        times.append(clock(one))
    return NewTokenCost(FULL, tokens, spread(times[1:] or times), full_state_bytes(sizes, tokens))


def full_state_bytes(sizes: Sizes, tokens: int) -> int:
    """Keys and values of a document with full attention, float32."""
    return 2 * 4 * sizes.layers * sizes.hidden * tokens


def own_new_tokens(model: str, sizes: Sizes, tokens: int, new_tokens: int, threads: int) -> NewTokenCost:
    """Read a document of `tokens` and generate, see `pipeline.benchmarks.generate`; to be called in a fresh process."""
    torch.set_num_threads(threads)
    rule, settings = own_settings(model)
    rule = "none" if rule == PLAIN else rule
    settings = [f"model.memory.rule={rule}", f"model.num_attention_heads={sizes.heads}", *settings]
    settings += ["model.num_query_groups=null", f"model.ffn_hidden_size={sizes.ffn}"]
    costs = generate.measure(tokens, new_tokens, sizes.layers, sizes.hidden, sizes.segment_length, settings)
    alone = threads == 1 and not torch.cuda.is_available()
    return NewTokenCost(model, tokens, spread(costs.token_cpu_s if alone else costs.token_s), costs.state_bytes)


def lengths_within(
    lengths: Sequence[int], run: Callable[[int], TrainingCost], *, limit_s: float, limit_bytes: float
) -> tuple[list[TrainingCost], str | None]:
    """Run lengths, ascending, until the next would take longer or more memory than the limits, by what the last one
    took: its time grows with the square of the length, its memory with the length.

    Returns:
        What was measured; and why it stopped, if it did.
    """
    costs: list[TrainingCost] = []
    for length in lengths:
        if costs:
            last = costs[-1]
            factor = length / last.tokens
            seconds = last.token_s.median * last.tokens * factor**2
            taken = (last.memory.peak_bytes - last.memory.start_bytes) * factor
            if seconds > limit_s:
                return costs, f"{length:,} tokens would take about {seconds:,.0f} s a time (limit {limit_s:,.0f} s)"
            if taken > limit_bytes:
                gib = f"{taken / 2**30:,.1f} GiB (limit {limit_bytes / 2**30:,.1f} GiB)"
                return costs, f"{length:,} tokens would take about {gib}"
        costs.append(run(length))
    return costs, None
