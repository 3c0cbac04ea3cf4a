"""Does a layout fit the model, the window and the processes? The rules of `pipeline.config.validate` about `parallel`,
`bptt` and lanes."""

from __future__ import annotations

from collections.abc import Iterator

from model.rules import build_rule, has_convolution
from pipeline.config import derived
from pipeline.config.schema import Config


def layout_problems(config: Config) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.num_layers
    if parallel.sequence_parallel and parallel.tensor == 1:
        yield "parallel.sequence_parallel = true: must be false with parallel.tensor = 1, there is nobody to share with"
    elif parallel.sequence_parallel and config.model.segment_length % parallel.tensor:
        yield (
            f"model.segment_length = {config.model.segment_length}: must be a multiple of parallel.tensor = "
            f"{parallel.tensor} with parallel.sequence_parallel = true"
        )
    stages, per_stage = parallel.pipeline, parallel.layers_per_stage
    if layers < stages:
        yield f"parallel.pipeline = {stages}: must not be more than model.num_layers = {layers}"
    elif per_stage is not None and len(per_stage) != stages:
        yield (
            f"parallel.layers_per_stage = {per_stage}: must have one entry per pipeline stage, "
            f"{len(per_stage)} given for parallel.pipeline = {stages}"
        )
    elif per_stage is not None and sum(per_stage) != layers:
        yield (
            f"parallel.layers_per_stage = {per_stage}: its entries must sum to model.num_layers = {layers}, "
            f"not {sum(per_stage)}"
        )
    if parallel.zero_stage == 3 and stages > 1:
        yield (
            f"parallel.zero_stage = 3 with parallel.pipeline = {stages}: must be 1 or 2 with pipeline stages; ZeRO 3 "
            "gathers weights by collectives in the middle of a layer, and stages waiting for one another deadlock on it"
        )


def window_problems(config: Config) -> Iterator[str]:
    segments, chunks = config.train.segments_per_window, config.bptt.chunks_per_window
    context, probes = config.parallel.context, config.train.probes_per_window
    parts, memory = chunks * context, config.model.memory
    if segments % chunks:
        yield (
            f"bptt.chunks_per_window = {chunks}: must divide train.segments_per_window = {segments}; "
            f"valid are {listed(divisors(segments))}"
        )
    elif context > 1 and (rule := build_rule(memory)) is not None and not rule.composes:
        yield (
            f"parallel.context = {context}: must be 1 with model.memory.rule = {memory.rule}, whose "
            "segments cannot be summed up for the ranks behind"
        )
    elif segments // chunks % context:
        yield (
            f"parallel.context = {context}: must divide the {segments // chunks} segments of a chunk "
            f"(train.segments_per_window = {segments} / bptt.chunks_per_window = {chunks}), which its ranks share; "
            f"valid are {listed(divisors(segments // chunks))}"
        )
    elif context > 1 and has_convolution(memory) and _part_tokens(config) < memory.convolution_width - 1:
        yield (
            f"parallel.context = {context}: a rank's part of a chunk has {_part_tokens(config)} token(s), but a short "
            f"convolution with model.memory.convolution_width = {memory.convolution_width} "
            f"(model.memory.short_convolution) looks back at {memory.convolution_width - 1}, which the next rank must "
            "have from one neighbour alone; a larger model.segment_length or a smaller context"
        )
    if probes and (segments % probes or probes % parts):
        by = f"bptt.chunks_per_window = {chunks}"
        by = by if context == 1 else f"parallel.context = {context} x {by}"
        valid = [n for n in divisors(segments) if n % parts == 0]
        yield (
            f"train.probes_per_window = {probes}: must be 0, or divide train.segments_per_window = {segments} and be a "
            f"multiple of {by}; valid are {listed([0, *valid])}"
        )
    if config.parallel.schedule == "1f1b" and chunks > 1:
        yield (
            f"parallel.schedule = 1f1b moves whole windows: bptt.chunks_per_window must be 1, not {chunks}; "
            "segment_1f1b moves chunks"
        )


def _part_tokens(config: Config) -> int:
    """Tokens of a lane in a chunk on one context rank."""
    parts = config.bptt.chunks_per_window * config.parallel.context
    return config.train.segments_per_window // parts * config.model.segment_length


def lane_problems(config: Config, world_size: int) -> Iterator[str]:
    size, lanes = derived.processes_per_lane(config), config.train.lanes
    if world_size < size or world_size % size:
        yield (
            f"{world_size} process(es) cannot hold {derived.told_per_lane(config)}: the number of processes must be a "
            f"multiple of {size}"
        )
        return
    copies = derived.data_parallel_size(config, world_size)
    if lanes % copies:
        yield (
            f"train.lanes = {lanes}: must be a multiple of the data-parallel size {copies} "
            f"({world_size} processes / {size} for {derived.told_per_lane(config)})"
        )
        return
    per_rank, per_pass = derived.lanes_per_rank(config, world_size), derived.lanes_per_microbatch(config, world_size)
    if per_rank % per_pass:
        yield (
            f"train.lanes_per_microbatch = {per_pass}: must divide the {per_rank} lanes of a data-parallel rank "
            f"(train.lanes = {lanes} / {copies}); valid are {listed(divisors(per_rank))}"
        )


def usable_processes(config: Config, world_size: int) -> int:
    """The most of `world_size` processes that can train with this configuration: whole groups of those that work on a
    lane together, over which the lanes can be shared out; 0 when not even one fits. `config` must be valid else."""
    size = derived.processes_per_lane(config)
    copies = (n for n in range(world_size // size, 0, -1) if not any(lane_problems(config, n * size)))
    return next(copies, 0) * size


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def listed(values: list[int]) -> str:
    return ", ".join(map(str, values))
