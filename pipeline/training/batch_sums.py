"""What the losses of a step's batch come to over all processes."""

from __future__ import annotations

import torch
from torch import Tensor

from data.lanes.loader import WindowBatch
from pipeline.parallel.topology import Topology
from pipeline.schedule.executor import StepResult

NAMES = ("loss", "answer_loss", "answers", "probe_loss", "probe_answers", "tokens", "padded", "weight", "keys", "gate")
"""`loss` is weighted, and `weight` the sum of the weights; answers and probes are means over what they count; `keys` is
what tokens see in the local attention, where documents share segments."""


def own_sums(batch: WindowBatch, result: StepResult, topology: Topology, *, sliding: bool = False) -> Tensor:
    """This process's part of the sums over the global batch, float64 in the order of `NAMES`, on its device.

    Each part is contributed by one copy of it. Nothing is read here: the sums travel with the gradient norms.

    Args:
        sliding: the local attention sees the segment before as well.
    """
    device = topology.device
    own: dict[str, Tensor | float] = dict.fromkeys(NAMES, 0.0)
    if topology.is_last_stage and topology.tensor_rank == 0:
        losses = result.token_loss.double()
        own["loss"] = (losses * batch.loss_weight).sum()
        answers = batch.answer_mask & (batch.loss_weight > 0)  # not those of documents entered past their beginning
        own["answer_loss"], own["answers"] = losses.where(answers, 0).sum(), answers.sum()
        if batch.probes is not None:
            probe_losses, asked = result.probe_loss.double(), batch.probes.loss_weight > 0
            own["loss"] = own["loss"] + (probe_losses * batch.probes.loss_weight).sum()
            own["probe_loss"], own["probe_answers"] = probe_losses.where(asked, 0).sum(), asked.sum()
        own["padded"] = batch.padded_tokens
        own["tokens"] = batch.tokens.numel() - batch.padded_tokens
        own["weight"] = batch.weight
        if batch.starts is not None and topology.context_rank == 0:  # which is of the whole window
            own["keys"] = keys_seen(batch.starts, sliding=sliding)
    own["gate"] = result.gate_sum
    on_host = torch.tensor([0.0 if isinstance(x, Tensor) else float(x) for x in own.values()], dtype=torch.float64)
    sums = on_host.to(device, non_blocking=True)
    for i, value in enumerate(own.values()):
        if isinstance(value, Tensor):
            sums[i] = value
    return sums


def keys_seen(starts: Tensor, *, sliding: bool) -> Tensor:
    """How many keys the tokens of packed lanes see in the local attention, in all; itself a token sees by half, as in
    `pipeline.accounting.flops`.

    With a sliding context a window's first segment sees a part of one that is not here: taken for that is what its last
    segment would show.

    Args:
        starts: bool `[b, t, s]`, True at a document's first token.
    """
    length = starts.shape[2]
    place = torch.arange(length, device=starts.device)
    first = torch.where(starts, place, 0).cummax(dim=2).values  # of the token's piece
    keys = (place - first + 0.5).sum(dtype=torch.float64)
    if not sliding:
        return keys
    going_on = (starts.cumsum(dim=2) == 0).sum(dim=2)  # tokens of a segment's piece 0, which sees the segment before
    last_piece = length - first[:, :, -1]
    return keys + (going_on * last_piece.roll(1, dims=1)).sum()


def named(sums: list[float]) -> dict[str, float]:
    """Sums over all processes by their names."""
    return dict(zip(NAMES, sums, strict=True))
