"""An evaluation inside a run, traced as a step is: held-out documents and answers, by the code that measures them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from pipeline.accounting.live_bytes import LiveBytes
from pipeline.config.schema import Config
from pipeline.evaluation import answers
from pipeline.evaluation.heldout import segment_losses
from pipeline.inference.streaming import Document, Streamer, array_document
from pipeline.tracing.host_reads import listed
from pipeline.tracing.ledger import HostRead, Ledger
from pipeline.tracing.step import ACTIVATIONS, TracedRun
from pipeline.tracing.world import group_labels, pretended_world

SEGMENTS = 3
"""Of a document: one that begins it, one that reads a memory, and one that ends it."""


@dataclass(frozen=True)
class EvaluationTrace:
    """What one rank does with one batch of held-out documents, and one of documents with an answer."""

    documents: int
    """Of a batch."""
    windows: int
    peak_bytes: int
    """With all that a step leaves there: parameters, optimizer, the lanes' memory."""
    reads: Counter[HostRead]

    @property
    def unlisted_reads(self) -> list[HostRead]:
        """Those that nobody has given a reason for."""
        return [read for read in self.reads if listed(read.place) is None]


def trace_evaluation(config: Config, world_size: int, rank: int, vocab: int) -> EvaluationTrace:
    """Trace an evaluation between two steps of a rank; see `trace_step` for arguments and errors."""
    windows = 0

    def counted() -> bool:
        nonlocal windows
        windows += 1
        return False

    with pretended_world(config, rank, world_size) as topology:
        live = LiveBytes(topology.device.type)
        with live:
            run = TracedRun(config, world_size, vocab, topology, live, update=True)
            live.forget_peak()
            live.label = ACTIVATIONS
            streamer = Streamer(run.stage, topology)
            streamer.interrupted = counted
            streamer.add_up = lambda sums: sums  # of copies that are not there
            count = streamer.max_lanes * topology.data_size  # a batch for each copy of the model
            with Ledger(topology.device.type, group_labels(topology)) as ledger, run.optimizer.whole_parameters():
                segment_losses(streamer, [_document(streamer) for _ in range(count)], 0, lambda tokens: None)
                cell = answers.Cell(lambda number: _document(streamer), count, SEGMENTS)
                answers.measure(streamer, answers.plan(streamer, [cell]), 0, lambda tokens: None)
    return EvaluationTrace(streamer.max_lanes, windows, live.peak, ledger.reads)


def _document(streamer: Streamer) -> Document:
    length = SEGMENTS * streamer.segment_length
    return array_document("", np.zeros(length, dtype=np.int32), [(length - 2, length)])
