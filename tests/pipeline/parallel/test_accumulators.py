"""float32 sums of bfloat16 gradients."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.parallel.accumulators import accumulate_in_float32


def backward(weight: nn.Parameter, value: float) -> None:
    (weight * torch.tensor(value, dtype=weight.dtype)).sum().backward()


def test_many_tiny_chunks_add_up():
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    plain = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    accumulate_in_float32([weight])
    for value in [1.0] + [2.0**-10] * 1000:
        backward(weight, value)
        backward(plain, value)
    assert weight.grad.dtype == torch.float32 and weight.grad.eq(1 + 1000 * 2**-10).all()
    assert plain.grad.eq(1).all(), "what bfloat16 sums lose"


def test_a_chunk_is_added_in_one_operation_and_in_place():
    class Additions(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if torch._C._current_autograd_node() is not None:
                found.append(
                    (function.overloadpacket.__name__, *(x.dtype for x in args if isinstance(x, torch.Tensor)))
                )
            return function(*args, **(kwargs or {}))

    weight, found = nn.Parameter(torch.ones(3, 3, dtype=torch.bfloat16)), []
    accumulate_in_float32([weight])
    backward(weight, 1.0)
    held = weight.grad
    with Additions():
        backward(weight, 1.0)
    assert weight.grad is held
    assert [entry for entry in found if torch.float32 in entry] == [("add_", torch.float32, torch.bfloat16)]


def test_others_are_left_alone():
    wide, still = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)
    accumulate_in_float32([wide, still])
    assert wide.grad_dtype == torch.float32 and not wide._post_accumulate_grad_hooks
    assert still._post_accumulate_grad_hooks is None
