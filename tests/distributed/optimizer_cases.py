"""What the ranks run in test_optimizer.py."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed import distributed_c10d

from model.rules.state import map_memory
from pipeline.config.load import load_config
from pipeline.parallel.setup import build_stage
from pipeline.training.learning_rate import learning_rate
from tests.distributed.cases import TINY, finish, make_trainer


def plain_loop(folder: str, data: str, overrides: list[str], steps: int) -> dict[str, Any]:
    """The steps of `train_steps` by hand, on one process: one graph per window, torch's AdamW, no DeepSpeed.

    Returns:
        Losses, gradient norms and the weights in the end.
    """
    trainer = make_trainer(folder, data, overrides)  # for its batches
    config = load_config(None, [*TINY, *overrides])
    stage = build_stage(config, trainer.topology, trainer.vocab_size)
    decayed, plain, beta, names = [], [], [], {}
    for name, parameter in stage.named_parameters():
        names[name] = parameter
        (beta if name.endswith("beta") else decayed if parameter.dim() == 2 else plain).append(parameter)
    settings = config.optimizer
    adamw = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": settings.weight_decay, "scale": 1.0},
            {"params": plain, "weight_decay": 0.0, "scale": 1.0},
            {"params": beta, "weight_decay": 0.0, "scale": settings.beta_lr_scale},
        ],
        betas=tuple(settings.betas),
        eps=settings.eps,
    )
    memory = stage.empty_memory(config.train.lanes, torch.device("cpu"))
    losses, norms = [], []
    for step in range(steps):
        batch = trainer.loader.next_batch()
        output = stage(batch.tokens, memory, batch.reset, batch.labels)
        loss = (output.token_loss * batch.loss_weight).sum() / batch.loss_weight.double().sum()
        adamw.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in names.values()]).norm()
        for parameter in names.values():
            parameter.grad /= max(1.0, (norm.item() + 1e-6) / settings.clip)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(settings, step, config.train.steps) * group["scale"]
        adamw.step()
        memory = map_memory(output.memory, torch.Tensor.detach)
        losses.append(loss.item())
        norms.append(norm.item())
    finish(trainer)
    weights = {f"master/{name}": parameter.detach() for name, parameter in names.items()}
    return {"losses": losses, "norms": norms, "tensors": weights}


class _TensorFinder(pickle._Pickler):
    """Pickles nothing, and says which tensors it would have pickled."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.found: list[str] = []

    def persistent_id(self, part: Any) -> str | None:
        if not isinstance(part, torch.Tensor):
            return None
        self.found.append(f"{part.dtype} {tuple(part.shape)}")
        return "tensor"


def train_and_look(folder: str, data: str, overrides: list[str], steps: int) -> dict[str, Any]:
    """Train with statistics of the memory in every step, and save.

    Returns:
        The tensors that were pickled to reach other processes, and what was measured in the last step.
    """
    pickle_for_others, found = distributed_c10d._object_to_tensor, []

    def watched(value, *args, **kwargs):
        finder = _TensorFinder()
        finder.dump(value)
        found.extend(finder.found)
        return pickle_for_others(value, *args, **kwargs)

    distributed_c10d._object_to_tensor = watched
    try:
        trainer = make_trainer(folder, data, [*overrides, "metrics.memory_interval=1"])
        trainer.start(None)
        for _ in range(steps):
            trainer.train_step()
        trainer.save()
        finish(trainer)
    finally:
        distributed_c10d._object_to_tensor = pickle_for_others
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return {"pickled": found, "measured": next(x for x in reversed(lines) if "norm_M/layer_00" in x)}


def train_and_listen(folder: str, data: str, overrides: list[str], steps: int, unweighted: int = 0) -> dict[str, Any]:
    """Train; what the console said, and the numbers of the last log interval.

    Args:
        unweighted: a step in which no token has a loss weight.
    """
    trainer, printed = make_trainer(folder, data, overrides), io.StringIO()
    next_batch = trainer.loader.next_batch

    def next_unweighted():
        batch = next_batch()
        if trainer.progress.step + 1 == unweighted:
            batch.loss_weight.zero_()
            batch.weight = 0.0
        return batch

    trainer.loader.next_batch = next_unweighted
    with contextlib.redirect_stdout(printed):
        trainer.start(None)
        for _ in range(steps):
            trainer.train_step()
    finish(trainer)
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "loss/train" in line)  # the very last one says how the run ended
    return {"printed": " ".join(printed.getvalue().split()), "last": last}
