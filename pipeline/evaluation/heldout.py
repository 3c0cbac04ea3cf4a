"""Loss on held-out documents by segment index, with the memory on, off, exchanged between documents, and emptied.

Segment t of a document is read with

    on          the memory that the document itself has built up
    off         local attention only
    shuffled    the memory that the next document of the batch has built up before its segment t (or by its end, when
                it is shorter); nothing that is computed with it is kept
    reset       what the document has built up since its memory was last emptied, as it is before every k-th segment
                (`evaluate.reset_every`); what a sliding context sees stays

so `shuffled` sees a memory of the right age and size with the wrong contents: where it does as well as `on`, the
memory holds nothing about the document; and where `reset` does, nothing of use in it is older. All ways see the same
tokens of the same documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.prepared.shards import PreparedSet
from model.rules.state import beside_context, choose_lanes, roll_lanes
from pipeline.evaluation.intervals import ratio_intervals, resample_counts
from pipeline.inference.streaming import Document, Streamer


def choose_documents(
    source: PreparedSet, *, documents: int, max_segments: int, segment_length: int, seed: int
) -> list[Document]:
    """Documents to evaluate, cut to `max_segments` segments.

    Those of so many segments come first, in an order drawn from `seed`; when they are too few, those of the most
    segments. Not of the most tokens: of documents cut to a length, the pieces that came out a few tokens longer are
    those of one source.

    Raises:
        ValueError: no document of the split has two tokens.
    """
    full = max_segments * segment_length + 1
    lengths = np.minimum(source.lengths, full)
    order = np.random.default_rng(seed).permutation(len(lengths))
    segments = -(-(lengths - 1) // segment_length)
    order = order[np.argsort(-segments[order], kind="stable")][:documents]
    chosen = [
        Document(
            source.document_name(int(i)), int(lengths[i]), lambda start, stop, i=int(i): source.read(i, start, stop)
        )
        for i in order
        if lengths[i] >= 2
    ]
    if not chosen:
        raise ValueError(f"{source.path}: the {source.split} split holds no document of two tokens or more")
    return chosen


def segment_losses(
    streamer: Streamer,
    documents: list[Document],
    eos_id: int,
    advance: Callable[[int], None],
    *,
    reset_every: int | None = None,
) -> dict[str, np.ndarray]:
    """Summed losses and their numbers of tokens; collective, the same result on all ranks. Data-parallel ranks take
    turns with the batches.

    Args:
        advance: called with numbers of tokens that are done, of all ranks by this one's measure.
        reset_every: segments between the places where `reset` empties the memory; None leaves `reset` out.

    Returns:
        `weight` and one entry per way to evaluate (`on`, `off`, `shuffled`, `reset`; only `on` without a memory; no
        `shuffled` for a single document), each `[documents, segments]` in the order given.
    """
    ways = ["on", "off", "shuffled"] if streamer.has_memory else ["on"]
    ways += ["reset"] if streamer.has_memory and reset_every is not None else []
    if len(documents) == 1:
        ways = [way for way in ways if way != "shuffled"]
    segments = max(document.segments(streamer.segment_length) for document in documents)
    sums = {name: np.zeros((len(documents), segments)) for name in (*ways, "weight")}
    done = 0
    topology = streamer.topology
    for number, batch in enumerate(streamer.batches(documents)):
        rows = slice(done, done + len(batch))
        done += len(batch)
        if number % topology.data_size != topology.data_rank:
            continue
        # Without memory a document has a state of its own: a sliding context holds what upper layers have read.
        memory = without = young = empty = streamer.empty_memory(len(batch))
        found: dict[str, list[Tensor]] = {way: [] for way in ways}
        for segment in range(max(document.segments(streamer.segment_length) for document in batch)):
            window = streamer.window(batch, segment, 1, eos_id)
            weight = window.loss_weight.double()
            outputs = {"on": streamer.run(window, memory)}
            if "off" in ways:
                outputs["off"] = streamer.run(window, without, memory_off=True)
                without = outputs["off"].memory
            if "shuffled" in ways:
                outputs["shuffled"] = streamer.run(window, roll_lanes(memory, with_context=False))
            if "reset" in ways:
                young = beside_context(empty, young) if segment % reset_every == 0 else young
                outputs["reset"] = streamer.run(window, young)
                young = outputs["reset"].memory
            for way, output in outputs.items():
                if output.loss is not None:
                    found[way].append((output.loss.double() * weight).sum(dim=(1, 2)))
            labels = [document.labels(segment, streamer.segment_length) for document in batch]
            sums["weight"][rows, segment] = labels
            # A document that has ended keeps its memory for the one that is to read it.
            memory = choose_lanes(weight.sum(dim=(1, 2)) > 0, outputs["on"].memory, memory)
            advance(sum(labels) * topology.data_size)
        for way, losses in found.items():
            if losses:  # one copy to the host for all segments: a device is waited for once a batch and way
                sums[way][rows, : len(losses)] = torch.stack(losses, dim=1).tolist()
    names = list(sums)
    return dict(zip(names, streamer.add_up(np.stack([sums[name] for name in names])), strict=True))


def summarize(sums: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Means with 95 % bootstrap intervals over documents, all of them and by segment index.

    Returns:
        `documents`, `tokens`, `by_segment_documents`, `by_segment_tokens`; per way under `ways`: `loss`,
        `loss_interval`, `perplexity`, `by_segment`, `by_segment_interval` (low ends, high ends); per control under
        `above_on` how much more it loses, from paired resamples: `loss`, `loss_interval`, `by_segment`,
        `by_segment_interval`.
    """
    weight = sums["weight"]
    counts = resample_counts(len(weight), seed)

    def summary(values: np.ndarray) -> dict[str, Any]:
        total = weight.sum(axis=0)
        by_segment = np.divide(values.sum(axis=0), total, out=np.full(total.shape, np.nan), where=total > 0)
        return {
            "loss": float(values.sum() / weight.sum()),
            "loss_interval": ratio_intervals(values.sum(axis=1), weight.sum(axis=1), counts).tolist(),
            "by_segment": by_segment.tolist(),
            "by_segment_interval": ratio_intervals(values, weight, counts).tolist(),
        }

    ways = {way: summary(values) for way, values in sums.items() if way != "weight"}
    for facts in ways.values():
        with np.errstate(over="ignore"):
            facts["perplexity"] = float(np.exp(np.float64(facts["loss"])))
    return {
        "documents": len(weight),
        "tokens": int(weight.sum()),
        "by_segment_documents": (weight > 0).sum(axis=0).tolist(),
        "by_segment_tokens": weight.sum(axis=0).astype(int).tolist(),
        "ways": ways,
        "above_on": {way: summary(sums[way] - sums["on"]) for way in ways if way != "on"},
    }


def each_document(sums: dict[str, np.ndarray], names: Sequence[str]) -> list[dict[str, Any]]:
    """What every document loses: `name`, `tokens`, `tokens_by_segment`, and per way its mean `loss` and the means
    `loss_by_segment` (NaN behind its end)."""
    weight = sums["weight"]
    ways = {way: values for way, values in sums.items() if way != "weight"}
    none = np.full(weight.shape[1], np.nan)
    return [
        {
            "name": name,
            "tokens": int(own.sum()),
            "tokens_by_segment": own.astype(int).tolist(),
            "loss": {way: float(values[i].sum() / own.sum()) for way, values in ways.items()},
            "loss_by_segment": {
                way: np.divide(values[i], own, out=none.copy(), where=own > 0).tolist() for way, values in ways.items()
            },
        }
        for i, (name, own) in enumerate(zip(names, weight, strict=True))
    ]
