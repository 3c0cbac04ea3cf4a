"""Infini-attention (arXiv 2404.07143) on Megatron-core's tensor-parallel linear layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers.effective_rank import effective_rank
from model.layers.local_context import initial_state, put_before, sliding_attention
from model.layers.norm import RMSNorm
from model.layers.rotary import rotary_table, rotate
from model.layers.segment_cache import SegmentCache, Span, empty_cache, put
from model.rules import Tokens, build_rule, layer_shape
from model.rules.parameters import add_rule_parameters, rule_inputs, rule_weights
from model.rules.state import State, join_state, map_state, split_state
from model.rules.window import remember, write_gate

GATE_BINS = 20
"""Bins of the write-gate histogram over [0, 1]."""


class MemoryStatistics(NamedTuple):
    """What one layer's memory does in one window, for this rank's heads; detached, float32."""

    mix_gate: Tensor
    """The memory's share of the output where it holds something, `[query heads]`: the floor and sigmoid(beta), or the
    mean over tokens."""
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
    effective_rank: Tensor
    """exp of the entropy of M's singular values (divided by their sum), mean over lanes, `[key/value heads]`; 0 where M
    is empty, d at most."""
    read_variation: Tensor
    """How much the memory's part differs between the tokens of a segment: the root mean square of its deviation from
    the segment's mean, relative to its own, `[query heads]`, in 0..1; 0 where nothing is read."""


class AttentionResult(NamedTuple):
    hidden: Tensor
    memory: State | None
    gate_sum: Tensor
    """Sum of the write gate over tokens and this rank's key/value heads (0 without a write gate), with gradient."""
    statistics: MemoryStatistics | None


class InfiniAttention(nn.Module):
    """Local causal attention (see `model.local_context`), mixed with a read of the compressive memory.

    The rotary encoding touches the local part only; queries and keys reach the memory without position, but after the
    norms that some models put on them. Query head i reads the memory of its own key/value head. All state is an
    argument and a result.
    """

    def __init__(
        self, config: ModelConfig, megatron: TransformerConfig, *, tensor_size: int, detach_reads: bool = False
    ) -> None:
        super().__init__()
        self.shape = layer_shape(config, tensor_size)
        self.heads, self.groups, self.dim = self.shape.heads, self.shape.groups, self.shape.dim
        self.config = config
        self.segment_length = config.segment_length
        self.rope_base, self.rope_scaling = config.rope_base, config.rope_scaling
        self.memory_config = config.memory
        self.detach_reads = detach_reads
        self.rule = build_rule(config.memory)
        backend = LocalSpecProvider()
        common = {"config": megatron, "init_method": megatron.init_method}
        heads, groups = megatron.num_attention_heads, megatron.num_query_groups
        # One block of rows per key/value head: its query heads, its key, its value. A plain split is a split by head.
        self.qkv = backend.column_parallel_linear()(
            config.hidden_size, (heads + 2 * groups) * self.dim, bias=config.qkv_bias, gather_output=False, **common
        )
        if config.qk_norm:
            norm = {"dtype": megatron.params_dtype, "partial_gradient": tensor_size > 1}
            self.query_norm = RMSNorm(self.dim, config.norm_epsilon, **norm)
            self.key_norm = RMSNorm(self.dim, config.norm_epsilon, **norm)
        self.qk_norm = config.qk_norm
        self.projection = backend.row_parallel_linear()(
            heads * self.dim,
            config.hidden_size,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            **common,
        )
        if self.rule is not None:
            if config.memory.mix_gate == "token":
                self.mix_gate = backend.column_parallel_linear()(
                    config.hidden_size, heads, bias=True, gather_output=False, **common
                )
            else:
                values = torch.full((self.heads,), config.memory.beta_init, dtype=megatron.params_dtype)
                self.beta = nn.Parameter(values)
            add_rule_parameters(self, self.rule, layer_shape(config), megatron, tensor_size=tensor_size)
        if config.memory.write_gate != "none":
            self.write_gate = backend.column_parallel_linear()(
                config.hidden_size, groups, bias=True, gather_output=False, **common
            )

    @property
    def memory_dtype(self) -> torch.dtype:
        """float32, and float64 when the parameters are: never lower."""
        return torch.float64 if self.projection.weight.dtype == torch.float64 else torch.float32

    def initial_memory(self, lanes: int, device: torch.device, dtype: torch.dtype | None = None) -> State | None:
        """What `lanes` lanes carry that have read nothing, for this rank's key/value heads; None where a layer carries
        nothing.

        Args:
            dtype: of keys and values; None for the parameters'.
        """
        context_dtype = self.memory_dtype if dtype is None else dtype
        return initial_state(
            self.config, self.shape, lanes, dtype=self.memory_dtype, context_dtype=context_dtype, device=device
        )

    def forward(
        self,
        hidden: Tensor,
        memory: State | None,
        reset: Tensor,
        *,
        probes: Tensor | None = None,
        memory_off: bool = False,
        statistics: bool = False,
    ) -> AttentionResult:
        """Attend over the segments of a window.

        Args:
            hidden: normalised hidden states `[s, b*(t+p), h]` (`[s/tp, ...]` with sequence parallelism): of every lane
                its t segments and then its p probes.
            memory: memory carried in, for b lanes.
            reset: bool `[b, t]`, True where a document starts.
            probes: int64 `[b, p]`, or None where p is 0: the segment whose starting memory each probe reads. Probes
                are not written to the memory.
            memory_off: write the memory, but give the local attention all of the output (a control in evaluation).
            statistics: also measure what the memory does.
        """
        b, t = reset.shape
        segments = t if probes is None else t + probes.shape[1]
        query, key, value = self._heads(hidden)
        memory, context = split_state(memory)
        table = self._rotary_table(torch.arange(query.shape[2], device=hidden.device))
        if context is None:
            local = F.scaled_dot_product_attention(
                rotate(query, table), rotate(key, table), value, is_causal=True, enable_gqa=self.heads > self.groups
            )
        else:
            tables = (self._previous_table(hidden.device), table)
            local, context = sliding_attention(
                query, key, value, tables, context, reset, probes, detach=self.detach_reads
            )
        if self.rule is None:
            return AttentionResult(self._project(local), context, hidden.new_zeros((), dtype=torch.float32), None)

        with torch.autocast(hidden.device.type, enabled=False):
            gate = self._write_gate(hidden, b, segments)
            inputs = rule_inputs(self, self.rule, hidden, b, segments, self.memory_dtype)
            q, k, v = (x.unflatten(0, (b, segments)) for x in (query, key, value))
            gate, k, v = (None if x is None else x[:, :t] for x in (gate, k, v))  # probes are not written
            tokens = self._tokens(q, k, v, gate, {name: x[:, :t] for name, x in inputs.items()})
            read, present, memory = remember(
                self.rule,
                tokens,
                rule_weights(self),
                memory,
                reset,
                probes=probes,
                detach_reads=self.detach_reads,
            )
            local = local.to(self.memory_dtype).unflatten(0, (b, segments))
            share = self._memory_share(hidden, b, segments)
            from_memory, from_segment = self._mix(share, read, local, present, memory_off=memory_off)
            mixed = from_memory + from_segment
            measured = self._statistics(share, from_memory, from_segment, gate, memory) if statistics else None
        gate_sum = hidden.new_zeros((), dtype=torch.float32) if gate is None else gate.sum()
        mixed = self._project(mixed.flatten(0, 1).to(query.dtype))
        return AttentionResult(mixed, join_state(memory, context), gate_sum, measured)

    def empty_cache(self, lanes: int, device: torch.device, dtype: torch.dtype) -> SegmentCache:
        """A current segment without tokens, see `extend`."""
        return empty_cache(
            lanes,
            self.shape,
            self.segment_length,
            inputs=0 if self.rule is None else len(self.rule.token_inputs),
            dtype=dtype,
            gate_dtype=self.memory_dtype,
            device=device,
        )

    def extend(self, hidden: Tensor, memory: State | None, cache: SegmentCache, span: Span) -> Tensor:
        """Attend from new tokens of the current segment to the memory before it and to the segment so far.

        The same numbers as `forward` gives for these positions of the whole segment.

        Args:
            hidden: normalised hidden states of the new tokens, `[c, b, h]`.
            memory: as it was when the segment began.
            cache: the segment so far; the new tokens are written into it, in place.
            span: where the new tokens stand.

        Returns:
            Hidden states `[c, b, h]`; where a lane does not use a column they mean nothing.
        """
        c, b = hidden.shape[:2]
        query, key, value = self._heads(hidden)  # [b, n, c, d]
        positions = span.positions(c)
        table = self._rotary_table(positions.unsqueeze(1))
        inputs = cache.inputs.new_empty(b, self.groups, c, 0)
        with torch.autocast(hidden.device.type, enabled=False):
            gate = self._write_gate(hidden, b, 1)
            if self.rule is not None and self.rule.token_inputs:
                found = rule_inputs(self, self.rule, hidden, b, 1, self.memory_dtype)
                inputs = torch.stack([x.squeeze(1) for x in found.values()], dim=-1)
        gate = cache.gate.new_ones(b, self.groups, c) if gate is None else gate.squeeze(1)
        put(cache, SegmentCache(query, key, rotate(key, table), value, gate, inputs), span)
        mask = (torch.arange(span.stop, device=hidden.device) <= positions.unsqueeze(-1)).unsqueeze(1)
        keys, values = cache.rotated[:, :, : span.stop], cache.value[:, :, : span.stop]
        memory, context = split_state(memory)
        if context is not None:
            keys, values, mask = put_before(keys, values, mask, self._previous_table(hidden.device), context)
        local = F.scaled_dot_product_attention(
            rotate(query, table), keys, values, attn_mask=mask, enable_gqa=self.heads > self.groups
        )
        if self.rule is None:
            return self._project(local)
        with torch.autocast(hidden.device.type, enabled=False):
            so_far = cache.query.to(self.memory_dtype).unflatten(1, (self.groups, -1))
            memory = self.rule.inside(memory, so_far, span.start)
            before = map_state(memory, lambda x: x.unsqueeze(1))
            q = query.to(self.memory_dtype).unflatten(1, (self.groups, -1)).unsqueeze(1)
            read = self.rule.read(q, rule_weights(self), before).flatten(2, 3)
            local = local.to(self.memory_dtype).unsqueeze(1)
            mixed = sum(self._mix(self._memory_share(hidden, b, 1), read, local, self.rule.present(before)))
        return self._project(mixed.squeeze(1).to(query.dtype))

    def commit(self, memory: State | None, cache: SegmentCache, lanes: Tensor) -> State | None:
        """Write the full segment of some lanes to the memory.

        Args:
            memory: as it was when the segment began, all lanes.
            cache: full in `lanes`.
            lanes: int64, the lanes that have filled their segment.

        Returns:
            The memory after the segment; the other lanes are as before.
        """
        memory, context = split_state(memory)
        if context is not None:
            last = (cache.key[lanes], cache.value[lanes], torch.ones_like(context.local_seen[lanes]))
            context = map_state(context, lambda old, new: old.index_copy(0, lanes, new.to(old.dtype)), last)
        if self.rule is None:
            return context
        with torch.autocast(lanes.device.type, enabled=False):
            q, k, v, gate, inputs = (
                x[lanes].unsqueeze(1) for x in (cache.query, cache.key, cache.value, cache.gate, cache.inputs)
            )
            gate = None if self.memory_config.write_gate == "none" else gate
            tokens = self._tokens(q, k, v, gate, dict(zip(self.rule.token_inputs, inputs.unbind(-1), strict=True)))
            carried = map_state(memory, lambda x: x[lanes])
            keep = torch.ones(len(lanes), 1, dtype=torch.bool, device=lanes.device)
            states = self.rule.scan(tokens, rule_weights(self), carried, keep)
        memory = map_state(memory, lambda x, after: x.index_copy(0, lanes, after[:, -1]), states)
        return join_state(memory, context)

    def _tokens(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, inputs: dict[str, Tensor]) -> Tokens:
        """What the memory gets, in its own precision, of q `[b, t, n*r, s, d]`, k and v `[b, t, n, s, d]`."""
        wide = (x.to(self.memory_dtype) for x in (q.unflatten(2, (self.groups, -1)), k, v))
        return Tokens(*wide, gate, inputs, bfloat16=q.dtype == torch.bfloat16)

    def _heads(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[b, n*r, s, d]`, keys and values `[b, n, s, d]` of hidden states `[s, b, h]`, without positions."""
        qkv, _ = self.qkv(hidden)
        s, b = qkv.shape[:2]
        ratio = self.heads // self.groups
        qkv = qkv.view(s, b, self.groups, ratio + 2, self.dim).permute(1, 2, 3, 0, 4)  # [b, n, r+2, s, d]
        query, key, value = qkv[:, :, :ratio].flatten(1, 2), qkv[:, :, ratio], qkv[:, :, ratio + 1]
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value

    def _previous_table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """For the positions of the previous segment, before those of the own one."""
        return self._rotary_table(torch.arange(-self.segment_length, 0, device=device))

    def _rotary_table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_table(positions, self.dim, self.rope_base, scaling=self.rope_scaling, dtype=self.memory_dtype)

    def _memory_share(self, hidden: Tensor, b: int, segments: int) -> Tensor:
        """The memory's share of the output, which broadcasts to `[b, segments, n*r, s, 1]`, in its precision."""
        if self.memory_config.mix_gate == "token":
            logit, _ = self.mix_gate(hidden.to(self.memory_dtype))  # [s, b*t, n*r]
            logit = logit.permute(1, 2, 0).unflatten(0, (b, segments)).unsqueeze(-1)
        else:
            logit = self.beta.to(self.memory_dtype).view(1, 1, -1, 1, 1)
        floor = self.memory_config.gate_floor
        return floor + (1 - floor) * torch.sigmoid(logit)

    def _mix(
        self, share: Tensor, read: Tensor, local: Tensor, present: Tensor, *, memory_off: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The memory's and the segment's part of the output, `[b, t, n*r, s, d]` each.

        Args:
            share: see `_memory_share`.
            read, local: what both attentions give, in the memory's precision.
            present: `[b, t, n]`, 0 where the memory is empty.
        """
        if memory_off:
            share = torch.zeros_like(share)
        if self.memory_config.skip_empty:
            share = share * present.repeat_interleave(self.heads // self.groups, dim=2)[..., None, None]
        return share * read, (1 - share) * local

    def _project(self, attended: Tensor) -> Tensor:
        """`[b*(t+p), heads, s, d]` to hidden states `[s, b*(t+p), h]`."""
        output, _ = self.projection(attended.permute(2, 0, 1, 3).flatten(2))
        return output

    def _write_gate(self, hidden: Tensor, b: int, segments: int) -> Tensor | None:
        """The write gate `[b, segments, n, s]` in the memory's precision; None when every token is written."""
        if self.memory_config.write_gate == "none":
            return None
        activation, _ = self.write_gate(hidden.to(self.memory_dtype))  # [s, b*t, n]
        return write_gate(self.memory_config.write_gate, activation.permute(1, 2, 0).unflatten(0, (b, segments)))

    @torch.no_grad()
    def _statistics(
        self, share: Tensor, read: Tensor, local: Tensor, gate: Tensor | None, memory: State
    ) -> MemoryStatistics:
        read_size = read.norm(dim=-1).mean(dim=(0, 1, 3))
        local_size = local.norm(dim=-1).mean(dim=(0, 1, 3))
        if gate is None:
            gate = read.new_ones(1, 1, self.groups, 1)
        per_head = gate.transpose(0, 2).flatten(1)
        histogram = torch.stack([torch.histc(row.float(), GATE_BINS, 0.0, 1.0) for row in per_head])
        z = getattr(memory, "z", None)
        return MemoryStatistics(
            mix_gate=share.mean(dim=(0, 1, 3, 4)).float(),
            memory_share=(read_size / (read_size + local_size).clamp_min(1e-30)).float(),
            write_gate=per_head.mean(dim=1).float(),
            write_gate_histogram=histogram,
            memory_norm=memory.M.flatten(2).norm(dim=-1).mean(dim=0).float(),
            normaliser_norm=read.new_zeros(self.groups).float() if z is None else z.norm(dim=-1).mean(dim=0).float(),
            effective_rank=effective_rank(memory.M).mean(dim=0).float(),
            read_variation=_variation(read).float(),
        )


def _variation(read: Tensor) -> Tensor:
    """`MemoryStatistics.read_variation` of `[b, t, heads, s, d]`."""
    spread = (read - read.mean(dim=3, keepdim=True)).square().sum(dim=(0, 1, 3, 4))
    return (spread / read.square().sum(dim=(0, 1, 3, 4)).clamp_min(torch.finfo(read.dtype).tiny)).sqrt()
