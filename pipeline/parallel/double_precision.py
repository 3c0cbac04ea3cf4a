"""Float64 parameters under DeepSpeed, which has settings for half precision and float32 only.

Left alone it takes float64 parameters and trains something else: their masters are float32, and ZeRO 1 looks for
gradients in a float32 buffer that nobody fills, so that their norm is 0 and nothing moves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine


@contextlib.contextmanager
def in_double_precision() -> Iterator[None]:
    """An engine made inside keeps masters and moments, sums gradients and talks in float64.

    It needs `reduce_scatter` off.
    """
    float64 = torch.float64
    with (
        mock.patch.object(DeepSpeedEngine, "get_data_types", lambda self: (float64, float64)),
        mock.patch.object(DeepSpeedEngine, "communication_data_type", float64),
        mock.patch.object(ZeROOptimizer, "_configure_master_weights", lambda self, **_: float64),
    ):
        yield
