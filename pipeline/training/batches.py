"""A step's batch on its way to its device.

The thread that reads windows ahead puts them into page-locked memory, from where the device fetches them by itself: the
host goes on to start the step, and the copy waits for nobody but the work before it. Copying the window after the next
one beside a step, on a queue of its own, would gain nothing: 64 lanes of 8,192 tokens are 11 MB, half a millisecond.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from data.lanes.loader import WindowBatch
from model.device import page_locked


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
