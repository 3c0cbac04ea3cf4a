"""A step's batch on its device."""

from __future__ import annotations

import torch

from data.lanes.loader import WindowBatch


def to_device(batch: WindowBatch, device: torch.device) -> WindowBatch:
    """The batch with its tensors on `device`."""
    if device.type == "cpu":
        return batch
    for part in (batch, batch.probes):
        for name, value in vars(part).items() if part is not None else ():
            if isinstance(value, torch.Tensor):
                setattr(part, name, value.to(device, non_blocking=True))
    return batch
