"""What a configuration would build and run, found out without data, devices or other processes.

The stages are built for real, by the code that training uses, on PyTorch's meta device (shapes without numbers) and
under a process group that only pretends to have other members.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from model.decoder import DecoderStage, StageOptions, split_layers
from model.device import prepare_megatron
from model.sharding import full_shape, partition_of
from pipeline.config import Config
from pipeline.derived import lanes_per_microbatch, lanes_per_rank, model_parallel_size, segments_per_chunk
from pipeline.flops import forward_flops_per_token, parameter_count
from pipeline.footprint import per_rank_bytes
from pipeline.schedule import Kind, build_schedule
from pipeline.simulate import Costs, Timeline, simulate

LATENCY_S = 20e-6
"""From sending to receiving between two nodes, beside the bytes' own time."""


@dataclass(frozen=True)
class BuiltStage:
    """One pipeline stage as it was built."""

    rank_parameters: int
    """Parameters of one rank."""
    whole: dict[str, int]
    """Size of every parameter of the stage, all its tensor-parallel ranks together, by its name in the whole model."""


@contextmanager
def pretended_rank(rank: int, world_size: int, *, tensor: int, pipeline: int):
    """Be `rank` of `world_size` processes that do not exist, with Megatron's groups; collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "planning needs a process that has not joined a run"
    prepare_megatron()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def build_stages(config: Config, vocab: int) -> list[BuiltStage]:
    """Build every pipeline stage, as its first tensor-parallel rank, on the meta device."""
    parallel = config.parallel
    stages = []
    bounds = split_layers(config.model.num_layers, parallel.pipeline, parallel.layers_per_stage)
    options = StageOptions(precision=config.train.precision, sequence_parallel=parallel.sequence_parallel)
    for stage, (first, last) in enumerate(bounds):
        # Data-parallel copies are alike: a world of one copy has the same stages. Its ranks go tensor first.
        layout = {"tensor": parallel.tensor, "pipeline": parallel.pipeline}
        with pretended_rank(stage * parallel.tensor, model_parallel_size(config), **layout), torch.device("meta"):
            module = DecoderStage(
                config.model,
                options,
                vocab_size=vocab,
                first_layer=first,
                last_layer=last,
                tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
                tensor_size=parallel.tensor,
            )
        whole = {
            name: math.prod(full_shape(parameter.shape, partition_of(parameter), parallel.tensor))
            for name, parameter in module.global_parameters()
        }
        stages.append(BuiltStage(sum(parameter.numel() for parameter in module.parameters()), whole))
    return stages


def check_counts(config: Config, world_size: int, vocab: int, stages: list[BuiltStage]) -> None:
    """Hold what was built against what arithmetic says; the two share no code.

    Raises:
        RuntimeError: they differ: a bug, either the memory estimate or the model is not what it says.
    """
    sizes: dict[str, int] = {}
    for stage in stages:
        sizes |= stage.whole  # a tied embedding's two copies have one name
    expected = parameter_count(config.model, vocab)["total"]
    if sum(sizes.values()) != expected:
        raise RuntimeError(f"the model was built with {sum(sizes.values()):,} parameters, arithmetic says {expected:,}")
    for stage, needs in zip(stages, per_rank_bytes(config, world_size, vocab), strict=True):
        if stage.rank_parameters != needs.parameter_count:
            raise RuntimeError(
                f"a rank of stage {needs.stage} was built with {stage.rank_parameters:,} parameters, arithmetic says "
                f"{needs.parameter_count:,}"
            )


def windows_per_step(config: Config, world_size: int) -> int:
    """Microbatches that every pipeline works off in a step."""
    return lanes_per_rank(config, world_size) // lanes_per_microbatch(config, world_size)


def estimated_costs(config: Config, world_size: int, vocab: int, *, flops_per_s: float, bytes_per_s: float) -> Costs:
    """Costs of one chunk by the FLOP formulas.

    A backward costs two forwards and what recomputation runs again. With window recomputation the output matrix is left
    to the replay (of all chunks: that the last chunk of a window may go without replay is not told apart).

    Args:
        flops_per_s: what a rank reaches in practice.
        bytes_per_s: what a link between two stages carries.
    """
    model, parallel = config.model, config.parallel
    flops = forward_flops_per_token(model, vocab)
    layers_flops = flops["total"] - flops["output"]
    again = {
        "none": 0.0,
        "selective": flops["local_attention"] + flops["memory"],
        "layer": layers_flops,
        "window": 0.0,
    }[config.bptt.recompute]
    segments = segments_per_chunk(config)
    tokens = lanes_per_microbatch(config, world_size) * segments * model.segment_length
    per_stage = []
    for stage, (first, last) in enumerate(split_layers(model.num_layers, parallel.pipeline, parallel.layers_per_stage)):
        share = (last - first) / model.num_layers
        output = flops["output"] if stage == parallel.pipeline - 1 else 0.0
        layers = share * layers_flops
        seconds = tokens / parallel.tensor / flops_per_s
        without_output = config.bptt.recompute == "window"
        per_stage.append(
            {
                Kind.FORWARD: (layers + (0.0 if without_output else output)) * seconds,
                Kind.REPLAY: (layers + output) * seconds,
                Kind.BACKWARD: (2 * (layers + output) + share * again) * seconds,
            }
        )
    return Costs(per_stage, message_bytes(config, tokens), bytes_per_s, LATENCY_S)


def message_bytes(config: Config, tokens: int) -> int:
    """Bytes that one tensor-parallel rank sends to the next stage for a chunk of `tokens` tokens."""
    number = {"bf16": 2, "fp32": 4, "fp64": 8}[config.train.precision]
    share = config.parallel.tensor if config.parallel.sequence_parallel else 1
    return tokens // share * config.model.hidden_size * number


def simulate_step(config: Config, costs: Costs, windows: int) -> Timeline:
    """One step of `windows` windows against the clock."""
    shape = {
        "stages": config.parallel.pipeline,
        "windows": windows,
        "chunks": config.bptt.chunks_per_window,
        "replay": config.bptt.recompute == "window",
    }
    return simulate([build_schedule(stage=stage, **shape) for stage in range(config.parallel.pipeline)], costs)
