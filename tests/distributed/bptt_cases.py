"""What the ranks run in test_bptt.py: one float64 window through the executor, without optimizer or data."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from data.lanes.window import ProbeBatch, WindowBatch, WindowPart
from model.config import layer_shape
from model.layers import loss
from model.sharding import partition_of
from pipeline.config.load import load_config
from pipeline.parallel.memory_statistics import gather_statistics
from pipeline.parallel.setup import build_stage
from pipeline.parallel.topology import Topology
from pipeline.schedule.executor import Executor
from pipeline.schedule.operations import build_schedule, expected_peak_live_chunks
from tests.distributed.grid import join

VOCAB = 40
WINDOW = [
    "model.num_layers=4",
    "model.hidden_size=16",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.ffn_hidden_size=12",
    "model.vocab_size_multiple=4",
    "model.segment_length=4",
    "model.init_std=0.4",  # far from linear: every path carries a gradient that would be missed
    "model.memory.write_gate_bias=0.5",
    "model.memory.beta_init=-0.5",
    "train.precision=fp64",
    "train.lanes=4",
    "train.segments_per_window=8",
]
GATE_SCALE = 0.01


def load(overrides: list[str]):
    return load_config(None, [*WINDOW, *overrides])


def random_batch(config, first_lane: int, last_lane: int) -> WindowBatch:
    """The same global batch on every layout: documents start mid-window, tokens weigh between 0 and 3."""
    lanes, segments, length = config.train.lanes, config.train.segments_per_window, config.model.segment_length
    generator = torch.Generator().manual_seed(11)
    shape = (lanes, segments, length)
    tokens, labels = (torch.randint(0, VOCAB, shape, generator=generator) for _ in range(2))
    weight = torch.randint(0, 4, shape, generator=generator).float()
    reset = torch.zeros(lanes, segments, dtype=torch.bool)
    reset[0, 3] = reset[1, 0] = reset[2, 1] = reset[2, 6] = True  # lane 3 goes on from carried memory
    starts = None
    if config.data.packing:
        starts = torch.zeros(shape, dtype=torch.bool)
        starts[:, :, 0] = reset
        # In the first and the last segment, twice in one, at a last token, behind a reset.
        for place in ((0, 5, 2), (1, 0, 3), (1, 7, 1), (2, 1, 1), (2, 1, 2), (2, 4, 3), (3, 0, 2), (3, 7, 3)):
            starts[place] = True
    own = slice(first_lane, last_lane)
    count = config.train.probes_per_window
    probes = None
    if count:
        asked = (lanes, count, length)
        stride = segments // count
        inside = torch.randint(0, stride, (lanes, count), generator=generator)
        probes = ProbeBatch(
            tokens=torch.randint(0, VOCAB, asked, generator=generator)[own],
            labels=torch.randint(0, VOCAB, asked, generator=generator)[own],
            loss_weight=torch.randint(0, 4, asked, generator=generator).float()[own],
            segment=(stride * torch.arange(count) + inside)[own],
        )
    return WindowBatch(
        tokens=tokens[own],
        labels=labels[own],
        loss_weight=weight[own],
        answer_mask=torch.zeros(shape, dtype=torch.bool)[own],
        reset=reset[own],
        starts=None if starts is None else starts[own],
        position_in_document=torch.zeros(lanes, segments, dtype=torch.int64)[own],
        lane_ids=torch.arange(first_lane, last_lane),
        padded_tokens=0,
        documents=[[] for _ in range(first_lane, last_lane)],
        probes=probes,
    )


def cut(batch: WindowBatch, part: WindowPart) -> WindowBatch:
    """What one of several processes that share a window has of it."""
    segments, probes = batch.tokens.shape[1], batch.probes
    own = [segment for span in part.spans(segments) for segment in span]
    batch = dataclasses.replace(
        batch, **{name: getattr(batch, name)[:, own] for name in ("tokens", "labels", "loss_weight")}
    )
    if probes is None or part.size == 1:
        return batch
    asked = [probe for span in part.spans(probes.segment.shape[1]) for probe in span]
    place = torch.full((segments,), -1)
    place[own] = torch.arange(len(own))
    probes = ProbeBatch(
        *(getattr(probes, name)[:, asked] for name in ("tokens", "labels", "loss_weight")),
        segment=place[probes.segment[:, asked]],
    )
    assert probes.segment.min() >= 0
    return dataclasses.replace(batch, probes=probes)


def carried_memory(config, stage, first_lane: int, last_lane: int) -> list:
    """A memory that was written to before: drawn per layer for all lanes and heads, then cut to this rank's."""
    result = []
    whole_heads = layer_shape(config.model).groups
    for layer, empty in zip(stage.layers, stage.empty_memory(last_lane - first_lane, torch.device("cpu")), strict=True):
        if empty is None:
            result.append(None)
            continue
        generator = torch.Generator().manual_seed(100 + int(layer))
        fields = []
        for x in empty:
            drawn = torch.randn(config.train.lanes, whole_heads, *x.shape[2:], generator=generator, dtype=x.dtype)
            heads = slice(stage.tensor_rank * x.shape[1], (stage.tensor_rank + 1) * x.shape[1])
            fields.append(drawn[first_lane:last_lane, heads].contiguous())
        state = type(empty)(*fields)
        if "z" in state._fields:
            state = state._replace(z=3 + state.z.abs())
        if "local_seen" in state._fields:  # of every other lane, with packing a part of it
            seen = 1 - torch.arange(first_lane, last_lane) % 2
            seen = seen * (0.5 if config.data.packing else 1)
            state = state._replace(local_seen=seen.to(state.M.dtype).view(-1, 1, 1).expand_as(state.local_seen))
        result.append(state)
    return result


def prepare(overrides: list[str]) -> tuple[Any, Topology, Any, WindowBatch, list]:
    config = load(overrides)
    parallel = config.parallel
    topology = join(tensor=parallel.tensor, pipeline=parallel.pipeline, context=parallel.context, timeout_s=60)
    stage = build_stage(config, topology, VOCAB)
    for name, parameter in stage.global_parameters():
        if name.endswith("_up"):  # begins at 0, where what stands before it has no gradient
            with torch.no_grad():
                parameter.copy_(torch.linspace(-0.2, 0.3, parameter.shape[1]).expand_as(parameter))
    lanes = topology.lanes(config.train.lanes)
    return config, topology, stage, random_batch(config, *lanes), carried_memory(config, stage, *lanes)


def collect(stage, topology: Topology, loss: Tensor | None, memory: list) -> dict[str, Any]:
    """What the test puts together from all ranks."""
    return {
        "place": (topology.data_rank, topology.context_rank, topology.pipeline_rank, topology.tensor_rank),
        "loss": loss,
        "gradients": {
            name: (p.grad, partition_of(p), getattr(p, "partial_gradient", False))
            for name, p in stage.global_parameters()
        },
        "memory": {
            (int(layer), name): x
            for layer, state in zip(stage.layers, memory, strict=True)
            for name, x in ({} if state is None else state._asdict()).items()
        },
    }


def one_graph(overrides: list[str]) -> dict[str, Any]:
    """The whole window, all lanes, in one autograd graph on one process: the reference."""
    _, topology, stage, batch, memory = prepare(overrides)
    segments, probes = batch.tokens.shape[1], batch.probes
    if probes is None:
        output = stage(batch.tokens, memory, batch.reset, batch.labels, starts=batch.starts)
    else:
        tokens, labels = (
            torch.cat([getattr(batch, name), getattr(probes, name)], dim=1) for name in ("tokens", "labels")
        )
        output = stage(tokens, memory, batch.reset, labels, probes=probes.segment, starts=batch.starts)
    objective = (output.token_loss[:, :segments] * batch.loss_weight).sum() / 100 + GATE_SCALE * output.gate_sum
    if probes is not None:
        objective = objective + (output.token_loss[:, segments:] * probes.loss_weight).sum() / 100
    objective.backward()
    memory = [None if s is None else type(s)(*(x.detach() for x in s)) for s in output.memory]
    return collect(stage, topology, output.token_loss[:, :segments].detach(), memory)


def by_small_blocks(**arguments: Any) -> list[dict[str, Any]]:
    """`by_schedule` with logits of so few rows at once that a chunk has many blocks, and a last one that is shorter."""
    with mock.patch.object(loss, "BLOCK_ROWS", 7), mock.patch.object(loss, "WIDE_ELEMENTS", 50):
        return by_schedule(**arguments)


def by_schedule(overrides: list[str], chunk_counts: list[int]) -> list[dict[str, Any]]:
    """The same through schedule and executor, once per number of chunks."""
    config, topology, stage, batch, memory = prepare(overrides)
    lanes = config.train.lanes // topology.data_size
    per_microbatch = config.train.lanes_per_microbatch or (lanes if topology.pipeline_size == 1 else 1)
    replay = config.bptt.recompute == "window"
    results = []
    for chunks in chunk_counts:
        stage.zero_grad(set_to_none=True)
        shape = {"stages": topology.pipeline_size, "stage": topology.pipeline_rank}
        shape |= {"microbatches": lanes // per_microbatch, "chunks": chunks, "replay": replay}
        part = WindowPart(chunks, topology.context_rank, topology.context_size)
        done = Executor(stage, topology, chunks=chunks, carry_gradient=config.bptt.gradient == "full").run(
            build_schedule(**shape),
            cut(batch, part),
            memory,
            lanes_per_microbatch=per_microbatch,
            loss_scale=1 / 100,
            gate_scale=GATE_SCALE,
        )
        assert done.peak_live_chunks == expected_peak_live_chunks(**shape)
        losses = done.token_loss
        if losses is not None:  # in their places in the window, which the parts' sum then has
            losses = torch.zeros(batch.tokens.shape, dtype=losses.dtype)
            losses[:, [segment for span in part.spans(losses.shape[1]) for segment in span]] = done.token_loss
        results.append(collect(stage, topology, losses, done.memory))
    return results


def statistics(overrides: list[str]) -> dict[int, dict[str, Tensor]]:
    """What the memories of all layers do in the window, of all heads, by the names of `MemoryStatistics`."""
    config, topology, stage, batch, memory = prepare(overrides)
    chunks = config.bptt.chunks_per_window
    shape = {"stages": topology.pipeline_size, "stage": topology.pipeline_rank, "microbatches": 1, "chunks": chunks}
    done = Executor(stage, topology, chunks=chunks, carry_gradient=True).run(
        build_schedule(**shape, replay=False),
        cut(batch, WindowPart(chunks, topology.context_rank, topology.context_size)),
        memory,
        lanes_per_microbatch=config.train.lanes,
        statistics=True,
    )
    found = gather_statistics(done.statistics, topology, config.model)
    return {layer: measured._asdict() for layer, measured in found.items()}


def input_gradients(overrides: list[str]) -> dict[str, Any]:
    """Two windows in a row; the loss is that of the last segment of the second one.

    Returns:
        Largest gradient at the embedding's output per segment (16 of them), and whether the carried memory has a graph.
    """
    config, topology, stage, batch, memory = prepare(overrides)
    segments, chunks = config.train.segments_per_window, config.bptt.chunks_per_window
    embedded: list[tuple[Tensor, Tensor]] = []

    def watch(module, inputs, output):
        if output.requires_grad:
            output.retain_grad()
            embedded.append((inputs[0], output))

    stage.embedding.register_forward_hook(watch)
    executor = Executor(stage, topology, chunks=chunks, carry_gradient=config.bptt.gradient == "full")
    replay = config.bptt.recompute == "window"
    schedule = build_schedule(stages=1, stage=0, microbatches=1, chunks=chunks, replay=replay)
    carries_graph = False
    for window in range(2):
        # A segment's tokens are all its number, so that gradients can be told apart.
        numbers = window * segments + torch.arange(segments)
        weight = torch.zeros_like(batch.loss_weight)
        weight[:, -1] = float(window == 1)
        tokens = numbers[None, :, None].expand_as(batch.tokens).contiguous()
        fresh = torch.zeros_like(batch.reset)
        this = dataclasses.replace(batch, tokens=tokens, loss_weight=weight, reset=fresh)
        done = executor.run(schedule, this, memory, lanes_per_microbatch=config.train.lanes)
        memory = done.memory
        carries_graph |= any(x.requires_grad for state in memory for x in state)
    largest = [0.0] * (2 * segments)
    for tokens, output in embedded:
        for row, number in enumerate(tokens[:, 0].tolist()):
            largest[number] = max(largest[number], float(output.grad[row].abs().max()))
    return {"largest": largest, "carries_graph": carries_graph}
