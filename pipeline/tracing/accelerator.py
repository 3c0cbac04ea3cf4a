"""An accelerator that does not exist, on a machine with or without one: the real code runs on it without any numbers.

Tensors have shape, dtype, device and bytes, but no values (PyTorch's `FakeTensorMode`), on a device type of PyTorch's
`PrivateUse1` that nothing stands behind. What a real accelerator would show late or not at all, it shows at once:

* an operation on tensors of two devices raises `FakeTensorDeviceMismatchError`;
* a value that Python wants to know raises `DataDependentOutputException`, since there is none: on a device the program
  would wait there until everything that was started is done. `pipeline.tracing.ledger` writes those down and goes on.

Fake tensors on `cuda` abort in autograd where PyTorch is built without CUDA; a device type of our own works everywhere,
and leaves a CUDA device alone. It is registered for the rest of the process, which PyTorch then takes to have an
accelerator: a process that traces should do nothing else afterwards.

Attention is counted as CUDA runs it: one fused kernel forward and one backward, where PyTorch would decompose it for a
device that has none.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import bias
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretended"
"""The device type, as error messages give it."""


class _DeviceModule(_DummyBackendModule):
    """`torch.pretended`: what PyTorch asks a device's module for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]


class _Mode(FakeTensorMode):
    """Moves no constant to the device for real, as `torch.tensor(values, device=...)` would."""

    avoid_device_init = True


@contextmanager
def pretended_accelerator() -> Iterator[torch.device]:
    """Inside, everything that is made has no numbers, on the CPU and on the device that this gives.

    Parameters must be made on the device (`with device:`): moving a module there does nothing.
    """
    device, mode = _register()
    with ExitStack() as patches:
        # Megatron allocates on the current device; a module's own parameters cannot be swapped on this device.
        patches.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: device))
        patches.enter_context(mock.patch.object(nn.Module, "to", lambda self, *args, **kwargs: self))
        # `causal_lower_right` gives a tensor in name alone, and takes the flash kernel where there is one.
        patches.enter_context(mock.patch.object(bias.CausalBias, "__new__", _real_tensor))
        patches.enter_context(mock.patch.object(bias, "can_use_flash_attention", lambda _: True))
        patches.enter_context(mode)
        yield device


@functools.cache
def _register() -> tuple[torch.device, FakeTensorMode]:
    """The device and the one mode of this process: what a module keeps from one trace to the next stays usable."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_DeviceModule())
    _attention.impl("scaled_dot_product_attention", _fused_attention)
    return torch.device(NAME, 0), _Mode()


_attention = torch.library.Library("aten", "IMPL", "AutogradPrivateUse1")


def _real_tensor(kind: type[Tensor], *_: object) -> Tensor:
    with _disable_current_modes():
        return torch.empty(0).as_subclass(kind)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The flash kernel where there is no mask, else the one that takes masks and wants key/value heads repeated."""
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]
