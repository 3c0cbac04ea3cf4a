"""What has which precision: matrices and residual stream that of the run, everything that adds up float32."""

from __future__ import annotations

from dataclasses import replace

import torch

from model.megatron import TransformerConfig

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
"""By `train.precision`: of the matrices (projections, MLP, embedding, output), their biases and the residual stream."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 at least: what norms, gates, a rule's own parameters and the memory have beside matrices of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def widened(megatron: TransformerConfig) -> TransformerConfig:
    """The same for layers whose parameters are gates: a step of beta's learning rate is below a bfloat16 step at -3."""
    dtype = wide_dtype(megatron.params_dtype)
    return megatron if dtype == megatron.params_dtype else replace(megatron, params_dtype=dtype)
