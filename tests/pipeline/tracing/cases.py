"""What the tracing tests run in a process of its own: PyTorch has a pretended device there for the rest of its life."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from model.layers.norm import RMSNorm
from pipeline.accounting.live_bytes import LiveBytes
from pipeline.checkpoint.run_state import CarriedMemory, Progress, SavedOptimizer
from pipeline.checkpoint.writer import take_snapshot
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.evaluation.heldout import segment_losses
from pipeline.inference.incremental import IncrementalModel
from pipeline.inference.sampling import Sampling, choose
from pipeline.inference.streaming import Streamer, array_document
from pipeline.tracing.host_reads import listed
from pipeline.tracing.ledger import Ledger
from pipeline.tracing.step import TracedRun, trace_step
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


def evaluation(settings: str) -> tuple[list[str], list[str]]:
    """Losses by segment, with the memory on, off and exchanged."""
    config = small(settings)
    with pretended_world(config, 0, 1) as topology:
        with topology.device:
            streamer = Streamer(config, topology, VOCAB)
        no_numbers = mock.patch.object(FakeTensor, "numpy", lambda x: np.zeros(tuple(x.shape)), create=True)
        documents = [array_document(name, np.arange(40, dtype=np.int64)) for name in "ab"]
        with no_numbers, Ledger(topology.device.type) as ledger:
            segment_losses(streamer, documents, 0, lambda count: None)
    return _reads(ledger)


def generation(settings: str) -> tuple[list[str], list[str]]:
    """A prompt of more than a segment, and some tokens after it, over a segment's end."""
    config = small(settings)
    with pretended_world(config, 0, 1) as topology:
        with topology.device:
            model = IncrementalModel(Streamer(config, topology, VOCAB), VOCAB)
        with Ledger(topology.device.type) as ledger:
            state = model.start(2)
            model.read(state, [[np.arange(30, dtype=np.int64)], [np.arange(20, dtype=np.int64)]])
            for _ in range(4):
                logits = model.next_logits(state)
                model.append(state, [choose(row, Sampling(), torch.Generator()) for row in logits])
    return _reads(ledger)
