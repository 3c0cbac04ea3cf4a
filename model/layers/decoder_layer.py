"""A layer of the decoder, and what it and the stage around it are built with."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.backend import parallel_linears
from model.config import ModelConfig, layer_shape
from model.layers import incremental
from model.layers.attention import InfiniAttention
from model.layers.mlp import GatedMLP
from model.layers.norm import RMSNorm
from model.layers.packing import Packing
from model.layers.rotary import RotaryTables
from model.layers.segment_cache import SegmentCache, Span
from model.layers.statistics import MemoryStatistics, once
from model.megatron import TransformerConfig
from model.precision import COMPUTE_DTYPES, wide_dtype
from model.rules.context import ContextGroup
from model.rules.state import State


class StageOptions(NamedTuple):
    """What the run, not the model, decides about a stage."""

    precision: str = "fp32"
    """`fp32`, `fp64`, or `bf16`: matrices and residual stream are bfloat16, all else float32."""
    recompute: str = "none"
    """`selective` recomputes attention in the backward pass, `layer` whole layers."""
    detach_reads: bool = False
    """Read the memory without gradient."""
    sequence_parallel: bool = False
    recompute_logits: bool = False
    """Make the logits again in the backward pass, a block at a time, instead of keeping them."""


def megatron_config(config: ModelConfig, options: StageOptions, *, tensor_size: int) -> TransformerConfig:
    """Megatron's view of the model; `params_dtype` is that of the matrices."""
    dtype = COMPUTE_DTYPES[options.precision]
    shape = layer_shape(config)
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=shape.groups,
        kv_channels=shape.dim,
        ffn_hidden_size=config.ffn_hidden_size,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_epsilon,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=config.init_std,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=tensor_size,
        sequence_parallel=options.sequence_parallel,
        # Values come from `DecoderStage.initialize`; parameters are made on the current default device.
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )


class DecoderLayer(nn.Module):
    """Pre-norm attention and gated MLP. `layer(hidden, memory, reset) -> (hidden, memory, ...)`: no hidden state."""

    def __init__(
        self,
        config: ModelConfig,
        megatron: TransformerConfig,
        options: StageOptions,
        tables: RotaryTables,
        *,
        tensor_size: int,
        context: ContextGroup | None = None,
    ) -> None:
        super().__init__()
        norm = {"dtype": wide_dtype(megatron.params_dtype), "partial_gradient": options.sequence_parallel}
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon, **norm)
        self.attention = InfiniAttention(
            config, megatron, tables, tensor_size=tensor_size, detach_reads=options.detach_reads, context=context
        )
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_epsilon, **norm)
        self.mlp = GatedMLP(megatron, parallel_linears(config.backend))
        self.recompute = options.recompute

    def forward(
        self,
        hidden: Tensor,
        memory: State | None,
        reset: Tensor,
        memory_off: bool,
        statistics: bool,
        probes: Tensor | None = None,
        feed_forward: bool = True,
        packing: Packing | None = None,
    ) -> tuple[Tensor, State | None, Tensor | None, MemoryStatistics | None]:
        def attend(hidden: Tensor, *memory_tensors: Tensor):
            state = None if memory is None else type(memory)(*memory_tensors)
            return self.attention(
                self.attention_norm(hidden),
                state,
                reset,
                probes=probes,
                memory_off=memory_off,
                statistics=statistics,
                packing=packing,
            )

        if self.recompute == "selective" and torch.is_grad_enabled():
            # Nothing in it draws random numbers.
            attended = checkpoint(
                attend, hidden, *(memory or ()), use_reentrant=False, preserve_rng_state=False, context_fn=once
            )
        else:
            attended = attend(hidden, *(memory or ()))
        hidden = hidden + attended.hidden
        if feed_forward:
            hidden = self._feed_forward(hidden)
        return hidden, attended.memory, attended.gate_sum, attended.statistics

    def extend(self, hidden: Tensor, memory: State | None, cache: SegmentCache, span: Span) -> Tensor:
        """The layer for new tokens of the current segment, see `model.layers.incremental`."""
        attended = incremental.extend(self.attention, self.attention_norm(hidden), memory, cache, span)
        return self._feed_forward(hidden + attended)

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mlp(self.mlp_norm(hidden))
