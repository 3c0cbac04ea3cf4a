"""What the ranks run in test_precision.py: one bfloat16 window through the executor, watched while it goes back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.layers import attention
from pipeline.schedule.executor import Executor
from pipeline.schedule.operations import build_schedule
from tests.distributed.bptt_cases import GATE_SCALE, prepare

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "triangular_solve", "linalg_solve_triangular")


class _Watch(TorchDispatchMode):
    """Writes down what runs in a backward pass: in which node of the graph, what, and the precision of its results."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: set[Any] = set()
        """Nodes of the memory's part of the graph."""
        self.border: set[Any] = set()
        """Nodes that take bfloat16 into it, and give bfloat16 back; their products are the memory's."""
        self.in_memory: list[tuple[str, str, torch.dtype]] = []
        self.elsewhere: list[tuple[str, str, torch.dtype]] = []

    def follow(self, *outputs: Tensor) -> None:
        """The memory's part: from what it gives back to where its inputs become float32."""
        waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
        while waiting:
            node = waiting.pop()
            if node in self.memory or node in self.border:
                continue
            before = [(following, i) for following, i in node.next_functions if following is not None]
            wide = [following for following, i in before if following._input_metadata[i].dtype != torch.bfloat16]
            (self.memory if len(wide) == len(before) else self.border).add(node)
            waiting += wide

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        node = torch._C._current_autograd_node()
        name = function.overloadpacket.__name__
        if node is not None and (node not in self.border or name in PRODUCTS):
            found = self.elsewhere if node not in self.memory | self.border else self.in_memory
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    found.append((node.name(), name, tensor.dtype))
        return result


def run_window(overrides: list[str], chunks: int) -> dict[str, Any]:
    """Forward and backward of a window.

    Returns:
        What ran in the backward pass, inside the memory and elsewhere; and the gradients.
    """
    config, topology, stage, batch, memory = prepare(overrides)
    watch = _Watch()
    remember, mix = attention.remember, attention.mix

    def watched_remember(*args, **kwargs):
        read, present, after = remember(*args, **kwargs)
        watch.follow(read, *after)
        return read, present, after

    def watched_mix(share, read, local):
        watch.follow(share, read)
        return mix(share, read, local)

    go_back = torch.autograd.backward

    def watched_backward(*args, **kwargs):
        with watch:
            go_back(*args, **kwargs)

    attention.remember, attention.mix = watched_remember, watched_mix
    torch.autograd.backward = watched_backward
    try:
        replay = config.bptt.recompute == "window"
        shape = {"stages": topology.pipeline_size, "stage": topology.pipeline_rank, "microbatches": 1, "chunks": chunks}
        Executor(stage, topology, chunks=chunks, carry_gradient=True).run(
            build_schedule(**shape, replay=replay),
            batch,
            memory,
            lanes_per_microbatch=config.train.lanes,
            loss_scale=1 / 100,
            gate_scale=GATE_SCALE,
        )
    finally:
        attention.remember, attention.mix = remember, mix
        torch.autograd.backward = go_back
    return {
        "in_memory": watch.in_memory,
        "elsewhere": watch.elsewhere,
        "gradients": {name: p.grad for name, p in stage.global_parameters()},
    }
