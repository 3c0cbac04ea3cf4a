"""What the ranks run in test_context_scan.py: a float64 stage whose segments they share, against the same stage alone.

Every rank computes the whole window by itself first, in one graph, and returns how far it is from that.
"""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from model.rules import deltanet, normalized
from model.rules.context import ContextGroup
from model.rules.scan import block_pairs, compose_neighbours, scan_pairs
from model.rules.state import map_memory, memory_tensors
from tests.distributed.grid import join
from tests.model.build import random_memory, random_tokens, small_config, small_stage

SEGMENTS = 8
GATE_SCALE = 0.3
ON_FIRST_RANK = ("local_key", "local_value", "local_seen", "tail")
"""Fields of a state whose copy on the first rank is the one that counts."""


def resets() -> Tensor:
    """Of four lanes: none; where a part starts; inside parts; several, the first and the last segment among them."""
    reset = torch.zeros(4, SEGMENTS, dtype=torch.bool)
    reset[1, 4] = reset[2, 3] = reset[2, 6] = True
    reset[3, [0, 1, 2, 7]] = True
    return reset


class Window:
    """A window's inputs, what its outputs are weighed with, and a memory carried in; the same on every rank."""

    def __init__(self, stage, reset: Tensor, probes: int) -> None:
        lanes, segments = reset.shape
        self.reset, length = reset, stage.config.segment_length
        generator = torch.Generator().manual_seed(5)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.segments, self.probes = ([random_tokens(lanes, n, length, seed=i) for i in range(2)] for n in (8, probes))
        self.weights, self.probe_weights = (random(lanes, n, length) for n in (segments, probes))
        stride = segments // probes if probes else 0
        inside = torch.randint(0, max(stride, 1), (lanes, probes), generator=generator)
        self.asked = stride * torch.arange(probes) + inside
        self.memory = random_memory(stage, lanes)
        for state in self.memory:
            if "local_seen" in getattr(state, "_fields", ()):
                state.local_seen.data[::2] = 0
        self.of_memory = map_memory(self.memory, lambda x: random(*x.shape))

    def part(self, chunks: int, chunk: int, parts: int, part: int) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """Tokens and labels, weights of their losses, and what the probes ask, of a part of a chunk."""
        segments = self.reset.shape[1] // chunks // parts
        probes = self.asked.shape[1] // chunks // parts
        first, first_probe = ((chunk * parts + part) * n for n in (segments, probes))
        own, asking = slice(first, first + segments), slice(first_probe, first_probe + probes)
        given = [torch.cat([x[:, own], y[:, asking]], dim=1) for x, y in zip(self.segments, self.probes, strict=True)]
        weights = torch.cat([self.weights[:, own], self.probe_weights[:, asking]], dim=1)
        return given, weights, self.asked[:, asking] - first if probes else None

    def run(self, stage, context: ContextGroup | None, *, chunks: int = 1, replay: bool = False) -> dict[str, Tensor]:
        """Losses, gradients and memory, by the chunks that the schedule would make of the window.

        Args:
            replay: go forward without a graph first, and again before every chunk's backward pass.
        """
        stage.zero_grad(set_to_none=True)
        parts, rank = (context.size, context.rank) if context else (1, 0)
        memory = map_memory(self.memory, lambda x: x.detach())
        alive, losses, gate_sum = [], [], 0.0
        for chunk in range(chunks):
            leaves = map_memory(memory, lambda x: x.clone().requires_grad_())

            def compute(chunk=chunk, leaves=leaves):
                given, weights, asked = self.part(chunks, chunk, parts, rank)
                reset = self.reset.chunk(chunks, dim=1)[chunk]
                output = stage(given[0], leaves, reset, given[1], probes=asked)
                return output, (output.token_loss * weights).sum() + GATE_SCALE * output.gate_sum

            with torch.set_grad_enabled(not replay):
                output, objective = compute()
            alive.append((leaves, compute, None if replay else (output, objective)))
            losses.append(output.token_loss.detach())
            gate_sum += output.gate_sum.detach()
            memory = map_memory(output.memory, lambda x: x.detach())
        gradients = self._of_end(rank)
        for leaves, compute, kept in reversed(alive):
            output, objective = kept or compute()
            behind = memory_tensors(output.memory)
            pairs = [(x, g) for x, g in zip(behind, gradients, strict=True) if x.requires_grad]
            torch.autograd.backward([objective, *(x for x, _ in pairs)], [None, *(g for _, g in pairs)])
            gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in memory_tensors(leaves)]
        found = {"loss": torch.cat(losses, dim=1), "gate sum": gate_sum}
        found |= {f"d {name}": p.grad for name, p in stage.named_parameters() if p.grad is not None}
        fields = [f"{i} {field}" for i, state in enumerate(self.memory) for field in getattr(state, "_fields", ())]
        found |= {f"memory {name}": x for name, x in zip(fields, memory_tensors(memory), strict=True)}
        found |= {f"d memory {name}": x for name, x in zip(fields, gradients, strict=True)}
        return found

    def _of_end(self, rank: int) -> list[Tensor]:
        """The gradients of the memory carried out, as the chunk behind the window would give them to a rank."""
        found = []
        for state in self.of_memory:
            for name, x in ({} if state is None else state._asdict()).items():
                found.append(torch.zeros_like(x) if rank and name in ON_FIRST_RANK else x)
        return found


def compare(cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Of every case the relative distance of all that ranks compute together from what one computes alone.

    Args:
        cases: `model` (of `small_config`), and optional `probes`, `chunks`, `replay`, `options` (of the stage), `pairs`
            (make pairs, as a GPU does).
    """
    join(tensor=1, pipeline=1, timeout_s=60)
    context = ContextGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    return [_compare(context, **case) for case in cases]


def _compare(
    context: ContextGroup,
    model: dict[str, Any],
    probes: int = 0,
    chunks: int = 1,
    replay: bool = False,
    options: dict[str, Any] | None = None,
    pairs: bool = False,
) -> dict[str, float]:
    config = small_config(**model)
    alone, shared = (small_stage(config, context=c, **options or {}) for c in (None, context))
    window = Window(alone, resets(), probes)
    expected = window.run(alone, None)
    with by_pairs() if pairs else contextlib.nullcontext():
        found = window.run(shared, context, chunks=chunks, replay=replay)
    assert found.keys() == expected.keys()
    distances = {}
    for name, value in expected.items():
        value, other = value.detach(), found[name].detach()
        if name == "loss":
            value = torch.cat([_losses(window, value, chunks, i, context) for i in range(chunks)], dim=1)
        elif name == "gate sum" or (name.startswith("d ") and "memory " not in name.split("memory_")[0]):
            dist.all_reduce(other, group=context.group)
        elif name.endswith(ON_FIRST_RANK):
            if context.rank:
                continue
        else:  # what all ranks carry is the same to the last bit
            first = other.clone()
            dist.broadcast(first, 0, group=context.group)
            assert torch.equal(first, other), f"{name} is not the same on all ranks"
        size = value.norm().item()
        distances[name] = (other - value).norm().item() / size if size else other.norm().item()
    return distances


def _losses(window: Window, losses: Tensor, chunks: int, chunk: int, context: ContextGroup) -> Tensor:
    """A rank's part of the losses of a window and its probes."""
    segments, probes = window.reset.shape[1], window.asked.shape[1]
    place = chunk * context.size + context.rank
    of_segments, of_probes = losses.split((segments, probes), dim=1)
    parts = [x.unflatten(1, (chunks * context.size, -1))[:, place] for x in (of_segments, of_probes) if x.shape[1]]
    return torch.cat(parts, dim=1)


@contextlib.contextmanager
def by_pairs():
    """Scan as a device does that works on many blocks at once."""

    def scan(initial, blocks, reset, part=None):
        return scan_pairs(initial, compose_neighbours(block_pairs(blocks)), reset, part)

    with mock.patch.object(deltanet, "scan_blocks", scan), mock.patch.object(normalized, "scan_blocks", scan):
        yield
