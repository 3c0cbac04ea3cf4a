"""Quantities that follow from a configuration: pure functions, used where it is checked and where it runs."""

from __future__ import annotations

from model.config import layer_shape
from pipeline.config.schema import Config


def model_parallel_size(config: Config) -> int:
    """Processes that hold one copy of the model: tensor x pipeline."""
    return config.parallel.tensor * config.parallel.pipeline


def data_parallel_size(config: Config, world_size: int) -> int:
    """Copies of the model among `world_size` processes."""
    return world_size // model_parallel_size(config)


def lanes_per_rank(config: Config, world_size: int) -> int:
    """Lanes of one data-parallel rank."""
    return config.train.lanes // data_parallel_size(config, world_size)


def segments_per_chunk(config: Config) -> int:
    """Segments of a lane that one pass through a stage handles, its probes included."""
    return (config.train.segments_per_window + config.train.probes_per_window) // config.bptt.chunks_per_window


def lanes_per_microbatch(config: Config, world_size: int) -> int:
    """Lanes that one pass through a stage handles.

    By default all lanes of a rank without pipeline stages (the largest matrix products), and one lane with stages (the
    most microbatches to fill the pipeline with).
    """
    if config.train.lanes_per_microbatch is not None:
        return config.train.lanes_per_microbatch
    return lanes_per_rank(config, world_size) if config.parallel.pipeline == 1 else 1


def gate_count(config: Config) -> int:
    """Write gates in one step of the whole job: layers x key/value heads x tokens."""
    model, train = config.model, config.train
    return model.num_layers * layer_shape(model).groups * train.lanes * train.segments_per_window * model.segment_length


def longest_hang_s(config: Config) -> float:
    """What the watchdog waits at the most, in seconds: it must speak before a collective gives up."""
    return 0.9 * config.parallel.timeout_s
