"""A step's batch on its device, and what its losses come to over all processes."""

from __future__ import annotations

import torch

from data.lanes.loader import WindowBatch
from pipeline.parallel.topology import Topology
from pipeline.schedule.executor import StepResult


def to_device(batch: WindowBatch, device: torch.device) -> WindowBatch:
    """The batch with its tensors on `device`."""
    if device.type == "cpu":
        return batch
    for part in (batch, batch.probes):
        for name, value in vars(part).items() if part is not None else ():
            if isinstance(value, torch.Tensor):
                setattr(part, name, value.to(device, non_blocking=True))
    return batch


def global_sums(batch: WindowBatch, result: StepResult, topology: Topology) -> dict[str, float]:
    """Sums over the global batch, reduced over all processes; each part is contributed by one copy of it.

    Returns:
        `loss` (weighted), `answer_loss`, `answers`, `probe_loss`, `probe_answers`, `tokens`, `padded`, `gate`.
    """
    local = dict.fromkeys(("loss", "answer_loss", "answers", "probe_loss", "probe_answers", "tokens", "padded"), 0.0)
    if topology.is_last_stage and topology.tensor_rank == 0:
        losses = result.token_loss.double()
        local["loss"] = float((losses * batch.loss_weight).sum())
        answers = batch.answer_mask & (batch.loss_weight > 0)  # not those of documents entered past their beginning
        local["answer_loss"] = float(losses.where(answers, 0).sum())
        local["answers"] = float(answers.sum())
        if batch.probes is not None:
            probe_losses, asked = result.probe_loss.double(), batch.probes.loss_weight > 0
            local["loss"] += float((probe_losses * batch.probes.loss_weight).sum())
            local["probe_loss"] = float(probe_losses.where(asked, 0).sum())
            local["probe_answers"] = float(asked.sum())
        local["padded"] = float(batch.padded_tokens)
        local["tokens"] = float(batch.tokens.numel() - batch.padded_tokens)
    local["gate"] = result.gate_sum
    return dict(zip(local, topology.all_reduce(list(local.values())), strict=True))
