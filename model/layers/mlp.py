"""The gated MLP (SwiGLU, arXiv 2002.05202) on Megatron-core's tensor-parallel linear layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.device import cache_blocks
from model.megatron import BackendSpecProvider, TransformerConfig


class GatedMLP(nn.Module):
    """`fc2(silu(gate) * up)` with `[gate; up] = fc1(x)`.

    Megatron's own MLP does the same, and adds an offset of 0 to one half, keeps three tensors of the MLP's width where
    one will do, and goes back through a copy of both halves.
    """

    def __init__(self, config: TransformerConfig, backend: BackendSpecProvider) -> None:
        super().__init__()
        common = {"config": config, "init_method": config.init_method, "bias": False}
        common |= {"skip_bias_add": False, "is_expert": False}
        # A stride of 2: a tensor-parallel rank holds its part of either half.
        self.linear_fc1 = backend.column_parallel_linear()(
            config.hidden_size, 2 * config.ffn_hidden_size, gather_output=False, stride=2, **common
        )
        self.linear_fc2 = backend.row_parallel_linear()(
            config.ffn_hidden_size, config.hidden_size, input_is_parallel=True, **common
        )
        self.product = silu_product  # or what the compiler makes of it

    def forward(self, hidden: Tensor) -> Tensor:
        both, _ = self.linear_fc1(hidden)
        output, _ = self.linear_fc2(self.product(both))
        return output


def silu_product(both: Tensor) -> Tensor:
    """`silu(first) * second` of the halves of the last dim."""
    return _SiluProduct.apply(both)


def plain_silu_product(both: Tensor) -> Tensor:
    """`silu_product` for the compiler."""
    first, second = both.chunk(2, dim=-1)
    return F.silu(first) * second


class _SiluProduct(torch.autograd.Function):
    """With the halves a and b and the gradient g: d a = g b silu'(a), d b = g silu(a), silu(a) computed again."""

    @staticmethod
    def forward(ctx, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        product = both.new_empty(*both.shape[:-1], both.shape[-1] // 2)
        for out, a, b in cache_blocks(product, *both.chunk(2, dim=-1)):
            torch.mul(F.silu(a), b, out=out)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gradient = torch.empty_like(both)
        halves = *both.chunk(2, dim=-1), *gradient.chunk(2, dim=-1)
        for g, a, b, of_a, of_b in cache_blocks(grad, *halves):
            torch.ops.aten.silu_backward.grad_input(g * b, a, grad_input=of_a)
            torch.mul(g, F.silu(a), out=of_b)
        return gradient
