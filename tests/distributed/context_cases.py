"""What the ranks run in test_context_scan.py: a stage whose segments they share, against the same stage alone.

One rank computes the whole window by itself first, in one graph; every rank returns how far it is from that.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import types
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from model.rules import deltanet, gdn2, normalized
from model.rules.borders import Borders, own_borders
from model.rules.context import ContextGroup
from model.rules.kernel import Kernel, scan_by_fla
from model.rules.scan import Blocks, block_pairs, compose_neighbours, scan_blocks, scan_pairs, scan_sums
from model.rules.state import map_memory, memory_tensors
from tests.distributed.grid import join
from tests.model.build import random_memory, random_tokens, small_config, small_stage
from tests.model.rules.test_kernel import documented

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


def starts_of(reset: Tensor, length: int) -> Tensor:
    """Documents that start inside segments too, `[b, t, length]`: in every lane another number, and some parts have
    none."""
    generator = torch.Generator().manual_seed(3)
    share = torch.tensor([0.02, 0.1, 0.02, 0.3]).view(-1, 1, 1)
    starts = torch.rand(*reset.shape, length, generator=generator) < share
    starts[..., 0] = reset
    return starts


class Window:
    """A window's inputs, what its outputs are weighed with, and a memory carried in; the same on every rank."""

    def __init__(self, stage, reset: Tensor, probes: int, *, packed: bool = False) -> None:
        lanes, segments = reset.shape
        self.reset, length = reset, stage.config.segment_length
        self.starts = starts_of(reset, length) if packed else None
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
        self.of_memory = map_memory(self.memory, lambda x: random(*x.shape).to(x.dtype))

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
                reset, starts = (
                    None if x is None else x.chunk(chunks, dim=1)[chunk] for x in (self.reset, self.starts)
                )
                output = stage(given[0], leaves, reset, given[1], probes=asked, starts=starts)
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
        cases: `model` (of `small_config`), and optional `probes`, `chunks`, `replay`, `options` (of the stage), `form`
            (one of `FORMS`), `packed` (documents start inside segments).
    """
    join(tensor=1, pipeline=1, timeout_s=60)
    context = ContextGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    # The windows of one process, which take longer than the shared ones, are shared out.
    turns = [[_alone(**case) if i % context.size == context.rank else None] for i, case in enumerate(cases)]
    for i, turn in enumerate(turns):
        dist.broadcast_object_list(turn, i % context.size, group=context.group)
    return [_compare(context, expected, **case) for (expected,), case in zip(turns, cases, strict=True)]


def _alone(
    model: dict[str, Any],
    probes: int = 0,
    options: dict[str, Any] | None = None,
    packed: bool = False,
    **_: object,
) -> dict[str, Tensor]:
    """What one process computes, in one graph."""
    stage = small_stage(small_config(**model), **options or {})
    window = Window(stage, resets(), probes, packed=packed)
    return {name: value.detach() for name, value in window.run(stage, None).items()}


def _compare(
    context: ContextGroup,
    expected: dict[str, Tensor],
    model: dict[str, Any],
    probes: int = 0,
    chunks: int = 1,
    replay: bool = False,
    options: dict[str, Any] | None = None,
    form: str = "in turn",
    packed: bool = False,
) -> dict[str, float]:
    stage = small_stage(small_config(**model), context=context, **options or {})
    window = Window(stage, resets(), probes, packed=packed)
    with FORMS[form]():
        found = window.run(stage, context, chunks=chunks, replay=replay)
    assert found.keys() == expected.keys()
    distances = {}
    for name, value in expected.items():
        value, other = value.double(), found[name].detach().double()
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

    def scan(initial, blocks, borders, part=None):
        return scan_pairs(initial, compose_neighbours(block_pairs(blocks)), borders, part)

    with contextlib.ExitStack() as patches:
        for rule in (deltanet, gdn2, normalized):
            patches.enter_context(mock.patch.object(rule, "scan_blocks", scan))
        yield


@contextlib.contextmanager
def by_kernel():
    """Write the delta rules as with flash-linear-attention, whose function is computed token by token."""
    module = types.ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = documented
    modules = {"fla": types.ModuleType("fla"), "fla.ops": types.ModuleType("fla.ops"), module.__name__: module}
    scan = functools.partial(scan_by_fla, products=torch.float64)
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(deltanet, "choose_kernel", lambda *_, **__: Kernel("fla", "for the test")),
        mock.patch.object(deltanet, "scan_by_fla", scan),
    ):
        yield


FORMS = {"in turn": contextlib.nullcontext, "pairs": by_pairs, "kernel": by_kernel}
"""How a window is written: block after block as on a CPU, or by one of the forms for a GPU."""


def scans(packed: bool) -> dict[str, float]:
    """Of the scans themselves, with random gradients everywhere, the largest relative distance from one process."""
    join(tensor=1, pipeline=1, timeout_s=60)
    context = ContextGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    reset = resets()
    starts = starts_of(reset, 4) if packed else None
    (_, whole), (part, borders) = (own_borders(c, reset, starts) for c in (None, context))
    (b, t), n, d, m, c = borders.reset.shape, 2, 3, 2, 4
    own = slice(context.rank * t, (context.rank + 1) * t)
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def blocks(gate: bool, decays: int) -> list[Tensor | None]:
        shape = (b, SEGMENTS, n, m, c)
        found = [random(*shape, d), random(*shape) if gate else None, random(*shape, d + 1 + d) / 3]
        return [*found, random(*shape[:-1], decays) if decays else None]

    def by_blocks(initial: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        *given, borders, part = given
        return scan_blocks(initial, Blocks(*given), borders, part)

    matrix, vector = random(b, n, d, d + 1), random(b, n, d)
    kinds = {
        "pairs": (scan_pairs, [matrix, random(b, SEGMENTS, n, d, d + 1 + d)]),
        "sums": (scan_sums, [vector, random(b, SEGMENTS, n, d)]),
        "sums of matrices": (scan_sums, [matrix, random(b, SEGMENTS, n, d, d + 1)]),
    }
    for gate, decays in itertools.product((False, True), (0, 1, d)):
        kinds[f"blocks {gate} {decays}"] = (by_blocks, [matrix, *blocks(gate, decays)])
    distances = {}
    for name, (scan, (initial, *written)) in kinds.items():
        weights, of_end = random(b, SEGMENTS, *initial.shape[1:]), random(*initial.shape)
        of_one = _scanned(scan, [initial, *written], whole, None, weights, of_end)
        shared = [initial, *(None if x is None else x[:, own] for x in written)]
        of_ranks = _scanned(scan, shared, borders, part, weights[:, own], of_end)
        for i, (found, expected) in enumerate(zip(of_ranks, of_one, strict=True)):
            expected = expected[:, own] if expected.shape[1] == SEGMENTS else expected  # or of a state: n is not 8
            distances[f"{name} {i}"] = ((found - expected).norm() / expected.norm()).item()
    return distances


def _scanned(scan, inputs: list[Tensor | None], borders: Borders, part, weights: Tensor, of_end: Tensor):
    """States, the one carried out, and the gradients of all inputs."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    before, after = scan(*leaves, borders, part)
    given = [x for x in leaves if x is not None]
    return [before, after, *torch.autograd.grad([before, after], given, [weights, of_end])]


def overflow(blocks: bool, packed: bool) -> None:
    """What has overflowed before a document starts reaches no rank whose part is behind it, in either direction.

    Lane 0 is cleared where the second rank's part starts, lane 1 inside of it, before its second segment or, `packed`,
    by a cut of its first one; the first rank's writes are infinite, as is what lane 2 carries in, which is cleared at
    once.
    """
    join(tensor=1, pipeline=1, timeout_s=60)
    context = ContextGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    t, d, m, c = 2, 3, 2, 2
    reset = torch.zeros(3, t * context.size, dtype=torch.bool)
    reset[0, t] = reset[2, 0] = True
    reset[1, t + 1] = not packed
    starts = torch.stack([reset, torch.zeros_like(reset)], dim=-1)
    starts[1, t, 1] = True
    part, own = own_borders(context, reset, starts if packed else None)
    generator = torch.Generator().manual_seed(context.rank)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    initial = torch.zeros(3, 1, d, d, dtype=torch.float64)
    initial[2] = torch.inf
    left, right, pairs = random(3, t, 1, m, c, d), random(3, t, 1, m, c, 2 * d), random(3, t, 1, d, 2 * d)
    if context.rank == 0:
        right[:2, ..., :d] = pairs[:2, ..., :d] = torch.inf
    leaves = [x.requires_grad_() for x in ((initial, left, right) if blocks else (initial, pairs))]
    if blocks:
        before, after = scan_blocks(initial, Blocks(left, None, right, None), own, part)
    else:
        before, after = scan_pairs(initial, pairs, own, part)
    assert after.isfinite().all() and before[2].isfinite().all()
    behind = before[:2, 1:] if context.rank == 1 else before[:2]
    assert behind.isfinite().all() or context.rank == 0
    # What lies behind the resets, and nothing else, has a loss.
    loss = after.sum() + (behind.sum() if context.rank else 0) + before[2].sum()
    of_initial, *others = torch.autograd.grad(loss, leaves)
    assert of_initial.eq(0).all()
    if context.rank:
        assert all(x[0].isfinite().all() and x[2].isfinite().all() for x in others)
    else:
        assert others[-1][:2, ..., :d].eq(0).all()
