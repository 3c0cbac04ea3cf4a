"""What the ranks run in test_bfloat16.py: some steps of a trainer, and what its state is made of."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pipeline.checkpoint.loading import load_weights, open_verified
from pipeline.parallel.setup import build_stage
from tests.distributed.cases import finish, full_memory, full_weights, make_trainer


class _Traffic(TorchDispatchMode):
    """Bytes that collectives give to this process, by operation and precision."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "c10d":
            for tensor in tree_iter(args[0]):
                if isinstance(tensor, Tensor):
                    self.bytes[function.overloadpacket.__name__, tensor.dtype] += tensor.nbytes
        return result


def examine(
    folder: str, data: str, overrides: list[str], steps: int, resume: str | None = None, save: bool = False
) -> dict[str, Any]:
    """Train some steps.

    Returns:
        `start`: the masters before the first step. `losses`, `norms`. `unsharded`: bytes of parameters and their
        gradients in the middle of the last step, by precision of the parameter, and elements. `traffic`: bytes of the
        last step's collectives by operation and precision. `rounded`: whether the parameters are the rounded masters.
        `tensors`: masters, moments and memory at the end. With `save`, `evaluated`: whether a stage that evaluation
        builds from the checkpoint has the same parameters, bit for bit (not under ZeRO 3).
    """
    trainer = make_trainer(folder, data, overrides)
    trainer.start(resume)
    optimizer = trainer.optimizer
    if not optimizer.steps_taken()[0]:
        optimizer.set_steps_taken(0, 0)  # moments that can be looked at
    found: dict[str, Any] = {"losses": [], "norms": [], "unsharded": {}, "traffic": {}, "start": full_weights(trainer)}
    update, synchronise = trainer.update, optimizer._synchronise_replicas

    def watched_update(*arguments):
        sums, outcome, rate = update(*arguments)
        found["losses"].append(sums["loss"] / sums["weight"])
        found["norms"].append(outcome.gradient_norm)
        return sums, outcome, rate

    def watched_synchronise():
        for _, parameter in optimizer.named:
            elements, held = found["unsharded"].get(parameter.dtype, (0, 0))
            gradient = 0 if parameter.grad is None else parameter.grad.nbytes
            size = optimizer.partitions.held(parameter).nbytes + gradient
            found["unsharded"][parameter.dtype] = (elements + optimizer.partitions.count(parameter), held + size)
        synchronise()

    trainer.update, optimizer._synchronise_replicas = watched_update, watched_synchronise
    for _ in range(steps):
        found["unsharded"] = {}
        with _Traffic() as traffic:
            trainer.train_step()
        found["traffic"] = dict(traffic.bytes)
    found["rounded"] = all(_is_rounded(optimizer, fragment) for fragment in optimizer.fragments())
    found["tensors"] = full_weights(trainer) | full_memory(trainer)
    if save:
        trainer.save()
        trainer.saver.wait()
        if optimizer.zero_stage < 3:
            reader = open_verified(trainer.run_dir / "checkpoints" / f"step_{trainer.progress.step:08d}")
            stage = build_stage(trainer.config, trainer.topology, trainer.vocab_size)
            load_weights(reader, stage)
            pairs = zip(stage.parameters(), trainer.stage.parameters(), strict=True)
            found["evaluated"] = all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)
    finish(trainer)
    if dist.get_rank() > 0:
        del found["start"], found["tensors"]
    return found


def _is_rounded(optimizer, fragment) -> bool:
    held, master = optimizer.partitions.held(fragment.parameter).view(-1), fragment.tensors["master"]
    start = 0 if optimizer.zero_stage == 3 else fragment.start
    return torch.equal(held[start : start + master.numel()], master.to(held.dtype))
