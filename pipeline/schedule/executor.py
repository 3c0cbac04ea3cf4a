"""Runs a schedule: forward and backward of chunks, and the traffic between stages.

Memory crosses from chunk to chunk as detached leaves. The backward of a chunk receives d(memory) from the leaves of
the chunk after it, and its own leaves' gradient goes to the chunk before it: exact backpropagation through time at the
price of the chunks that are alive.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from data.lanes.loader import WindowBatch
from model.decoder import DecoderStage, StageOutput
from model.layers.statistics import MemoryStatistics
from model.rules.state import Memory, join_lanes, map_memory, memory_tensors, take_lanes
from pipeline.parallel.topology import Topology
from pipeline.schedule.operations import Kind, Operation

MAX_PENDING_SENDS = 2
"""Sends in flight before the oldest is waited for: what a stage keeps of other stages' traffic stays bounded."""


@dataclass
class StepResult:
    """What one step's forward and backward passes leave behind; the gradients are in the parameters."""

    token_loss: Tensor | None
    """Cross entropy `[B, T, S]` of this rank's lanes and segments; on the last stage only."""
    probe_loss: Tensor | None
    """The same of the probes, `[B, P, S]`; None without probes."""
    token_correct: Tensor | None
    memory: Memory
    """Memory carried out, per layer of the stage, all of this rank's lanes."""
    gate_sum: Tensor
    """float64: sum of the write gates over this rank's layers, heads and tokens."""
    statistics: dict[int, MemoryStatistics] = field(default_factory=dict)
    peak_live_chunks: int = 0


@dataclass
class _Chunk:
    """A chunk between its forward and its backward."""

    inputs: Tensor
    memory_in: Memory
    output: StageOutput | None = None


class _Traffic:
    """Point-to-point transfers with the stages next to this one."""

    def __init__(self, topology: Topology, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.topology = topology
        self.shape, self.dtype = shape, dtype
        self.receives: dict[Operation, tuple[dist.Work, Tensor]] = {}
        self.sends: deque[tuple[dist.Work, Tensor]] = deque()

    def post(self, operation: Operation, tag: int) -> None:
        """Post the receive that a WAIT of the same microbatch and chunk will take."""
        forward = operation.kind is Kind.POST_FORWARD
        source = self.topology.previous_rank if forward else self.topology.next_rank
        group = self.topology.forward_group if forward else self.topology.backward_group
        buffer = torch.empty(self.shape, dtype=self.dtype, device=self.topology.device)
        wait = operation._replace(kind=Kind.WAIT_FORWARD if forward else Kind.WAIT_BACKWARD)
        self.receives[wait] = (dist.irecv(buffer, source, group=group, tag=tag), buffer)

    def wait(self, operation: Operation) -> Tensor:
        """The tensor of a posted receive."""
        work, buffer = self.receives.pop(operation)
        work.wait()
        return buffer

    def send(self, operation: Operation, tensor: Tensor, tag: int) -> None:
        """Send without waiting; sends that have arrived are let go."""
        forward = operation.kind is Kind.SEND_FORWARD
        target = self.topology.next_rank if forward else self.topology.previous_rank
        group = self.topology.forward_group if forward else self.topology.backward_group
        tensor = tensor.detach().contiguous()
        self.sends.append((dist.isend(tensor, target, group=group, tag=tag), tensor))
        while len(self.sends) > MAX_PENDING_SENDS:
            self._finish_oldest()

    def drain(self) -> None:
        """Wait for everything that is still on its way."""
        while self.sends:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        work, _ = self.sends.popleft()
        work.wait()


class Executor:
    """Runs schedules for one stage.

    Args:
        stage: the stage's layers.
        topology: the process grid.
        chunks: chunks per window.
        carry_gradient: hand d(memory) from chunk to chunk (false truncates at every chunk).
    """

    def __init__(self, stage: DecoderStage, topology: Topology, *, chunks: int, carry_gradient: bool) -> None:
        self.stage = stage
        self.topology = topology
        self.chunks = chunks
        self.carry_gradient = carry_gradient

    def run(
        self,
        operations: list[Operation],
        batch: WindowBatch,
        memory: Memory,
        *,
        lanes_per_microbatch: int,
        loss_scale: float = 1.0,
        gate_scale: float = 0.0,
        statistics: bool = False,
        correct: bool = False,
        memory_off: bool = False,
        losses: bool = True,
        observer=None,
    ) -> StepResult:
        """Run one step.

        Args:
            operations: from `pipeline.schedule.operations`; without backwards it is an evaluation and no graph is kept.
            batch: this rank's lanes and, of each chunk, its segments; every stage gets the same one.
            memory: memory carried in, per layer, all of this rank's lanes.
            lanes_per_microbatch: whose windows are one microbatch of the schedule.
            loss_scale: factor of the weighted sum of token losses in the objective.
            gate_scale: factor of the sum of the write gates in the objective.
            statistics, correct, memory_off: see `DecoderStage.forward`.
            losses: false leaves the output matrix out, when the memory is all that is wanted.
            observer: called as `observer(operation)` before each operation and `observer(None)` at the end.
        """
        run = _Run(self, operations, batch, memory, lanes_per_microbatch, loss_scale, gate_scale)
        run.flags = {"statistics": statistics, "correct": correct, "memory_off": memory_off}
        run.losses_wanted = losses
        for operation in operations:
            if observer:
                observer(operation)
            run.execute(operation)
        run.traffic.drain()
        if observer:
            observer(None)
        return run.result()


class _Run:
    """The state of one step."""

    def __init__(
        self,
        executor: Executor,
        operations: list[Operation],
        batch: WindowBatch,
        memory: Memory,
        lanes: int,
        loss_scale: float,
        gate_scale: float,
    ) -> None:
        self.stage, self.topology = executor.stage, executor.topology
        self.chunks, self.carry_gradient = executor.chunks, executor.carry_gradient
        self.batch, self.lanes = batch, lanes
        self.loss_scale, self.gate_scale = loss_scale, gate_scale
        self.flags: dict[str, bool] = {}
        self.losses_wanted = True
        self.replayed = {o[1:] for o in operations if o.kind is Kind.REPLAY}
        self.with_gradient = any(o.kind is Kind.BACKWARD for o in operations)
        microbatches, segments, length = batch.tokens.shape[0] // lanes, batch.tokens.shape[1], batch.tokens.shape[2]
        self.segments_per_chunk = segments // self.chunks
        self.carried = {m: take_lanes(memory, slice(m * lanes, (m + 1) * lanes)) for m in range(microbatches)}
        rows = length // (self.topology.tensor_size if self.stage.options.sequence_parallel else 1)
        self.probes_per_chunk = batch.probes.segment.shape[1] // self.chunks if batch.probes else 0
        folded = lanes * (self.segments_per_chunk + self.probes_per_chunk)
        shape = (rows, folded, self.stage.config.hidden_size)
        self.traffic = _Traffic(self.topology, shape, self.stage.compute_dtype)
        self.live: dict[tuple[int, int], _Chunk] = {}
        self.received: dict[Operation, Tensor] = {}
        self.memory_gradient: dict[int, list[Tensor | None]] = {}
        self.input_gradient: dict[tuple[int, int], Tensor] = {}
        self.losses: dict[tuple[int, int], Tensor] = {}
        self.probe_losses: dict[tuple[int, int], Tensor] = {}
        self.hits: dict[tuple[int, int], Tensor] = {}
        self.gate_sum = torch.zeros((), dtype=torch.float64, device=self.topology.device)
        self.measured: list[dict[int, MemoryStatistics]] = []
        self.graphs = self.peak_graphs = 0

    def execute(self, operation: Operation) -> None:
        kind, microbatch, chunk = operation
        tag = microbatch * self.chunks + chunk
        if kind in (Kind.POST_FORWARD, Kind.POST_BACKWARD):
            self.traffic.post(operation, tag)
        elif kind in (Kind.WAIT_FORWARD, Kind.WAIT_BACKWARD):
            self.received[operation] = self.traffic.wait(operation)
        elif kind is Kind.FORWARD:
            self._forward(microbatch, chunk)
        elif kind is Kind.REPLAY:
            self._replay(microbatch, chunk)
        elif kind is Kind.BACKWARD:
            self._backward(microbatch, chunk)
        elif kind is Kind.SEND_FORWARD:
            self.traffic.send(operation, self._take_hidden(microbatch, chunk), tag)
        elif kind is Kind.SEND_BACKWARD:
            self.traffic.send(operation, self.input_gradient.pop((microbatch, chunk)), tag)

    def _slice(self, tensor: Tensor, microbatch: int, chunk: int) -> Tensor:
        """The part of a `[B, T, ...]` (or `[B, P, ...]`) batch tensor that a chunk works on."""
        lanes = tensor[microbatch * self.lanes : (microbatch + 1) * self.lanes]
        length = tensor.shape[1] // self.chunks
        return lanes[:, chunk * length : (chunk + 1) * length]

    def _part(self, name: str, microbatch: int, chunk: int) -> Tensor:
        """Tokens, labels or weights of a chunk: its segments, and behind them its probes."""
        part = self._slice(getattr(self.batch, name), microbatch, chunk)
        if self.batch.probes is None:
            return part
        return torch.cat([part, self._slice(getattr(self.batch.probes, name), microbatch, chunk)], dim=1)

    def _probes(self, microbatch: int, chunk: int) -> Tensor | None:
        """`[b, p]`: the segment of the chunk whose starting memory each of its probes reads."""
        if self.batch.probes is None:
            return None
        return self._slice(self.batch.probes.segment, microbatch, chunk) - chunk * self.segments_per_chunk

    def _forward(self, microbatch: int, chunk: int) -> None:
        if self.stage.is_first:
            inputs = self._part("tokens", microbatch, chunk)
        else:
            inputs = self.received.pop(Operation(Kind.WAIT_FORWARD, microbatch, chunk))
        record = _Chunk(inputs, self.carried[microbatch])
        keep_graph = self.with_gradient and (microbatch, chunk) not in self.replayed
        if keep_graph:
            self._make_leaves(record, chunk)
        record.output = self._compute(record, microbatch, chunk, keep_graph, first_time=True)
        # A copy: the last entry of the scan's stacked states would keep all of them alive.
        self.carried[microbatch] = map_memory(record.output.memory, lambda x: x.detach().clone())
        if self.with_gradient or not self.stage.is_last:
            self.live[microbatch, chunk] = record
        if self.stage.is_last and not keep_graph:
            record.output = None

    def _make_leaves(self, record: _Chunk, chunk: int) -> None:
        if not self.stage.is_first:
            record.inputs = record.inputs.detach().requires_grad_()
        if chunk > 0 and self.carry_gradient:
            record.memory_in = map_memory(record.memory_in, lambda x: x.detach().requires_grad_())

    def _compute(self, record: _Chunk, microbatch: int, chunk: int, keep_graph: bool, first_time: bool) -> StageOutput:
        # A forward that will be replayed leaves the output matrix to the replay.
        labels_needed = self.stage.is_last and self.losses_wanted and (keep_graph or not self.with_gradient)
        labels = self._part("labels", microbatch, chunk) if labels_needed else None
        flags = dict(self.flags, statistics=self.flags["statistics"] and first_time)
        with torch.set_grad_enabled(keep_graph):
            output = self.stage(
                record.inputs,
                record.memory_in,
                self._slice(self.batch.reset, microbatch, chunk),
                labels,
                probes=self._probes(microbatch, chunk),
                starts=None if self.batch.starts is None else self._slice(self.batch.starts, microbatch, chunk),
                **flags,
            )
        if keep_graph:
            self.graphs += 1
            self.peak_graphs = max(self.peak_graphs, self.graphs)
        if first_time:
            self.gate_sum += output.gate_sum.detach()
            if output.statistics:
                self.measured.append(output.statistics)
        if output.token_loss is not None:
            losses = output.token_loss.detach()
            self.losses[microbatch, chunk] = losses[:, : self.segments_per_chunk]
            if self.probes_per_chunk:
                self.probe_losses[microbatch, chunk] = losses[:, self.segments_per_chunk :]
        if output.token_correct is not None:
            self.hits[microbatch, chunk] = output.token_correct[:, : self.segments_per_chunk]
        return output

    def _take_hidden(self, microbatch: int, chunk: int) -> Tensor:
        record = self.live[microbatch, chunk]
        hidden = record.output.hidden
        if not self.with_gradient:
            del self.live[microbatch, chunk]
        elif (microbatch, chunk) in self.replayed:
            record.output = None
        return hidden

    def _replay(self, microbatch: int, chunk: int) -> None:
        record = self.live[microbatch, chunk]
        self._make_leaves(record, chunk)
        record.output = self._compute(record, microbatch, chunk, keep_graph=True, first_time=False)

    def _backward(self, microbatch: int, chunk: int) -> None:
        record = self.live.pop((microbatch, chunk))
        self.graphs -= 1
        output = record.output
        tensors: list[Tensor] = []
        gradients: list[Tensor | None] = []

        def add(tensor: Tensor, gradient: Tensor | None) -> None:
            if tensor.requires_grad:
                tensors.append(tensor)
                gradients.append(gradient)

        if self.stage.is_last:
            weight = self._part("loss_weight", microbatch, chunk).to(output.token_loss.dtype)
            add((output.token_loss * weight).sum() * self.loss_scale, None)
        else:
            add(output.hidden, self.received.pop(Operation(Kind.WAIT_BACKWARD, microbatch, chunk)))
        if self.gate_scale:
            add(output.gate_sum * self.gate_scale, None)
        for tensor, gradient in zip(
            memory_tensors(output.memory), self.memory_gradient.pop(microbatch, []), strict=False
        ):
            if gradient is not None:
                add(tensor, gradient)
        torch.autograd.backward(tensors, gradients)
        if chunk > 0 and self.carry_gradient:
            self.memory_gradient[microbatch] = [x.grad for x in memory_tensors(record.memory_in)]
        if not self.stage.is_first:
            self.input_gradient[microbatch, chunk] = record.inputs.grad

    def result(self) -> StepResult:
        microbatches = len(self.carried)
        return StepResult(
            token_loss=self._assemble(self.losses),
            probe_loss=self._assemble(self.probe_losses),
            token_correct=self._assemble(self.hits),
            memory=join_lanes([self.carried[m] for m in range(microbatches)]),
            gate_sum=self.gate_sum,
            statistics=_average_statistics(self.measured),
            peak_live_chunks=self.peak_graphs,
        )

    def _assemble(self, pieces: dict[tuple[int, int], Tensor]) -> Tensor | None:
        """Per-chunk results `[b, t, s]` as one `[B, T, S]`."""
        if not pieces:
            return None
        microbatches = range(len(self.carried))
        return torch.cat([torch.cat([pieces[m, c] for c in range(self.chunks)], dim=1) for m in microbatches])


def _average_statistics(measured: list[dict[int, MemoryStatistics]]) -> dict[int, MemoryStatistics]:
    if not measured:
        return {}
    return {
        layer: MemoryStatistics(*(torch.stack(xs).mean(0) for xs in zip(*(m[layer] for m in measured), strict=True)))
        for layer in measured[0]
    }
