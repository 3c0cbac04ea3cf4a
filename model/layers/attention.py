"""Infini-attention (arXiv 2404.07143) on Megatron-core's tensor-parallel linear layers, over the segments of a window.

The same attention token by token is in `model.layers.incremental`, what is measured of it in `model.layers.statistics`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.backend import local_linears, parallel_linears
from model.config import ModelConfig, layer_shape
from model.layers.heads import join_heads, split_heads
from model.layers.local_context import segment_attention, sliding_attention
from model.layers.mixing import mix
from model.layers.norm import RMSNorm, rms_norm
from model.layers.packing import Packing
from model.layers.rotary import RotaryTables
from model.layers.statistics import MemoryStatistics, measure
from model.layers.token_linears import TokenLinears
from model.megatron import TransformerConfig
from model.precision import wide_dtype, widened
from model.rules import Tokens, build_rule, empty_state
from model.rules.borders import own_borders
from model.rules.context import ContextGroup
from model.rules.parameters import PREFIX, add_rule_parameters, rule_inputs, rule_weights
from model.rules.state import State, join_state, split_state
from model.rules.window import remember, write_gate


class AttentionResult(NamedTuple):
    hidden: Tensor
    memory: State | None
    gate_sum: Tensor | None
    """Sum of the write gate over tokens and this rank's key/value heads, with gradient; None without a write gate."""
    statistics: MemoryStatistics | None


class InfiniAttention(nn.Module):
    """Local causal attention (see `model.local_context`), mixed with a read of the compressive memory.

    The rotary encoding touches the local part only; queries and keys reach the memory without position, but after the
    norms that some models put on them. Query head i reads the memory of its own key/value head. All state is an
    argument and a result.
    """

    def __init__(
        self,
        config: ModelConfig,
        megatron: TransformerConfig,
        tables: RotaryTables,
        *,
        tensor_size: int,
        detach_reads: bool = False,
        context: ContextGroup | None = None,
    ) -> None:
        super().__init__()
        self.shape = layer_shape(config, tensor_size)
        self.heads, self.groups, self.dim = self.shape.heads, self.shape.groups, self.shape.dim
        self.config = config
        self.segment_length = config.segment_length
        self.tables = tables
        self.memory_config = config.memory
        self.detach_reads = detach_reads
        self.context = context
        self.rule = build_rule(config.memory)
        self.split, self.mix = split_heads, mix  # or what the compiler makes of them
        backend, local = parallel_linears(config.backend), local_linears()
        common = {"config": megatron, "init_method": megatron.init_method, "skip_bias_add": False, "is_expert": False}
        wide = widened(megatron)
        gates = {**common, "config": wide}
        heads, groups = megatron.num_attention_heads, megatron.num_query_groups
        # One block of rows per key/value head: its query heads, its key, its value. A plain split is a split by head.
        self.qkv = backend.column_parallel_linear()(
            config.hidden_size, (heads + 2 * groups) * self.dim, bias=config.qkv_bias, gather_output=False, **common
        )
        if config.qk_norm:
            norm = {"dtype": wide.params_dtype, "partial_gradient": tensor_size > 1}
            self.query_norm = RMSNorm(self.dim, config.norm_epsilon, **norm)
            self.key_norm = RMSNorm(self.dim, config.norm_epsilon, **norm)
        self.qk_norm = config.qk_norm
        self.projection = backend.row_parallel_linear()(
            heads * self.dim,
            config.hidden_size,
            bias=False,
            input_is_parallel=True,
            **common,
        )
        if self.rule is not None:
            if config.memory.mix_gate == "token":
                self.mix_gate = local.column_parallel_linear()(
                    config.hidden_size, heads, bias=True, gather_output=False, **gates
                )
            else:
                values = torch.full((self.heads,), config.memory.beta_init, dtype=wide.params_dtype)
                self.beta = nn.Parameter(values)
            add_rule_parameters(self, self.rule, layer_shape(config), wide, tensor_size=tensor_size)
        if config.memory.write_gate != "none":
            self.write_gate = local.column_parallel_linear()(
                config.hidden_size, groups, bias=True, gather_output=False, **gates
            )
        rows = {"write_gate": groups} if config.memory.write_gate != "none" else {}
        if self.rule is not None:
            rows |= {"mix_gate": heads} if config.memory.mix_gate == "token" else {}
            inputs = self.rule.token_inputs(layer_shape(config))
            rows |= {PREFIX + name: groups * numbers for name, numbers in inputs.items()}
        self.token_linears = TokenLinears(config.hidden_size, rows, wide)

    @property
    def memory_dtype(self) -> torch.dtype:
        """float32, and float64 when the parameters are: never lower."""
        return wide_dtype(self.projection.weight.dtype)

    def empty_state(self, lanes: int, device: torch.device, dtype: torch.dtype | None = None) -> State | None:
        """What `lanes` lanes carry that have read nothing, for this rank's key/value heads; None where a layer carries
        nothing.

        Args:
            dtype: of keys and values; None for the memory's.
        """
        context_dtype = self.memory_dtype if dtype is None else dtype
        return empty_state(
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
        packing: Packing | None = None,
    ) -> AttentionResult:
        """Attend over the segments of a window.

        Args:
            hidden: normalised hidden states `[s, b*(t+p), h]` (`[s/tp, ...]` with sequence parallelism): of every lane
                its t segments and then its p probes.
            memory: memory carried in, for b lanes.
            reset: bool `[b, t]`, True where a document starts; where C ranks share a chunk that of the whole chunk,
                `[b, C t]`, on every rank.
            probes: int64 `[b, p]`, or None where p is 0: the segment whose starting memory each probe reads. Probes
                are not written to the memory.
            memory_off: write the memory, but give the local attention all of the output (a control in evaluation).
            statistics: also measure what the memory does.
            packing: where documents share segments; `reset` is not looked at then.
        """
        asked = 0 if probes is None else probes.shape[1]
        if packing is None:
            part, borders = own_borders(self.context, reset, probes=asked)
        else:
            part, borders = packing.part, packing.borders
        mask = None if packing is None else packing.mask
        b, t = borders.reset.shape
        segments = t + asked
        qkv = self.project_in(hidden)
        memory, context = split_state(memory)
        table = self.tables.own(hidden.device, self.memory_dtype)
        heads = self.split(qkv, table, self.rule is not None)
        if context is None:
            local = segment_attention(heads.query, heads.key, heads.value, mask)
        else:
            before = self.tables.before(hidden.device, self.memory_dtype)
            local, context = sliding_attention(
                heads,
                qkv[:, :, :, -2],
                before,
                context,
                borders.reset,
                probes,
                detach=self.detach_reads,
                part=part,
                mask=mask,
            )
        if self.rule is None:
            return AttentionResult(self.project_out(join_heads(local, b * segments)), context, None, None)

        numbers = self.token_numbers(hidden)
        gate = self.token_gate(numbers, b, segments)
        inputs = rule_inputs(self.rule, self.shape, numbers, b, segments)
        share = self.memory_share(numbers, b, segments)
        q, k, v = (x.unflatten(0, (b, segments)) for x in heads[3:])
        if probes is not None:  # which are not written
            gate, k, v = (None if x is None else x[:, :t] for x in (gate, k, v))
            inputs = {name: x[:, :t] for name, x in inputs.items()}
        read, present, memory = remember(
            self.rule,
            Tokens(q, k, v, gate, inputs, bfloat16=qkv.dtype == torch.bfloat16, part=part),
            rule_weights(self),
            memory,
            borders,
            probes=probes,
            detach_reads=self.detach_reads,
        )
        read = read.unflatten(2, (self.groups, -1))
        shown = self.shown_share(share, present, memory_off=memory_off)
        mixed = self.mix(shown, read, local)
        measured = measure(share, shown, read, local, gate, memory, borders.blind) if statistics else None
        gate_sum = None if gate is None else gate.sum()
        return AttentionResult(self.project_out(mixed), join_state(memory, context), gate_sum, measured)

    def project_in(self, hidden: Tensor) -> Tensor:
        """Of hidden states `[s, b, h]` the heads `[s, b, n, r + 2, d]` without positions: of every key/value head its
        query heads, its key, its value."""
        qkv, _ = self.qkv(hidden)
        qkv = qkv.view(*qkv.shape[:2], self.groups, self.shape.ratio + 2, self.dim)
        if not self.qk_norm:
            return qkv
        normed, value = qkv.split((self.shape.ratio + 1, 1), dim=3)
        weight = [self.query_norm.weight.expand(self.shape.ratio, -1), self.key_norm.weight.unsqueeze(0)]
        return torch.cat([rms_norm(normed, torch.cat(weight), self.query_norm.epsilon), value], dim=3)

    def token_numbers(self, hidden: Tensor) -> dict[str, Tensor]:
        """What gates and rule want to know of every token, by the name of the layer that gives it: `[s, b, n]`, of
        the mix gate `[s, b, n*r]`, of a rule `[s, b, n * its numbers]`, in the memory's precision, from hidden states
        `[s, b, h]`."""
        return self.token_linears(hidden, dict(self.named_children()), self.memory_dtype)

    def memory_share(self, numbers: Mapping[str, Tensor], b: int, segments: int) -> Tensor:
        """The memory's share of the output where it holds something, which broadcasts to `[b, segments, n, r, s, 1]`,
        in its precision, from `token_numbers`."""
        if self.memory_config.mix_gate == "token":
            logit = (
                numbers["mix_gate"]
                .permute(1, 2, 0)
                .unflatten(1, (self.groups, -1))
                .unflatten(0, (b, segments))
                .unsqueeze(-1)
            )
        else:
            logit = self.beta.to(self.memory_dtype).view(1, 1, self.groups, -1, 1, 1)
        share = torch.sigmoid(logit)
        floor = self.memory_config.gate_floor
        return floor + (1 - floor) * share if floor else share

    def shown_share(self, share: Tensor, present: Tensor, *, memory_off: bool = False) -> Tensor:
        """What of the `memory_share` is left where the memory may be empty.

        Args:
            present: `[b, t, n, s]`, or 1 for s: 0 where the memory is empty for the token.
        """
        if memory_off:
            return torch.zeros_like(share)
        return share * present[..., None, :, None] if self.memory_config.skip_empty else share

    def project_out(self, attended: Tensor) -> Tensor:
        """The attention of all heads `[s, b*(t+p), n*r*d]` to hidden states `[s, b*(t+p), h]`."""
        output, _ = self.projection(attended)
        return output

    def token_gate(self, numbers: Mapping[str, Tensor], b: int, segments: int) -> Tensor | None:
        """The write gate `[b, segments, n, s]` in the memory's precision, from `token_numbers`; None when every token
        is written."""
        if self.memory_config.write_gate == "none":
            return None
        return write_gate(
            self.memory_config.write_gate, numbers["write_gate"].permute(1, 2, 0).unflatten(0, (b, segments))
        )
