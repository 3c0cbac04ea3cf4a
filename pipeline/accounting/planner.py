"""What a configuration would build and run, found out without data, devices or other processes.

The stages are built for real, by the code that training uses, on PyTorch's meta device (shapes without numbers) and
under a process group that only pretends to have other members.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist

from model.config import layer_config, layer_kinds, same_function
from model.decoder import DecoderStage, split_layers
from model.device import prepare_megatron
from model.layers.decoder_layer import StageOptions
from model.megatron import parallel_state
from model.sharding import full_shape, partition_of
from pipeline.accounting.communication import (
    chunk_tokens,
    context_bytes,
    context_messages,
    data_bytes,
    gathering_bytes,
    reduction_bytes,
    tensor_bytes,
)
from pipeline.accounting.devices import GPUS_PER_NODE
from pipeline.accounting.exposure import LastBackward, exposed_s
from pipeline.accounting.flops import (
    embedding_rows,
    forward_flops_per_token,
    layer_parameters,
    layers_flops_per_token,
    parameter_count,
    train_flops_per_token,
)
from pipeline.accounting.footprint import RankBytes, per_rank_bytes
from pipeline.config.derived import (
    lanes_per_microbatch,
    lanes_per_rank,
    number_bytes,
    recomputes_logits,
)
from pipeline.config.schema import Config
from pipeline.parallel.groups import make_model_parallel
from pipeline.schedule.operations import Kind, configured_schedule
from pipeline.schedule.simulate import Costs, Timeline, simulate

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
def pretended_rank(rank: int, world_size: int, *, tensor: int, pipeline: int, context: int = 1):
    """Be `rank` of `world_size` processes that do not exist, with Megatron's groups; collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "planning needs a process that has not joined a run"
    prepare_megatron()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        make_model_parallel(tensor=tensor, pipeline=pipeline, context=context, timeout_s=60.0)
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
        # Replicas over data and context are alike: a world of one has the same stages. Its ranks go tensor first.
        layout = {"tensor": parallel.tensor, "pipeline": parallel.pipeline}
        world_size = parallel.tensor * parallel.pipeline
        with pretended_rank(stage * parallel.tensor, world_size, **layout), torch.device("meta"):
            module = DecoderStage(
                same_function(config.model),  # with what every machine has
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


def microbatches_per_step(config: Config, world_size: int) -> int:
    """Microbatches that every pipeline works off in a step."""
    return lanes_per_rank(config, world_size) // lanes_per_microbatch(config, world_size)


@dataclass(frozen=True)
class Rates:
    """What a rank and its links reach in practice."""

    flops_per_s: float
    link_bytes_per_s: float
    """Between stages and between replicas, each way."""
    node_bytes_per_s: float = math.inf
    """Between the devices of a node, each way."""
    start_s: float = 0.0
    """For the host to start a kernel: a device whose kernels are shorter waits for it."""
    gpus_per_node: int = GPUS_PER_NODE

    def among(self, ranks: int) -> float:
        """Bytes per second between so many neighbours in the grid, whose fastest axis is tensor parallelism and whose
        next one is context parallelism."""
        return self.node_bytes_per_s if ranks <= self.gpus_per_node else self.link_bytes_per_s


def estimated_costs(config: Config, world_size: int, vocab: int, rates: Rates) -> Costs:
    """Costs of one chunk by the FLOP formulas and the bytes of tensor and context parallelism, which nothing hides
    here; or the time in which the host starts its kernels, where that is longer.

    A backward costs two forwards and what recomputation (of logits, too) runs again. With window recomputation the
    output matrix is left to the replay (of all chunks: that the last chunk of a window may go without replay is not
    told apart).
    """
    model, parallel = config.model, config.parallel
    of_output = forward_flops_per_token(model, vocab)["output"]
    tokens = chunk_tokens(config, world_size)
    tensor_rate, context_rate = rates.among(parallel.tensor), rates.among(parallel.tensor * parallel.context)
    per_stage = []
    for stage, (first, last) in enumerate(split_layers(model.num_layers, parallel.pipeline, parallel.layers_per_stage)):
        own = range(first, last)
        flops = layers_flops_per_token(model, own)
        layers = sum(flops.values())
        again = {
            "none": 0.0,
            "selective": flops["local_attention"] + flops["memory"],
            "layer": layers,
            "window": 0.0,
        }[config.bptt.recompute]
        output = of_output if stage == parallel.pipeline - 1 else 0.0
        logits_again = output if recomputes_logits(config, world_size, vocab) else 0.0
        seconds = tokens / parallel.tensor / rates.flops_per_s
        ends = {"is_first": stage == 0, "is_last": stage == parallel.pipeline - 1}
        sent = tensor_bytes(config, world_size, layers=own, **ends)
        summaries = context_bytes(config, world_size, layers=own)
        waiting_s = context_messages(config, own) * LATENCY_S
        forward_s, backward_s = (
            of_tensor / tensor_rate + of_context / context_rate + waiting_s
            for of_tensor, of_context in zip(astuple(sent), astuple(summaries), strict=True)
        )
        without_output = config.bptt.recompute == "window"
        computed = {
            Kind.FORWARD: (layers + (0.0 if without_output else output)) * seconds + forward_s,
            Kind.REPLAY: (layers + output) * seconds + forward_s,
            Kind.BACKWARD: (2 * (layers + output) + again + logits_again) * seconds + backward_s,
        }
        started = {kind: n * rates.start_s for kind, n in launches(config, own).items()}
        per_stage.append({kind: max(computed[kind], started[kind]) for kind in computed})
    return Costs(per_stage, message_bytes(config, tokens), rates.link_bytes_per_s, LATENCY_S)


LAUNCHES = {
    "none": (30, 43),
    "linear": (59, 76),
    "delta": (64, 84),
    "deltanet": (55, 77),
    "gated_deltanet": (84, 126),
    "delta_product": (98, 149),
    "kda": (115, 179),
    "gdn2": (134, 203),
}
"""Kernels that a layer starts for a chunk, forward and backward, by rule: as `infini trace` counts them, in bf16 and
without gates, which add some ten. A chunk of many segments has a few more, and `kda` and `gdn2` have 6 and 10 more for
every doubling of their blocks of tokens, which are of 16 here."""
LAUNCHES_BESIDE_ATTENTION = 17
"""Of the forward ones: the MLP's and the second norm's."""


def launches(config: Config, layers: range) -> dict[Kind, int]:
    """Kernels that these layers start for a chunk."""
    kinds = [(LAUNCHES[kind.memory.rule], count) for kind, count in layer_kinds(config.model, layers)]
    forward, backward = (sum(count * of_kind[i] for of_kind, count in kinds) for i in range(2))
    attention = forward - len(layers) * LAUNCHES_BESIDE_ATTENTION
    again = {"none": 0, "selective": attention, "layer": forward, "window": 0}[config.bptt.recompute]
    return {Kind.FORWARD: forward, Kind.REPLAY: forward, Kind.BACKWARD: backward + again}


def model_flops_per_s(config: Config, vocab: int, step_s: float) -> float:
    """FLOPs that the model needs, per second, for steps of `step_s`; the questions of probes are work, too."""
    train = config.train
    segments = train.segments_per_window + train.probes_per_window
    return train_flops_per_token(config.model, vocab) * train.lanes * segments * config.model.segment_length / step_s


def message_bytes(config: Config, tokens: int) -> int:
    """Bytes that one tensor-parallel rank sends to the next stage for a chunk of `tokens` tokens."""
    share = config.parallel.tensor if config.parallel.sequence_parallel else 1
    return tokens // share * config.model.hidden_size * number_bytes(config)


def simulate_step(config: Config, costs: Costs, microbatches: int) -> Timeline:
    """One step of `microbatches` microbatches against the clock."""
    stages = range(config.parallel.pipeline)
    programs = [configured_schedule(config, stage=stage, microbatches=microbatches) for stage in stages]
    return simulate(programs, costs)


@dataclass(frozen=True)
class Prediction:
    """One step, by arithmetic."""

    pipeline_s: float
    """Forward and backward passes of all microbatches, bubbles and what tensor- and context-parallel ranks tell one
    another included."""
    reduction_s: float
    """For which the step then waits for gradients to be summed over replicas."""
    overlapped_reduction_s: float
    """The same, if every layer's were on their way while the last chunk goes back through the layers below it."""
    gathering_s: float
    """For which it waits for parameters, after the update (ZeRO 3: in every pass)."""
    bubble_share: float
    tensor_sent: list[int]
    """Per stage, bytes that one rank sends in a step."""
    context_sent: list[int]
    pipeline_sent: list[int]
    data_sent: list[int]

    @property
    def step_s(self) -> float:
        return self.pipeline_s + self.data_s

    @property
    def data_s(self) -> float:
        """Waiting for the other replicas, as it is: nothing is hidden."""
        return self.reduction_s + self.gathering_s


def predict_step(config: Config, world_size: int, vocab: int, rates: Rates) -> Prediction:
    """How long a step takes, and what it sends.

    Not counted: the optimizer's own work, reading data, writing checkpoints, and that communication inside a model copy
    may hide behind computation (which would be faster).
    """
    costs = estimated_costs(config, world_size, vocab, rates)
    timeline = simulate_step(config, costs, microbatches_per_step(config, world_size))
    needs = per_rank_bytes(config, world_size, vocab)
    parallel = config.parallel
    bounds = split_layers(config.model.num_layers, parallel.pipeline, parallel.layers_per_stage)
    sent = [data_bytes(config, world_size, stage) for stage in needs]
    tensor, context = [], []
    for stage, of_stage, events in zip(needs, bounds, timeline.events, strict=True):
        layers = range(*of_stage)
        ends = {"is_first": stage.stage == 0, "is_last": stage.stage == len(needs) - 1}
        passes = Counter(event.operation.kind for event in events)
        for sums, own in (
            (tensor, tensor_bytes(config, world_size, layers=layers, **ends)),
            (context, context_bytes(config, world_size, layers=layers)),
        ):
            forward = passes[Kind.FORWARD] + passes[Kind.REPLAY]
            sums.append(forward * own.forward + passes[Kind.BACKWARD] * own.backward)
    last = [
        _last_backward(config, world_size, vocab, rates, costs, timeline, stage, range(*layers))
        for stage, layers in zip(needs, bounds, strict=True)
    ]
    return Prediction(
        pipeline_s=timeline.makespan_s,
        reduction_s=exposed_s(last, timeline.makespan_s, overlapped=False),
        overlapped_reduction_s=exposed_s(last, timeline.makespan_s, overlapped=True),
        gathering_s=max(gathering_bytes(config, world_size, stage) for stage in needs) / rates.link_bytes_per_s,
        bubble_share=timeline.bubble_share,
        tensor_sent=tensor,
        context_sent=context,
        pipeline_sent=[timeline.messages_sent(stage.stage) * costs.message_bytes for stage in needs],
        data_sent=sent,
    )


def _last_backward(
    config: Config,
    world_size: int,
    vocab: int,
    rates: Rates,
    costs: Costs,
    timeline: Timeline,
    needs: RankBytes,
    layers: range,
) -> LastBackward:
    """The last backward of a stage: the output matrix, its `layers` from the last to the first, the embedding."""
    stage, model, tensor = needs.stage, config.model, config.parallel.tensor
    end = max(event.end_s for event in timeline.events[stage] if event.operation.kind is Kind.BACKWARD)
    number = needs.gradients // needs.parameter_count

    def reduce_s(parameters: int) -> float:
        return reduction_bytes(config, world_size, parameters * number) / rates.link_bytes_per_s

    matrix = embedding_rows(model, vocab) * model.hidden_size // tensor
    is_first, is_last = stage == 0, stage == config.parallel.pipeline - 1
    tied_here = model.tie_embeddings and is_first and is_last
    backward_s = costs.compute_s[stage][Kind.BACKWARD]
    output_s = 0.0
    if is_last:
        flops = forward_flops_per_token(model, vocab)["output"]
        passes = 3 if recomputes_logits(config, world_size, vocab) else 2
        output_s = passes * flops * chunk_tokens(config, world_size) / tensor / rates.flops_per_s
    parts = [(output_s, reduce_s(matrix * (is_last and not tied_here) + model.hidden_size * is_last))]
    for layer in reversed(layers):
        parameters = sum(layer_parameters(layer_config(model, layer), tensor).values())
        parts.append(((backward_s - output_s) / len(layers), reduce_s(parameters)))
    parts.append((0.0, reduce_s(matrix * is_first)))
    return LastBackward(end, parts)
