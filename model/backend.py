"""Whose parallel linear layers the model is made of (`model.backend`): the one place that knows.

| backend | layers | where |
| --- | --- | --- |
| `local` | Megatron's own `ColumnParallelLinear` and `RowParallelLinear` | anywhere |
| `te` | NVIDIA Transformer Engine's, through Megatron's wrappers | CUDA |
| `onednn` | Megatron's own, whose float32 products oneDNN makes | CPU |

`te` and `onednn` carry the four large matrices of a layer: q, k, v, the attention's output, and the two of the MLP.
What stays Megatron's own, whatever the backend: the output matrix, which may be the embedding (`model.layers.loss`;
its products in training are `matrix_product`), and gates and a rule's token inputs, a few float32 rows that no backend
has anything to offer for (`local_linears`).

The parameters are `weight` and `bias` with all, so checkpoints do not know the backend. Transformer Engine's modules
also have an `_extra_state` (scales of fp8, which is not used here): it is in their `state_dict`, which nothing here
reads; checkpoints are made of named parameters.

`onednn`: PyTorch has float32 products made by MKL on x86, and oneDNN, which it brings as well, is faster on processors
that MKL was not made for: 175 to 235 against 95 to 105 GFLOP/s on a core of an AMD EPYC with AVX-512, at a layer's
shapes. MKL_ENABLE_INSTRUCTIONS=AVX512 changes nothing there.

Not verified: no test has run with Transformer Engine, which needs CUDA to be imported at all. Written against
megatron-core 0.16.1 and, by reading it, Transformer Engine 2.20.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from model.megatron import (
    BackendSpecProvider,
    ColumnParallelLinear,
    LocalSpecProvider,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]'"


def parallel_linears(backend: str) -> BackendSpecProvider:
    """The provider of the layers' large matrices, for one of `model.config.BACKENDS`.

    Raises:
        ValueError: `te` is asked for and not installed, or cannot be imported.
    """
    if backend == "local":
        return local_linears()
    if backend == "onednn":
        return OneDnnProvider()
    if importlib.util.find_spec("transformer_engine") is None:
        raise ValueError(
            f"model.backend = te: Transformer Engine is not installed: {INSTALL} (needs CUDA), or model.backend=local"
        )
    from megatron.core.extensions import transformer_engine

    if not transformer_engine.HAVE_TE:  # Megatron has tried, and keeps the reason to itself
        raise ValueError(
            "model.backend = te: Transformer Engine is installed, but cannot be imported; "
            "`python -c 'import transformer_engine.pytorch.fp8'` says why. Or model.backend=local"
        )
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def local_linears() -> BackendSpecProvider:
    """Megatron's own, for what no backend takes over."""
    return LocalSpecProvider()


def matrix_product(backend: str) -> Callable[..., Tensor]:
    """What makes the product of two matrices, called as `torch.mm`."""
    return onednn_mm if backend == "onednn" else torch.mm


def check_backend(backend: str, precision: str, device: str) -> None:
    """Refuse a backend that has nothing to offer to a run.

    Args:
        backend: one of `model.config.BACKENDS`.
        precision: one of `model.precision.COMPUTE_DTYPES`.
        device: type of the device, such as `cuda`.

    Raises:
        ValueError: `onednn` is asked for and cannot be had, or would change nothing.
    """
    if backend != "onednn":
        return
    obstacle = None
    if device != "cpu":
        obstacle = f"its products are a CPU's, this process computes on {device}"
    elif precision != "fp32":
        obstacle = f"its products are those of train.precision=fp32, and this run's is {precision}"
    elif not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        obstacle = "this PyTorch was built without oneDNN"
    if obstacle is not None:
        raise ValueError(f"model.backend = onednn: {obstacle}; or model.backend=local")


def backend_in_words(backend: str) -> str:
    """Whose layers they are, for people."""
    return {
        "local": "Megatron's own",
        "te": "Transformer Engine's",
        "onednn": "Megatron's own, their products oneDNN's",
    }[backend]


class _OneDnnProducts:
    """In front of one of Megatron's layers: its product is `onednn_linear`."""

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: ProcessGroup | None,
        **_,
    ) -> Tensor:
        """Megatron's function of this name, without its fused and deferred gradients, which are not in use here."""
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        output = onednn_linear(input, weight)
        return output if bias is None else output + bias


class OneDnnColumnParallelLinear(_OneDnnProducts, ColumnParallelLinear):
    pass


class OneDnnRowParallelLinear(_OneDnnProducts, RowParallelLinear):
    pass


class OneDnnProvider(LocalSpecProvider):
    """Megatron's own layers, whose products oneDNN makes."""

    def column_parallel_linear(self) -> type:
        return OneDnnColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return OneDnnRowParallelLinear


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x W^T` of float32 x `[..., k]` and W `[n, k]` on a CPU, `[..., n]`; so is its backward pass."""
    return _OneDnnLinear.apply(x, weight)


def onednn_mm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`torch.mm` of float32 matrices on a CPU."""
    product = _product(a, b.t())
    return product if out is None else out.copy_(product)


class _OneDnnLinear(Function):
    """Y = X W^T. Backward: dX = dY W, dW = dY^T X."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = _product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = _product(gradient.flatten(0, -2).t(), x.flatten(0, -2).t())
        return of_x, of_weight


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """`x W^T` by oneDNN, which takes any strides."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
