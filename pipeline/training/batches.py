"""A step's batch on its way to its device.

The thread that reads windows ahead puts them into page-locked memory, from where the device fetches them by itself: the
host goes on to start the step, and the copy waits for nobody but the work before it. Copying the window after the next
one beside a step, on a queue of its own, would gain nothing: 64 lanes of 8,192 tokens are 11 MB, half a millisecond.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from data.lanes.window import ProbeBatch, WindowBatch
from model.device import page_locked
from pipeline.config.schema import Config


def _tensors(batch: WindowBatch) -> Iterator[tuple[object, str, torch.Tensor]]:
    """What a device needs of a batch, with its place. Lane numbers stay: they are for messages."""
    for part in (batch, batch.probes):
        for name, value in list(vars(part).items()) if part is not None else ():
            if isinstance(value, torch.Tensor) and name != "lane_ids":
                yield part, name, value


def pinned_for(device: torch.device) -> Callable[[WindowBatch], WindowBatch] | None:
    """What the reading thread does with a window for `device`; None for the CPU, which has it already."""
    if device.type == "cpu":
        return None

    def pinned(batch: WindowBatch) -> WindowBatch:
        for part, name, value in _tensors(batch):
            setattr(part, name, page_locked(value, device))
        return batch

    return pinned


def to_device(batch: WindowBatch, device: torch.device) -> WindowBatch:
    """The batch with its tensors on `device`; from page-locked memory the host does not wait for them."""
    if device.type == "cpu":
        return batch
    for part, name, value in _tensors(batch):
        setattr(part, name, value.to(device, non_blocking=True))
    return batch


def full_batch(config: Config, lanes: int, device: torch.device) -> WindowBatch:
    """A window of `lanes` lanes in which every token and every probe counts, on `device`: the largest that a step can
    get. It says nothing: all tokens are the first one, in the middle of a document; with packing another one starts in
    the middle of every segment."""
    train, length = config.train, config.model.segment_length
    context = config.parallel.context
    segments, probes = train.segments_per_window // context, train.probes_per_window // context

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(lanes, *shape, dtype=dtype, device=device)

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(lanes, *shape, device=device)

    starts = None
    if config.data.packing:
        starts = zeros(train.segments_per_window, length, dtype=torch.bool)
        starts[:, :, length // 2] = True
    asked = ProbeBatch(zeros(probes, length), zeros(probes, length), ones(probes, length), zeros(probes))
    return WindowBatch(
        tokens=zeros(segments, length),
        labels=zeros(segments, length),
        loss_weight=ones(segments, length),
        answer_mask=zeros(segments, length, dtype=torch.bool),
        reset=zeros(train.segments_per_window, dtype=torch.bool),
        position_in_document=zeros(segments),
        lane_ids=zeros(),
        padded_tokens=0,
        documents=[[]] * lanes,
        starts=starts,
        probes=asked if probes else None,
        weight=float(lanes * (segments + probes) * length),
        digests=[0] * lanes,
        outlines=[0] * lanes,
    )
