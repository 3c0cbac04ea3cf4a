"""Quantities that follow from a configuration: pure functions, used where it is checked and where it runs."""

from __future__ import annotations

from model.config import layer_shape, memory_layers
from model.sharding import padded_vocab_size
from pipeline.config.schema import Config

KEPT_LOGITS_BYTES = 2**30
"""Of a rank, from which on logits are made again unless the configuration decides: a hundredth of what a device has,
against a third more work in the output matrix (2 % of a step of Llama 3 8B, 8 % of its last stage's of four)."""

REDUCTION_BUCKET = 50_000_000
"""Gradients that DeepSpeed reduces at once, in numbers."""


def processes_per_lane(config: Config) -> int:
    """Processes that work on a lane together: tensor x context x pipeline."""
    return config.parallel.tensor * config.parallel.context * config.parallel.pipeline


def told_per_lane(config: Config) -> str:
    """The settings that `processes_per_lane` is the product of, in words; context only where somebody asked for it."""
    parallel = config.parallel
    context = f" x parallel.context = {parallel.context}" if parallel.context > 1 else ""
    return f"parallel.tensor = {parallel.tensor}{context} x parallel.pipeline = {parallel.pipeline}"


def data_parallel_size(config: Config, world_size: int) -> int:
    """Groups of processes, among `world_size`, that have lanes of their own."""
    return world_size // processes_per_lane(config)


def replicas(config: Config, world_size: int) -> int:
    """Processes that hold the same parameters, among which ZeRO shares the optimizer out: data x context."""
    return data_parallel_size(config, world_size) * config.parallel.context


def lanes_per_rank(config: Config, world_size: int) -> int:
    """Lanes of one data-parallel rank."""
    return config.train.lanes // data_parallel_size(config, world_size)


def segments_per_chunk(config: Config) -> int:
    """Segments of a lane that one pass through a stage handles on a rank, its probes included."""
    parts = config.bptt.chunks_per_window * config.parallel.context
    return (config.train.segments_per_window + config.train.probes_per_window) // parts


def lanes_per_microbatch(config: Config, world_size: int) -> int:
    """Lanes that one pass through a stage handles.

    By default all lanes of a rank without pipeline stages (the largest matrix products), and one lane with stages (the
    most microbatches to fill the pipeline with).
    """
    if config.train.lanes_per_microbatch is not None:
        return config.train.lanes_per_microbatch
    return lanes_per_rank(config, world_size) if config.parallel.pipeline == 1 else 1


def tokens_per_step(config: Config) -> int:
    """Of all lanes, padding included; probes are no tokens of the run."""
    return config.train.lanes * config.train.segments_per_window * config.model.segment_length


def gate_count(config: Config) -> int:
    """Write gates in one step of the whole job: layers with a memory x key/value heads x tokens."""
    return len(memory_layers(config.model)) * layer_shape(config.model).groups * tokens_per_step(config)


def number_bytes(config: Config) -> int:
    """Bytes of a number of the residual stream, and of a logit."""
    return {"bf16": 2, "fp32": 4, "fp64": 8}[config.train.precision]


def logits_bytes(config: Config, world_size: int, vocab: int) -> int:
    """Logits of the chunks that a rank of the last stage has in flight at once, if they were kept.

    Args:
        vocab: tokens, without padding.
    """
    chunks = 1 if config.bptt.recompute == "window" else config.bptt.chunks_per_window
    tokens = lanes_per_microbatch(config, world_size) * segments_per_chunk(config) * config.model.segment_length
    columns = padded_vocab_size(vocab, config.model.vocab_size_multiple) // config.parallel.tensor
    return chunks * tokens * columns * number_bytes(config)


def recomputes_logits(config: Config, world_size: int, vocab: int) -> bool:
    """What `bptt.recompute_logits` comes to: null decides by size."""
    chosen = config.bptt.recompute_logits
    return logits_bytes(config, world_size, vocab) > KEPT_LOGITS_BYTES if chosen is None else chosen


def longest_hang_s(config: Config) -> float:
    """What the watchdog waits at the most, in seconds: it must speak before a collective gives up."""
    return 0.9 * config.parallel.timeout_s
