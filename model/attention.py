"""Infini-attention (arXiv 2404.07143) on Megatron-core's tensor-parallel linear layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from model.config import ModelConfig
from model.memory import State, build_rule, remember, write_gate
from model.rotary import rotary_table, rotate

GATE_BINS = 20
"""Bins of the write-gate histogram over [0, 1]."""


class MemoryStatistics(NamedTuple):
    """What one layer's memory does in one window, for this rank's heads; detached, float32."""

    mix_gate: Tensor
    """sigmoid(beta), `[query heads]`."""
    memory_share: Tensor
    """Size of the memory's part of the output relative to both parts, `[query heads]`, in 0..1."""
    write_gate: Tensor
    """Mean write gate, `[key/value heads]`; ones without a write gate."""
    write_gate_histogram: Tensor
    """Tokens per bin of the write gate, `[key/value heads, GATE_BINS]`."""
    memory_norm: Tensor
    """Frobenius norm of M carried out, mean over lanes, `[key/value heads]`."""
    normaliser_norm: Tensor
    """Norm of z carried out, mean over lanes, `[key/value heads]`; zeros for rules without z."""


class AttentionResult(NamedTuple):
    hidden: Tensor
    memory: State | None
    gate_sum: Tensor
    """Sum of the write gate over tokens and this rank's key/value heads (0 without a write gate), with gradient."""
    statistics: MemoryStatistics | None


class InfiniAttention(nn.Module):
    """Local causal attention inside the segment, mixed with a read of the compressive memory.

    The rotary encoding touches the local part only; queries and keys reach the memory without position. Query head i
    reads the memory of its own key/value head. All state is an argument and a result.
    """

    def __init__(
        self, config: ModelConfig, megatron: TransformerConfig, *, tensor_size: int, detach_reads: bool = False
    ) -> None:
        super().__init__()
        self.heads = megatron.num_attention_heads // tensor_size
        self.groups = megatron.num_query_groups // tensor_size
        self.dim = megatron.kv_channels
        self.segment_length = config.segment_length
        self.rope_base = config.rope_base
        self.memory_config = config.memory
        self.detach_reads = detach_reads
        self.rule = build_rule(config.memory.rule, config.memory.epsilon)
        backend = LocalSpecProvider()
        common = {"config": megatron, "init_method": megatron.init_method}
        heads, groups = megatron.num_attention_heads, megatron.num_query_groups
        # One block of rows per key/value head: its query heads, its key, its value. A plain split is a split by head.
        self.qkv = backend.column_parallel_linear()(
            config.hidden_size, (heads + 2 * groups) * self.dim, bias=False, gather_output=False, **common
        )
        self.projection = backend.row_parallel_linear()(
            heads * self.dim,
            config.hidden_size,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            **common,
        )
        if self.rule is not None:
            self.beta = nn.Parameter(torch.full((self.heads,), config.memory.beta_init, dtype=megatron.params_dtype))
        if config.memory.write_gate != "none":
            self.write_gate = backend.column_parallel_linear()(
                config.hidden_size, groups, bias=True, gather_output=False, **common
            )

    @property
    def memory_dtype(self) -> torch.dtype:
        """float32, and float64 when the parameters are: never lower."""
        return torch.float64 if self.projection.weight.dtype == torch.float64 else torch.float32

    def initial_memory(self, lanes: int, device: torch.device) -> State | None:
        """An empty memory for `lanes` lanes and this rank's key/value heads; None without a memory."""
        if self.rule is None:
            return None
        return self.rule.init(lanes, self.groups, self.dim, dtype=self.memory_dtype, device=device)

    def forward(
        self,
        hidden: Tensor,
        memory: State | None,
        reset: Tensor,
        *,
        memory_off: bool = False,
        statistics: bool = False,
    ) -> AttentionResult:
        """Attend over the segments of a window.

        Args:
            hidden: normalised hidden states `[s, b*t, h]` (`[s/tp, b*t, h]` with sequence parallelism).
            memory: memory carried in, for b lanes.
            reset: bool `[b, t]`, True where a document starts.
            memory_off: write the memory, but give the local attention all of the output (a control in evaluation).
            statistics: also measure what the memory does.
        """
        b, t = reset.shape
        qkv, _ = self.qkv(hidden)
        s = qkv.shape[0]
        ratio = self.heads // self.groups
        qkv = qkv.view(s, b * t, self.groups, ratio + 2, self.dim).permute(1, 2, 3, 0, 4)  # [b*t, n, r+2, s, d]
        query = qkv[:, :, :ratio].flatten(1, 2)  # [b*t, n*r, s, d]
        key, value = qkv[:, :, ratio], qkv[:, :, ratio + 1]

        table = rotary_table(s, self.dim, self.rope_base, device=hidden.device, dtype=self.memory_dtype)
        local = F.scaled_dot_product_attention(
            rotate(query, table), rotate(key, table), value, is_causal=True, enable_gqa=ratio > 1
        )
        if self.rule is None:
            return AttentionResult(self._project(local), None, hidden.new_zeros((), dtype=torch.float32), None)

        with torch.autocast(hidden.device.type, enabled=False):
            gate = self._write_gate(hidden, b, t)
            query, key, value = (x.to(self.memory_dtype).unflatten(0, (b, t)) for x in (query, key, value))
            read, present, memory = remember(
                self.rule, query, key, value, gate, memory, reset, detach_reads=self.detach_reads
            )
            share = torch.sigmoid(self.beta.to(self.memory_dtype)).view(1, 1, -1, 1, 1)
            if memory_off:
                share = torch.zeros_like(share)
            if self.memory_config.skip_empty:
                share = share * present.repeat_interleave(ratio, dim=2)[..., None, None]
            local = local.to(self.memory_dtype).unflatten(0, (b, t))
            mixed = share * read + (1 - share) * local
            measured = self._statistics(share * read, (1 - share) * local, gate, memory) if statistics else None
        gate_sum = hidden.new_zeros((), dtype=torch.float32) if gate is None else gate.sum()
        return AttentionResult(self._project(mixed.flatten(0, 1).to(qkv.dtype)), memory, gate_sum, measured)

    def _project(self, attended: Tensor) -> Tensor:
        """`[b*t, heads, s, d]` to hidden states `[s, b*t, h]`."""
        output, _ = self.projection(attended.permute(2, 0, 1, 3).flatten(2))
        return output

    def _write_gate(self, hidden: Tensor, b: int, t: int) -> Tensor | None:
        """The write gate `[b, t, n, s]` in the memory's precision; None when every token is written."""
        if self.memory_config.write_gate == "none":
            return None
        activation, _ = self.write_gate(hidden.to(self.memory_dtype))  # [s, b*t, n]
        return write_gate(self.memory_config.write_gate, activation.permute(1, 2, 0).unflatten(0, (b, t)))

    @torch.no_grad()
    def _statistics(self, read: Tensor, local: Tensor, gate: Tensor | None, memory: State) -> MemoryStatistics:
        read_size = read.norm(dim=-1).mean(dim=(0, 1, 3))
        local_size = local.norm(dim=-1).mean(dim=(0, 1, 3))
        if gate is None:
            gate = read.new_ones(1, 1, self.groups, 1)
        per_head = gate.transpose(0, 2).flatten(1)
        histogram = torch.stack([torch.histc(row.float(), GATE_BINS, 0.0, 1.0) for row in per_head])
        z = getattr(memory, "z", None)
        return MemoryStatistics(
            mix_gate=torch.sigmoid(self.beta.float()),
            memory_share=(read_size / (read_size + local_size).clamp_min(1e-30)).float(),
            write_gate=per_head.mean(dim=1).float(),
            write_gate_histogram=histogram,
            memory_norm=memory.M.flatten(2).norm(dim=-1).mean(dim=0).float(),
            normaliser_norm=read.new_zeros(self.groups).float() if z is None else z.norm(dim=-1).mean(dim=0).float(),
        )
