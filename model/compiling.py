"""`model.compile`: which pieces of a stage PyTorch's compiler makes, and how.

Compiled are functions of many element-wise passes that stand between the matrix products of a layer: the norms of the
residual stream, the MLP's product, and what queries and keys pass on their way to the memory. Each is given to the
compiler in its plain form (`plain_...` beside the function), forward and backward; the form written by hand is the
reference, and what runs without the setting. Whole layers are not compiled: Megatron's linear layers break the graph,
and the scan of a window is products one after another, which no compiler fuses. Gradients of buffers that are written
part by part (heads, convolutions, what a block takes off the memory) came out 4 to 40 times as slow on a CPU.

Only a pass with a graph runs compiled. Evaluation, generation and the first of two passes of `bptt.recompute=window`
have none: their shapes change from call to call, and each would be compiled anew. Tensors keep their shapes in
training, so that a piece is compiled when it is first met, and never again.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn

from model.decoder import DecoderStage
from model.layers import heads, loss
from model.layers.attention import InfiniAttention
from model.layers.mixing import plain_mix
from model.layers.mlp import GatedMLP, plain_silu_product
from model.layers.norm import RMSNorm, plain_rms_norm
from model.rules.convolution import ConvolvedRule
from model.rules.feature_maps import plain_phi_of, plain_unit_length_of

COMPILED = "norms of the residual stream, the MLP's product, the memory's map of queries and keys"
"""In words, for the start of a run."""
ALSO_COMPILED = "the rotation of queries and keys, the mixing with the memory, the softmax of the loss"
WHERE_ALSO = ("cuda",)
"""Types of devices where these are compiled, too."""


def in_words(device: str) -> str:
    """What is compiled on a type of device."""
    return f"{COMPILED}, {ALSO_COMPILED}" if device in WHERE_ALSO else COMPILED


class Piece:
    """A function that runs compiled where there is a graph, and as it is written where there is none.

    Args:
        written: the function.
        plain: the same in operations that the compiler can go back through.
    """

    def __init__(self, written: Callable, plain: FunctionType) -> None:
        self.written, self.compiled = written, compiled(plain)

    def __call__(self, *arguments: Any) -> Any:
        return (self.compiled if torch.is_grad_enabled() else self.written)(*arguments)


class SplitHeads:
    """`split_heads`, whose two passes are compiled where there is a graph. The compiler would not find the way back: of
    outputs that are views of one another it leaves every sum of gradients to autograd."""

    def __init__(self, passes: heads.Passes) -> None:
        self.passes = passes

    def __call__(self, qkv: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], memory: bool) -> heads.Heads:
        return heads.split_heads(qkv, table, memory, self.passes if torch.is_grad_enabled() else None)


def compiled(plain: FunctionType) -> Callable:
    """A function as the compiler makes it, when it first runs.

    What is compiled belongs to a code object, and so does the count of its shapes, which the compiler bounds: every
    call of this has its own.
    """
    own = FunctionType(plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__)
    return torch.compile(own, fullgraph=True, dynamic=False)


def compile_pieces(stage: nn.Module, device: torch.device) -> None:
    """Have the compiler make the pieces of a stage that is on `device`, each when it first runs.

    Raises:
        ValueError: the compiler does not work on this machine.
    """
    check_compiler(device)
    pieces: dict[FunctionType, Piece] = {}

    def piece(written: Callable, plain: FunctionType) -> Piece:
        if plain not in pieces:
            pieces[plain] = Piece(written, plain)
        return pieces[plain]

    also = device.type in WHERE_ALSO
    split = SplitHeads(heads.Passes(compiled(heads.plain_turn), compiled(heads.plain_gradient))) if also else None
    for module in stage.modules():
        if isinstance(module, RMSNorm):
            module.function = piece(module.function, plain_rms_norm)
        elif isinstance(module, GatedMLP):
            module.product = piece(module.product, plain_silu_product)
        elif isinstance(module, InfiniAttention):
            if also:
                module.split, module.mix = split, piece(module.mix, plain_mix)
            if module.rule is not None:
                rule = module.rule.rule if isinstance(module.rule, ConvolvedRule) else module.rule
                rule.features = piece(rule.features, plain_phi_of if rule.has_feature_map else plain_unit_length_of)
        elif isinstance(module, loss.OutputMatrix) and also:
            module.passes = loss.Passes(compiled(loss.plain_sums), compiled(loss.plain_gradient))


def compile_block_attention(stage: DecoderStage, device: torch.device) -> None:
    """Have the compiler make the attention of `model.packed_attention=flex` when it first runs, in every pass: as it is
    written it holds all scores of a chunk at once.

    Raises:
        ValueError: it is not for this device, or the compiler does not work on this machine.
    """
    if device.type != "cuda":
        raise ValueError(
            f"model.packed_attention = flex: it needs a CUDA device, this process computes on {device.type}, "
            "or model.packed_attention=auto"
        )
    check_compiler(device, "model.packed_attention = flex", "model.packed_attention=auto")
    from model.layers.block_attention import block_attention

    stage.block_attention = compiled(block_attention)


def check_compiler(
    device: torch.device, setting: str = "model.compile = true", instead: str = "model.compile=false"
) -> None:
    """Compile something small, as the pieces will be.

    Args:
        setting: what asks for the compiler, and `instead` what does not, for messages.

    Raises:
        ValueError: it cannot be done, with the compiler's reason.
    """
    from torch._inductor import config

    # Helpers of its own would outlive a rank that is killed, and a handful of small kernels needs none.
    config.compile_threads = 1
    x = torch.ones(2, device=device, requires_grad=True)
    try:
        Piece(torch.exp, _trial).compiled(x).sum().backward()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{setting}: PyTorch's compiler does not work here, on {device.type} "
            f"({type(error).__name__}: {reason}); it needs a C++ compiler (CXX, or g++), on CUDA also triton. "
            f"Or {instead}"
        ) from error


def _trial(x: torch.Tensor) -> torch.Tensor:
    return x.exp() + 1
