"""What is used of Megatron-core, which is imported here and nowhere else: without PyTorch's compiler.

Megatron hands its fused functions to `torch.compile` while it is imported. That alone loads the compiler, a second of
CPU in every process, a run's ranks included. None of these functions is called here (`model.compiling` has what is
compiled of ours), and Megatron's own switch, `megatron.core.jit.disable_jit_fuser`, is in reach only when all have been
handed over. So they are left as they are written, which is what that switch does. `torch.compile` itself is as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

__all__ = [
    "BackendSpecProvider",
    "ColumnParallelLinear",
    "LocalSpecProvider",
    "RowParallelLinear",
    "TransformerConfig",
    "VocabParallelEmbedding",
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "mappings",
    "parallel_state",
    "reduce_from_tensor_model_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
]


_compile = torch.compile


def _compile_but_megatrons(model: Callable | None = None, **options: Any) -> Any:
    """`torch.compile`, as whatever else Megatron imports finds it."""
    return model if (getattr(model, "__module__", None) or "").startswith("megatron.") else _compile(model, **options)


with mock.patch.object(torch, "compile", _compile_but_megatrons):
    from megatron.core import parallel_state
    from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
        mappings,
        reduce_from_tensor_model_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )
    from megatron.core.transformer import TransformerConfig
