"""What the tracing tests run in a process of its own: PyTorch has a pretended device there for the rest of its life."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from launch.cli import main
from launch.commands.planned import ASSUMED_VOCAB
from model import device
from model.layers.norm import RMSNorm
from model.rules import deltanet, normalized
from model.rules.borders import Borders
from model.rules.context import ContextPart
from model.rules.scan import Blocks, block_pairs, compose_neighbours, scan_pairs
from pipeline.accounting import update_peak
from pipeline.accounting.footprint import per_rank_bytes
from pipeline.accounting.live_bytes import LiveBytes
from pipeline.accounting.planner import Rates, predict_step
from pipeline.checkpoint.run_state import CarriedMemory, Progress, SavedOptimizer
from pipeline.checkpoint.writer import take_snapshot
from pipeline.config.derived import processes_per_lane
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.inference.incremental import IncrementalModel
from pipeline.inference.sampling import Sampling, choose
from pipeline.inference.streaming import Streamer
from pipeline.parallel import optimizer
from pipeline.parallel.setup import build_stage
from pipeline.parallel.topology import Topology, initialize
from pipeline.tracing.evaluation import trace_evaluation
from pipeline.tracing.host_reads import listed
from pipeline.tracing.ledger import Ledger
from pipeline.tracing.step import TracedRun, first_rank, trace_step
from pipeline.tracing.world import group_labels, pretended_world

VOCAB = 128
SMALL = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.ffn_hidden_size=64",
    f"model.vocab_size={VOCAB}",
    "model.segment_length=16",
    "train.lanes=2",
    "train.lanes_per_microbatch=1",
    "train.segments_per_window=4",
    "bptt.chunks_per_window=2",
    "data.sets=[{path: nowhere}]",
)


def small(settings: str) -> Config:
    return load_config(None, [*SMALL, *settings.split()])


def step(world: int, rank: int, settings: str, *, sabotage: str | None = None) -> dict[str, Any]:
    """Trace one step of a rank; ` +statistics` behind the settings has it measure the memory."""
    settings, _, statistics = settings.partition(" +statistics")
    with ExitStack() as patches:
        if sabotage:
            patches.enter_context(mock.patch.object(RMSNorm, "forward", SABOTAGE[sabotage]))
        trace = trace_step(small(settings), world, rank, VOCAB, statistics=bool(statistics))
    return {
        "unlisted": [str(read.place) for read in trace.unlisted_reads],
        "reads": sorted({f"{read.place.file} {read.place.function}" for read in trace.reads}),
        "in_layers": {phase: trace.in_layers(phase) for phase in ("forward", "recomputation", "backward")},
        "collectives": {(key.group, key.kind): traffic for key, traffic in trace.collectives.items()},
        "at_peak": trace.at_peak,
        "peak": trace.peak_bytes,
    }


def context_traffic(context: int, settings: list[str]) -> dict[str, tuple[float, int]]:
    """By settings: what the first rank of a context group sends to it in a traced step, and what a plan says of it."""
    found = {}
    for setting in settings:
        config = small(f"parallel.context={context} model.num_layers=1 {setting}")
        trace = trace_step(config, context, 0, VOCAB, update=False)
        sent = 0.0
        for key, traffic in trace.collectives.items():
            if key.group == "context":
                # Of what is gathered, all but the next rank's part goes on; what is received is another one's.
                share = {"allgather_base": (context - 1) / context, "send": 1, "recv": 0}[key.kind]
                sent += share * traffic.bytes * trace.microbatches_per_step / trace.microbatches
        found[setting] = sent, predict_step(config, context, VOCAB, Rates(1.0, 1.0)).context_sent[0]
    return found


BYTES = "model.hidden_size=64 model.ffn_hidden_size=128 model.segment_length=64 train.lanes=4 model.num_layers=4 "


def traced_bytes(world: int, rank: int, settings: str) -> dict[str, int]:
    """What live bytes are made of at the peak of forward and backward passes."""
    return trace_step(small(BYTES + settings), world, rank, VOCAB, update=False, microbatches=2).at_peak


def _join(config: Config) -> Topology:
    parallel = config.parallel
    return initialize(tensor=parallel.tensor, context=parallel.context, pipeline=parallel.pipeline, timeout_s=60)


def measured_bytes(settings: str) -> tuple[int, int]:
    """Rank, and the bytes at the peak of the same passes, with real tensors in real processes."""
    config = small(BYTES + settings)
    topology = _join(config)
    with whole_tensors(), LiveBytes() as live:
        run = TracedRun(config, dist.get_world_size(), VOCAB, topology, live, update=False)
        run.microbatches = 2
        live.forget_peak()
        run.step(Ledger("cpu"), statistics=False, observer=lambda operation: None)
    return dist.get_rank(), live.peak


def _scan_at_once(
    initial: torch.Tensor, blocks: Blocks, borders: Borders, part: ContextPart | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return scan_pairs(initial, compose_neighbours(block_pairs(blocks)), borders, part)


@contextlib.contextmanager
def whole_tensors() -> Iterator[None]:
    """What a CPU takes in blocks, to keep it in its cache, it takes at once, as the traced device does."""
    with (
        mock.patch.object(device, "CACHE_BLOCK_BYTES", 2**60),
        mock.patch.object(deltanet, "scan_blocks", _scan_at_once),
        mock.patch.object(normalized, "scan_blocks", _scan_at_once),
    ):
        yield


BUCKET = 10**4
"""Gradients that are reduced at once, so that a bucket does not dwarf a small model."""


@contextlib.contextmanager
def small_buckets(bucket: int = BUCKET) -> Iterator[None]:
    """Reduce `bucket` gradients at once, and plan so."""
    update_peak.update_peak.cache_clear()
    with (
        mock.patch.object(optimizer, "REDUCTION_BUCKET", bucket),
        mock.patch.object(update_peak, "REDUCTION_BUCKET", bucket),
    ):
        yield
    update_peak.update_peak.cache_clear()


def planned_and_traced_step(world: int, rank: int, settings: str) -> tuple[int, int]:
    """The estimate for a rank, and the traced peak of a whole step."""
    config = small(BYTES + settings)
    with small_buckets():
        needs = per_rank_bytes(config, world, VOCAB)[rank // (world // config.parallel.pipeline)]
        return needs.total, trace_step(config, world, rank, VOCAB).peak_bytes


def measured_step(settings: str) -> tuple[int, int]:
    """Rank, and the bytes at the peak of the same step with real tensors in real processes."""
    config = small(BYTES + settings)
    topology = _join(config)
    # DeepSpeed keeps shapes as tensors without memory.
    with small_buckets(), whole_tensors(), LiveBytes("cpu") as live:
        run = TracedRun(config, dist.get_world_size(), VOCAB, topology, live, update=True)
        live.forget_peak()
        run.step(Ledger("cpu"), statistics=False, observer=lambda operation: None)
    return dist.get_rank(), live.peak


_forward = RMSNorm.forward


def _reads_a_value(self: RMSNorm, hidden: torch.Tensor) -> torch.Tensor:
    return _forward(self, hidden) * max(hidden.detach().sum().item(), 1.0)


def _asks_for_places(self: RMSNorm, hidden: torch.Tensor) -> torch.Tensor:
    return _forward(self, hidden) + hidden.detach()[hidden.detach() > 0].sum()


def _copies_to_the_host(self: RMSNorm, hidden: torch.Tensor) -> torch.Tensor:
    hidden.detach().cpu()
    return _forward(self, hidden)


def _lives_on_the_cpu(self: RMSNorm, hidden: torch.Tensor) -> torch.Tensor:
    return _forward(self, hidden) * torch.ones(hidden.shape[-1])


SABOTAGE = {
    "item": _reads_a_value,
    "mask": _asks_for_places,
    "cpu": _copies_to_the_host,
    "device": _lives_on_the_cpu,
}
"""What must not be in a layer."""


def _reads(ledger: Ledger) -> tuple[list[str], list[str]]:
    """Places where the host waits, and those of them without a reason."""
    places = sorted({f"{read.place.file} {read.place.function}" for read in ledger.reads})
    return places, [str(read.place) for read in ledger.reads if listed(read.place) is None]


def snapshot(settings: str) -> tuple[list[str], list[str]]:
    """A checkpoint's copy to host memory."""
    config = small(settings)
    with pretended_world(config, 0, 2) as topology:
        live, ledger = LiveBytes(topology.device.type), Ledger(topology.device.type, group_labels(topology))
        with live:
            run = TracedRun(config, 2, VOCAB, topology, live, update=True)
            with ledger:
                parts = {
                    "optimizer": SavedOptimizer(run.optimizer, topology),
                    "memory": CarriedMemory(run.memory, list(run.stage.layers), topology, (0, 1)),
                    "progress": Progress(),
                }
                take_snapshot(parts, {}, owns_lanes=True)
    return _reads(ledger)


def evaluation(world: int, rank: int, settings: str) -> dict[str, Any]:
    """An evaluation inside a run: losses by segment and answers, with the memory on, off and exchanged."""
    trace = trace_evaluation(small(settings), world, rank, VOCAB)
    return {
        "reads": {f"{read.place.file} {read.place.function}": times for read, times in trace.reads.items()},
        "unlisted": [str(read.place) for read in trace.unlisted_reads],
        "documents": trace.documents,
        "windows": trace.windows,
        "peak": trace.peak_bytes,
    }


def generation(settings: str, *, temperature: float = 0.0, tokens: int = 4, records: bool = False) -> dict[str, Any]:
    """Two prompts of more than a segment, and some tokens after them, over a segment's end."""
    config = small(settings)
    with pretended_world(config, 0, 1) as topology:
        with topology.device:
            model = IncrementalModel(Streamer(build_stage(config, topology, VOCAB), topology), VOCAB)
        model.records = records
        with Ledger(topology.device.type) as reading:
            state = model.start(2)
            model.read(state, [[np.arange(30, dtype=np.int64)], [np.arange(20, dtype=np.int64)]])
        with Ledger(topology.device.type) as ledger:
            for _ in range(tokens):
                logits = model.next_logits(state)
                model.append(state, choose(logits, Sampling(temperature), [torch.Generator() for _ in range(2)]))
    _, unlisted = _reads(ledger)
    return {
        "reading": _reads(reading)[0],
        "reads_per_token": ledger.reads.total() / tokens,
        "unlisted": unlisted,
    }


def command(arguments: list[str]) -> tuple[int, str]:
    """Exit code and standard output of an `infini` command, with single spaces."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = main(arguments)
    return code, " ".join(output.getvalue().split())


def plan_and_trace(path: str, layers_per_stage: int | None) -> dict[str, Any]:
    """The estimate of the largest rank of a configuration, and its trace, in bytes.

    Args:
        layers_per_stage: instead of the configuration's own number of layers; None for those.
    """
    config = load_config(path, [])
    parallel = config.parallel
    if layers_per_stage is not None:
        config.model.num_layers, parallel.layers_per_stage = layers_per_stage * parallel.pipeline, None
    vocab = config.model.vocab_size or ASSUMED_VOCAB
    # Two copies of the model, so that ZeRO shares out; one where there is a single lane.
    world = processes_per_lane(config) * (1 + (config.train.lanes % 2 == 0))
    return _estimate_and_trace(config, world, vocab)


def update_and_trace(world: int, bucket: int, settings: str) -> dict[str, Any]:
    """The same of a small model with hardly any tokens, whose update has the peak: buckets of `bucket` gradients."""
    few_tokens = "train.lanes=8 train.segments_per_window=2 bptt.recompute=layer train.precision=bf16 "
    config = small(few_tokens + "model.hidden_size=64 model.ffn_hidden_size=256 " + settings)
    with small_buckets(bucket):
        return _estimate_and_trace(config, world, VOCAB)


def packed_and_trace(settings: str) -> dict[str, Any]:
    """The same of a small model with long segments, whose mask is a good part of it."""
    long = "data.packing=true model.segment_length=512 train.lanes=4 train.precision=bf16 "
    with small_buckets(10**4):
        return _estimate_and_trace(small(long + settings), 1, VOCAB)


def _estimate_and_trace(config: Config, world: int, vocab: int) -> dict[str, Any]:
    needs = max(per_rank_bytes(config, world, vocab), key=lambda needs: needs.total)
    trace = trace_step(config, world, first_rank(config, world, needs.stage), vocab)
    return {
        "estimate": needs.total,
        "trace": trace.peak_bytes,
        "in_update": needs.update > needs.passes,
        "at_peak": trace.at_peak,
        "needs": str(needs),
    }
