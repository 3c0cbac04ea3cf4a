"""One pipeline stage of the decoder: embedding, layers, output, whichever of them the stage owns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.backend import matrix_product
from model.config import ModelConfig, layer_config, layer_shape
from model.layers import incremental
from model.layers.decoder_layer import DecoderLayer, StageOptions, megatron_config
from model.layers.embedding import Embedding
from model.layers.loss import OutputMatrix, hide_padding
from model.layers.norm import RMSNorm
from model.layers.packing import Packing, packing_of
from model.layers.rotary import RotaryTables
from model.layers.segment_cache import SegmentCache, Span
from model.layers.statistics import MemoryStatistics, once
from model.precision import wide_dtype
from model.rules import build_rule
from model.rules.context import ContextGroup
from model.rules.state import Memory, split_state
from model.sharding import (
    RULE_PARAMETERS,
    initial_values,
    mark_partitions,
    normal_values,
    output_projection_std,
    padded_vocab_size,
    partition_of,
    tie_keys_to_queries,
)


class StageOutput(NamedTuple):
    hidden: Tensor | None
    """`[s, b*(t+p), h]` for the next stage; None on the last one."""
    token_loss: Tensor | None
    """Cross entropy `[b, t+p, s]` on the last stage when labels were given."""
    token_correct: Tensor | None
    """Bool `[b, t+p, s]`: greedy decoding would give the label; only when asked for."""
    memory: Memory
    """Memory carried out, per layer of the stage."""
    gate_sum: Tensor
    """Sum of the write gates over the stage's layers, this rank's heads and all tokens."""
    statistics: dict[int, MemoryStatistics]
    """Per global layer index of the layers with a memory, when asked for."""


class DecoderStage(nn.Module):
    """Layers `first_layer` to `last_layer` (exclusive) of the decoder, with embedding and output where they belong."""

    def __init__(
        self,
        config: ModelConfig,
        options: StageOptions,
        *,
        vocab_size: int,
        first_layer: int,
        last_layer: int,
        tensor_rank: int,
        tensor_size: int,
        context: ContextGroup | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.options = options
        self.unpadded_vocab_size = vocab_size
        self.vocab_size = padded_vocab_size(vocab_size, config.vocab_size_multiple)
        self.tensor_rank, self.tensor_size = tensor_rank, tensor_size
        self.is_first = first_layer == 0
        self.is_last = last_layer == config.num_layers
        megatron = megatron_config(config, options, tensor_size=tensor_size)
        self.compute_dtype = megatron.params_dtype
        """Of the matrices, the residual stream and what crosses to other stages."""
        self.block_attention = None
        if config.packed_attention == "flex":
            from model.layers.block_attention import block_attention

            self.block_attention = block_attention  # or what the compiler makes of it
        if self.is_first:
            self.embedding = Embedding(
                self.vocab_size,
                config.hidden_size,
                init_method=megatron.init_method,
                config=megatron,
                reduce_scatter_embeddings=options.sequence_parallel,
            )
        tables = RotaryTables(config.segment_length, layer_shape(config).dim, config.rope_base, config.rope_scaling)
        # Keyed by the layer's index in the whole model, so that parameter names are the same on every layout.
        self.layers = nn.ModuleDict(
            {
                str(i): DecoderLayer(
                    layer_config(config, i), megatron, options, tables, tensor_size=tensor_size, context=context
                )
                for i in range(first_layer, last_layer)
            }
        )
        if self.is_last:
            self.final_norm = RMSNorm(
                config.hidden_size,
                config.norm_epsilon,
                dtype=wide_dtype(megatron.params_dtype),
                partial_gradient=options.sequence_parallel,
            )
            self.output = OutputMatrix(
                config.hidden_size,
                self.vocab_size,
                config=megatron,
                init_method=megatron.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=self.ties_own_embedding,
            )
            self.output.mm = matrix_product(config.backend)
        mark_partitions(self)

    @property
    def ties_own_embedding(self) -> bool:
        """The output matrix is this stage's own embedding."""
        return self.config.tie_embeddings and self.is_first and self.is_last

    @property
    def holds_embedding_copy(self) -> bool:
        """The output matrix is a second copy of the first stage's embedding (tied, several stages)."""
        return self.config.tie_embeddings and self.is_last and not self.is_first

    def global_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under the names they have in the whole model; a tied copy has the embedding's name."""
        for name, parameter in self.named_parameters():
            if self.holds_embedding_copy and name == "output.weight":
                name = "embedding.weight"
            yield name, parameter

    def initialize(self, seed: int) -> None:
        """Give every parameter its initial value, a function of (seed, name) alone."""
        for name, parameter in self.global_parameters():
            value = self.initial_value(name, parameter, tuple(parameter.shape), seed)
            if value is not None:
                with torch.no_grad():
                    parameter.copy_(value)

    def initial_value(self, name: str, parameter: nn.Parameter, shape: tuple[int, ...], seed: int) -> Tensor | None:
        """This rank's part of a parameter's initial value, before it is rounded to the parameter's precision.

        Args:
            name: in the whole model.
            shape: of this rank's part, which ZeRO 3 may have taken apart.

        Returns:
            None for norms and beta, whose value (ones, and `memory.beta_init`) is set at construction.
        """
        config = self.config
        if name.endswith(("norm.weight", "beta")):
            return None
        if name.endswith("qkv.bias"):
            return torch.zeros(shape)
        if ".write_gate." in name or ".mix_gate." in name:
            # Weight zero: a gate starts at its bias for every token (+2: exactly the rule without a write gate).
            bias = config.memory.write_gate_bias if ".write_gate." in name else config.memory.beta_init
            return torch.full(shape, bias if name.endswith("bias") else 0.0, dtype=torch.float64)
        tied = config.qk_init == "tied"
        if RULE_PARAMETERS in name:
            own = build_rule(config.memory).parameters(layer_shape(config))[name.split(RULE_PARAMETERS)[1]]
            draw = own.tied if tied and own.tied else own.initial
        else:
            std = config.init_std
            if name.endswith(("attention.projection.weight", "mlp.linear_fc2.weight")):
                std = output_projection_std(std, config.num_layers)
            draw = normal_values(shape, partition_of(parameter), std, self.tensor_size)
            if tied and name.endswith("qkv.weight"):
                draw = tie_keys_to_queries(draw, layer_shape(config))
        return initial_values(
            name, parameter, draw, seed=seed, tensor_rank=self.tensor_rank, tensor_size=self.tensor_size
        )

    def empty_memory(self, lanes: int, device: torch.device) -> Memory:
        """An empty memory for every layer of the stage."""
        return [layer.attention.empty_state(lanes, device, self.compute_dtype) for layer in self.layers.values()]

    def forward(
        self,
        inputs: Tensor,
        memory: Memory,
        reset: Tensor,
        labels: Tensor | None = None,
        *,
        probes: Tensor | None = None,
        starts: Tensor | None = None,
        memory_off: bool = False,
        statistics: bool = False,
        correct: bool = False,
    ) -> StageOutput:
        """Run the stage over some segments of a window and p probes (none without `probes`).

        Args:
            inputs: tokens `[b, t+p, s]` on the first stage, else hidden states `[s, b*(t+p), h]` (`s/tp` with sequence
                parallelism) from the stage before. Probes stand behind the segments.
            memory: per layer, what `empty_memory` or an earlier call returned.
            reset: bool `[b, t]`, True where a document starts; where C ranks share a chunk that of the whole chunk,
                `[b, C t]`, on every rank, while all else is of this rank's t segments.
            labels: `[b, t+p, s]`; without them the last stage computes no loss.
            probes: int64 `[b, p]`, the segment whose starting memory each probe reads.
            starts: with packing bool `[b, t, s]`, or `[b, C t, s]`, True at a document's first token; `reset` has its
                first ones.
            memory_off: control for evaluation, see `InfiniAttention.forward`.
            statistics: also measure the memory (`StageOutput.statistics`).
            correct: also say for every label whether greedy decoding would give it.
        """
        hidden = self._embed(inputs) if self.is_first else inputs
        carried, measured = [], {}
        gate_sum = torch.zeros((), device=hidden.device)
        packing = None if starts is None else self._packing(starts, probes, memory)
        # Nobody reads what the last layer gives without labels, only its memory.
        unread = str(self.config.num_layers - 1) if labels is None else None
        for (name, layer), state in zip(self.layers.items(), memory, strict=True):
            arguments = (hidden, state, reset, memory_off, statistics, probes, name != unread, packing)
            if self.options.recompute == "layer" and torch.is_grad_enabled():
                result = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=once)
            else:
                result = layer(*arguments)
            hidden, state, gates, layer_statistics = result
            carried.append(state)
            if gates is not None:
                gate_sum = gate_sum + gates
            if layer_statistics is not None:
                measured[int(name)] = layer_statistics
        if not self.is_last:
            return StageOutput(hidden, None, None, carried, gate_sum, measured)
        loss = hits = None
        if labels is not None:
            loss, hits = self._losses(hidden, labels)
            hits = hits if correct else None
        return StageOutput(None, loss, hits, carried, gate_sum, measured)

    def _packing(self, starts: Tensor, probes: Tensor | None, memory: Memory) -> Packing:
        states = (split_state(state)[1] for state in memory)
        carried = next((context for context in states if context is not None), None)
        shared = next(iter(self.layers.values())).attention.context
        return packing_of(starts, probes, carried, self.compute_dtype, shared, self.block_attention)

    @contextmanager
    def unshared(self) -> Iterator[None]:
        """Inside, this process runs over whole chunks by itself, whoever shares them in training."""
        attentions = [layer.attention for layer in self.layers.values()]
        shared = [attention.context for attention in attentions]
        try:
            for attention in attentions:
                attention.context = None
            yield
        finally:
            for attention, context in zip(attentions, shared, strict=True):
                attention.context = context

    def empty_cache(self, lanes: int, device: torch.device) -> list[SegmentCache]:
        """A current segment without tokens for every layer of the stage, see `extend`."""
        return [
            incremental.empty_cache(layer.attention, lanes, device, self.compute_dtype)
            for layer in self.layers.values()
        ]

    def extend(self, inputs: Tensor, memory: Memory, cache: list[SegmentCache], span: Span) -> Tensor:
        """Run the stage over new tokens of the current segment, without a graph; sequence parallelism must be off.

        Args:
            inputs: tokens `[b, c]` on the first stage, else hidden states `[c, b, h]` from the stage before.
            memory: per layer, as it was when the segment began.
            cache: per layer, from `empty_cache`; the new tokens are written into it, in place.
            span: where the new tokens stand.

        Returns:
            Hidden states `[c, b, h]`, for the next stage or for `next_token_logits`.
        """
        with torch.no_grad():
            hidden = self._embed(inputs.unsqueeze(1)) if self.is_first else inputs
            for layer, state, segment in zip(self.layers.values(), memory, cache, strict=True):
                hidden = layer.extend(hidden, state, segment, span)
            return hidden

    def commit(self, memory: Memory, cache: list[SegmentCache], lanes: Tensor) -> Memory:
        """Write the full segments of `lanes` to the memory of every layer, see `model.layers.incremental`."""
        with torch.no_grad():
            return [
                incremental.commit(layer.attention, state, segment, lanes)
                for layer, state, segment in zip(self.layers.values(), memory, cache, strict=True)
            ]

    def next_token_logits(self, hidden: Tensor) -> Tensor:
        """Logits `[b, vocabulary / tp]` of this rank for the last stage's hidden states `[b, h]` of one token each."""
        with torch.no_grad():
            return self._logits(hidden.unsqueeze(0)).squeeze(0)

    def _embed(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens.flatten(0, 1))
        if not self.options.sequence_parallel:  # Megatron's reduce-scatter has transposed already
            hidden = hidden.transpose(0, 1).contiguous()
        return hidden

    @property
    def _output_weight(self) -> Tensor | None:
        return self.embedding.weight if self.ties_own_embedding else None

    @property
    def _known_columns(self) -> int:
        """Of this rank's logits; at most 0 where all of them are padding."""
        return self.unpadded_vocab_size - self.tensor_rank * (self.vocab_size // self.tensor_size)

    def _losses(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and whether greedy decoding would give the label, both as `labels`, `[b, t+p, s]`."""
        found = self.output(
            self.final_norm(hidden),
            self._output_weight,
            labels=labels.flatten(0, 1).t().contiguous(),
            known=self._known_columns,
            keep_logits=not self.options.recompute_logits,
        )
        loss, hits = (x.t().reshape(labels.shape) for x in found)
        return loss, hits

    def _logits(self, hidden: Tensor) -> Tensor:
        logits, _ = self.output(self.final_norm(hidden), self._output_weight)
        return hide_padding(logits, self._known_columns)


def split_layers(num_layers: int, stages: int, layers_per_stage: list[int] | None) -> list[tuple[int, int]]:
    """First and last layer (exclusive) of every pipeline stage.

    Without an explicit list the layers are split as evenly as possible, and the middle stages take what is left over:
    the first and the last one also hold the embedding and the output.
    """
    if layers_per_stage is None:
        base, extra = divmod(num_layers, stages)
        layers_per_stage = [base] * stages
        order = sorted(range(stages), key=lambda i: (i in (0, stages - 1), i == stages - 1, i))
        for i in order[:extra]:
            layers_per_stage[i] += 1
    bounds = [sum(layers_per_stage[:i]) for i in range(stages + 1)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))
