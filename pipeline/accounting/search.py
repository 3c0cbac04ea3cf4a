"""Which layouts of a configuration's run fit so many devices, and how fast each would be: arithmetic, nothing is built.

A layout is tensor x context x pipeline x data and a ZeRO stage; each has variants, by how windows are cut into chunks,
what is computed again, and how many lanes a microbatch has. What the run trains on stays: lanes, window and precision.
Memory decides first. What fits is ordered by a closed form of the schedule's length, and the first variants of every
layout are then played operation by operation (`pipeline.accounting.planner.predict_step`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.accounting.communication import gathering_bytes, reduction_bytes
from pipeline.accounting.flops import (
    forward_flops_per_token,
    memory_state_bytes,
    parameter_count,
)
from pipeline.accounting.footprint import OPTIMIZER_COPIES, RankBytes, per_rank_bytes
from pipeline.accounting.planner import (
    Prediction,
    Rates,
    estimated_costs,
    microbatches_per_step,
    predict_step,
)
from pipeline.config.derived import data_parallel_size, lanes_per_rank, number_bytes
from pipeline.config.load import ConfigError
from pipeline.config.schema import RECOMPUTE, Config
from pipeline.config.validate import validate
from pipeline.schedule.operations import Kind

PLAYED = 3
"""Variants of every layout that are simulated."""
SPARE = 0.1
"""Of a device's memory, for what the estimate leaves out: the allocator, communication, kernels. Less is no fit here,
and tight in a plan."""


class NoLayoutError(ValueError):
    """No layout can run, or none fits."""


@dataclass(frozen=True)
class Layout:
    """One way to spread the run."""

    config: Config
    needs: list[RankBytes]
    """By stage."""
    prediction: Prediction | None = None
    """Of layouts that fit."""

    @property
    def largest(self) -> RankBytes:
        """Of the stage whose ranks need most."""
        return max(self.needs, key=lambda needs: needs.total)

    @property
    def settings(self) -> list[str]:
        """As overrides: `key=value`."""
        parallel, bptt = self.config.parallel, self.config.bptt
        split = parallel.layers_per_stage
        return [
            f"parallel.tensor={parallel.tensor}",
            f"parallel.context={parallel.context}",
            f"parallel.sequence_parallel={str(parallel.sequence_parallel).lower()}",
            f"parallel.pipeline={parallel.pipeline}",
            f"parallel.layers_per_stage={'null' if split is None else '[' + ','.join(map(str, split)) + ']'}",
            f"parallel.zero_stage={parallel.zero_stage}",
            f"bptt.chunks_per_window={bptt.chunks_per_window}",
            f"bptt.recompute={bptt.recompute}",
            f"train.lanes_per_microbatch={self.config.train.lanes_per_microbatch}",
        ]


@dataclass(frozen=True)
class Found:
    """What a search has found."""

    fitting: list[Layout]
    """The best variant of every layout that fits, fastest first."""
    too_large: list[Layout]
    """The smallest variant of every layout that does not, smallest first."""
    variants: int
    """That can run at all."""


def search(config: Config, world_size: int, vocab: int, memory_bytes: int, rates: Rates, gpus_per_node: int) -> Found:
    """All layouts of `config` on `world_size` devices of `memory_bytes`.

    Args:
        config: validated but for its layout, which is not looked at.
        gpus_per_node: tensor parallelism stays inside a node.

    Raises:
        NoLayoutError: no layout can run on so many devices; the message has the reasons.
    """
    layouts: dict[tuple[int, int, int, int], list[Layout]] = {}
    for variant in _variants(config, world_size, vocab, gpus_per_node):
        parallel = variant.parallel
        key = parallel.tensor, parallel.context, parallel.pipeline, parallel.zero_stage
        layouts.setdefault(key, []).append(Layout(variant, per_rank_bytes(variant, world_size, vocab)))
    fitting, too_large = [], []
    for variants in layouts.values():
        fits = [x for x in variants if x.largest.total <= (1 - SPARE) * memory_bytes]
        if not fits:
            too_large.append(min(variants, key=lambda x: x.largest.total))
            continue
        fits.sort(key=lambda x: (quick_step_s(x.config, world_size, vocab, rates, x.needs), x.largest.total))
        played = [replace(x, prediction=predict_step(x.config, world_size, vocab, rates)) for x in fits[:PLAYED]]
        fitting.append(min(played, key=lambda x: (x.prediction.step_s, x.largest.total)))
    return Found(
        sorted(fitting, key=lambda x: (x.prediction.step_s, x.largest.total)),
        sorted(too_large, key=lambda x: x.largest.total),
        sum(map(len, layouts.values())),
    )


def smallest_bytes(config: Config, world_size: int, vocab: int, gpus_per_node: int) -> int | None:
    """What the largest rank needs in the smallest layout; None where none can run."""
    try:
        variants = list(_variants(config, world_size, vocab, gpus_per_node))
    except NoLayoutError:
        return None
    return min(max(needs.total for needs in per_rank_bytes(x, world_size, vocab)) for x in variants)


def quick_step_s(config: Config, world_size: int, vocab: int, rates: Rates, needs: list[RankBytes]) -> float:
    """About how long a step takes: the slowest stage's chunks one after the other, a chunk of every other stage to fill
    and to drain the pipeline, and then the data-parallel traffic that a stage has not done when the first one ends."""
    costs = estimated_costs(config, world_size, vocab, rates)
    replays = [config.bptt.recompute == "window"] * len(costs.compute_s)
    # The last stage goes back with a window's last chunk at once.
    replays[-1] *= 1 - 1 / config.bptt.chunks_per_window
    chunk = [
        own[Kind.FORWARD] + own[Kind.BACKWARD] + share * own[Kind.REPLAY]
        for own, share in zip(costs.compute_s, replays, strict=True)
    ]
    chunks = microbatches_per_step(config, world_size) * config.bptt.chunks_per_window
    pipeline_s = chunks * max(chunk) + sum(chunk) - max(chunk)
    exposed_s, earlier_s = 0.0, 0.0
    for stage, own in zip(needs, costs.compute_s, strict=True):
        reduction_s = reduction_bytes(config, world_size, stage.gradients) / rates.link_bytes_per_s
        exposed_s = max(exposed_s, reduction_s - earlier_s)
        earlier_s += own[Kind.BACKWARD]
    gathering = max(gathering_bytes(config, world_size, stage) for stage in needs)
    return pipeline_s + exposed_s + gathering / rates.link_bytes_per_s


def checkpoint_bytes(config: Config, vocab: int) -> int:
    """A checkpoint of the run: masters, moments and every lane's memory, whatever the layout."""
    wide = max(number_bytes(config), 4)
    parameters = parameter_count(config.model, vocab)["total"]
    memory = config.train.lanes * memory_state_bytes(config.model, config.train.precision)
    return OPTIMIZER_COPIES * wide * parameters + memory


def _variants(config: Config, world_size: int, vocab: int, gpus_per_node: int) -> Iterator[Config]:
    """Every configuration that can run.

    Raises:
        NoLayoutError: there is none.
    """
    reasons: Counter[str] = Counter()
    some = False
    for tensor, context, pipeline in _grids(config, world_size, gpus_per_node):
        for zero_stage in (1, 3) if pipeline == 1 else (1,):  # 2 saves nothing over 1 here
            for split in _splits(config, pipeline, vocab):
                parallel = replace(
                    config.parallel,
                    tensor=tensor,
                    context=context,
                    pipeline=pipeline,
                    layers_per_stage=split,
                    zero_stage=zero_stage,
                    sequence_parallel=tensor > 1,
                )
                layout = replace(config, parallel=parallel)
                for variant in _windows(layout, world_size):
                    try:
                        validate(variant, world_size, data_exists=False)
                    except ConfigError as problem:
                        reasons[str(problem).splitlines()[-1].strip()] += 1
                        continue
                    some = True
                    yield variant
    if not some:
        told = "; ".join(reason for reason, _ in reasons.most_common(3))
        raise NoLayoutError(f"no layout of {world_size:,} devices can run this configuration: {told}")


def _grids(config: Config, world_size: int, gpus_per_node: int) -> Iterator[tuple[int, int, int]]:
    """Tensor, context and pipeline sizes; tensor parallelism stays inside a node, and a context-parallel rank has a
    segment of every window at least."""
    for tensor in _divisors(math.gcd(gpus_per_node, world_size)):
        for context in _divisors(math.gcd(world_size // tensor, config.train.segments_per_window)):
            for pipeline in _divisors(world_size // tensor // context):
                yield tensor, context, pipeline


def _windows(layout: Config, world_size: int) -> Iterator[Config]:
    """A layout's variants; one of them also where its lanes do not come out even, for the reason."""
    copies, lanes = data_parallel_size(layout, world_size), layout.train.lanes
    if lanes % copies:
        yield layout
        return
    for chunks in _divisors(layout.train.segments_per_window // layout.parallel.context):
        for recompute in RECOMPUTE:
            for together in _divisors(lanes_per_rank(layout, world_size)):
                yield replace(
                    layout,
                    bptt=replace(layout.bptt, chunks_per_window=chunks, recompute=recompute),
                    train=replace(layout.train, lanes_per_microbatch=together),
                )


def _splits(config: Config, stages: int, vocab: int) -> list[list[int] | None]:
    """How layers are spread over the stages: evenly, and with fewer on the last one, which has the output matrix."""
    layers = config.model.num_layers
    if stages == 1 or stages > layers:
        return [None]
    flops = forward_flops_per_token(config.model, vocab)
    output = flops["output"] / ((flops["total"] - flops["output"]) / layers)  # in layers
    last = max(1, round((layers + output) / stages - output))
    rest, more = divmod(layers - last, stages - 1)
    if rest == 0:
        return [None]
    balanced = [rest + (stage < more) for stage in range(stages - 1)] + [last]
    return [None, balanced]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
