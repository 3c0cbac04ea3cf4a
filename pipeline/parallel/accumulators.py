"""float32 sums of the gradients of bfloat16 parameters, over all chunks of a step.

A chunk's gradient of a matrix is bfloat16, as the product that gives it. It is added to a float32 `grad` in one
operation that reads both: PyTorch allows a gradient of any precision where `grad_dtype` is None. Nothing else has to
know: what reduces, clips or spoils gradients finds float32 ones.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def accumulate_in_float32(parameters: Iterable[nn.Parameter]) -> None:
    """Let the bfloat16 ones among `parameters` have float32 gradients."""
    for parameter in parameters:
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            parameter.grad_dtype = None
            parameter.register_post_accumulate_grad_hook(_widen)


def _widen(parameter: nn.Parameter) -> None:
    # The first chunk's gradient becomes the sum; what is added later leaves its precision as it is.
    if parameter.grad.dtype != torch.float32:
        parameter.grad = parameter.grad.float()
