"""What writes a window for the delta rules (`model.memory.kernel`): the torch form, or flash-linear-attention's
chunked Triton kernels (`chunk_gated_delta_rule`, arXiv 2412.06464).

The kernels' products are bfloat16 with float32 sums, and what they keep between their blocks of 64 tokens for the
backward pass is bfloat16, too. States at segment borders must be float32: they are the kernels' final states, which
are. So a segment is a sequence of its own, and all segments of a window are one call. Over a segment the rule is
affine, M -> T M + W. With the values [v, 0] and the initial state [0, I], the final state is [W, T]; the float32 scan
over segments is that of every rule, and with it resets, the state carried in, and their gradients. A window of one
segment that no other rank shares starts from its state at once, at half the width.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import KERNELS, ModelConfig, layer_shape
from model.rules.borders import Borders
from model.rules.context import ContextPart
from model.rules.scan import scan_pairs

RULES_WITH_KERNELS = ("deltanet", "gated_deltanet", "delta_product")
WIDEST_HEAD = 256
"""Of the kernels: their state is held in four blocks of 64 rows."""
INSTALL = "pip install 'infini-pretrain[kernels]'"


class Kernel(NamedTuple):
    name: str
    """`torch` or `fla`."""
    reason: str
    """Why this one, for people."""


@functools.cache
def choose_kernel(asked: str, *, bfloat16: bool, device: str, dim: int) -> Kernel:
    """Which kernel writes.

    Args:
        asked: one of `KERNELS`.
        bfloat16: the run computes matrix products in bfloat16.
        device: type of the device, such as `cuda`.
        dim: of a head.

    Raises:
        ValueError: `fla` is asked for and cannot be had, with what to do about it.
    """
    assert asked in KERNELS, asked
    if asked == "torch":
        return Kernel("torch", "asked for")
    version, obstacle = _fla_version(), None
    if not bfloat16:
        obstacle = "its products are bfloat16: it needs train.precision=bf16"
    elif device != "cuda":
        obstacle = f"it needs a CUDA device, this process computes on {device}"
    elif dim > WIDEST_HEAD:
        obstacle = f"it takes heads of up to {WIDEST_HEAD} numbers, these have {dim}"
    elif version is None:
        obstacle = f"flash-linear-attention is not installed: {INSTALL}"
    elif triton := _wrong_on_hopper():
        obstacle = f"with triton {triton} its gradients are wrong on Hopper (fla-core refuses it), 3.7.1 is right"
    if obstacle is None:
        return Kernel("fla", f"flash-linear-attention {version}, {'asked for' if asked == 'fla' else 'found'}")
    if asked == "fla":
        raise ValueError(f"model.memory.kernel = fla: {obstacle}, or model.memory.kernel=torch")
    return Kernel("torch", f"no fla: {obstacle}")


def memory_kernel(model: ModelConfig, precision: str, device: str) -> Kernel | None:
    """Which kernel writes the memory of `model`; None for rules that have no choice.

    Raises:
        ValueError: as `choose_kernel`.
    """
    if model.memory.rule not in RULES_WITH_KERNELS:
        return None
    dim = layer_shape(model).dim
    return choose_kernel(model.memory.kernel, bfloat16=precision == "bf16", device=device, dim=dim)


def _fla_version() -> str | None:
    try:
        return importlib.metadata.version("fla-core")
    except importlib.metadata.PackageNotFoundError:
        return None


def _wrong_on_hopper() -> str | None:
    """The version of Triton where it compiles a kernel of theirs wrongly for the device: fla-core's issue 640, and its
    check in `fla/ops/common/chunk_o.py`, which comes in the first backward pass."""
    if torch.version.hip or torch.cuda.get_device_capability()[0] != 9:
        return None
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
    numbers = tuple(int(x) for x in re.findall(r"\d+", version)[:3])
    return version if (3, 4) <= numbers < (3, 7, 1) else None


def scan_by_fla(
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    log_decay: Tensor | None,
    initial: Tensor,
    borders: Borders,
    part: ContextPart | None = None,
    *,
    products: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """`scan_delta_rule` of `model.rules.deltanet` by flash-linear-attention; the states are float32.

    Args:
        products: what keys and values are rounded to. float32 is for checks in Triton's interpreter: on a GPU the
            kernels would round it to TF32.
    """
    b, t, n, _, d = key.shape
    gate = torch.ones_like(key[..., 0]) if gate is None else gate
    log_decay = torch.zeros_like(key[..., 0]) if log_decay is None else log_decay
    key, value = key.to(products), value.to(products)
    if t == 1 and part is None:
        start = initial.masked_fill(borders.reset.view(b, 1, 1, 1), 0)
        before = start.unsqueeze(1)
        found = borders.for_writes(before).squeeze(1)
        return before, _final_states(key[:, 0], value[:, 0], gate[:, 0], log_decay[:, 0], found)
    unit = torch.eye(d, dtype=initial.dtype, device=initial.device)
    empty_and_unit = torch.cat([torch.zeros_like(unit), unit], dim=-1).expand(b * t, n, d, 2 * d)
    value = torch.cat([value, torch.zeros_like(value)], dim=-1)
    ends = _final_states(*(x.flatten(0, 1) for x in (key, value, gate, log_decay)), empty_and_unit)
    return scan_pairs(initial, ends.unflatten(0, (b, t)), borders, part)


def _final_states(key: Tensor, value: Tensor, gate: Tensor, log_decay: Tensor, initial: Tensor) -> Tensor:
    """The states `[b, n, d, v]` after keys `[b, n, s, d]` and values `[b, n, s, v]`."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    k, v, g, beta = (x.transpose(1, 2).contiguous() for x in (key, value, log_decay, gate))
    # Nobody reads inside a segment: the queries are zero.
    _, final = chunk_gated_delta_rule(
        torch.zeros_like(k), k, v, g, beta, scale=1.0, initial_state=initial.contiguous(), output_final_state=True
    )
    return final
