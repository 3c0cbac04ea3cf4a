"""Accelerators by their data sheets: what a plan knows of a device that is not there."""

from __future__ import annotations

import re
from dataclasses import dataclass

GPUS_PER_NODE = 8
"""Of every machine that these devices are sold in."""


@dataclass(frozen=True)
class Accelerator:
    """Data-sheet values; dense, without sparsity."""

    memory_gb: int
    """10^9 bytes. Drivers report up to 7 % more, which the context and communication buffers need."""
    tflops: dict[str, float]
    """Matrix products, TFLOP/s by `train.precision`, and `tf32`. float32 is float32: torch rounds to TF32 when told
    to only."""
    node_link_gb_per_s: float
    """To the other devices of a node, each way."""

    @property
    def memory_bytes(self) -> int:
        return self.memory_gb * 10**9


def _accelerator(memory_gb: int, bf16: float, tf32: float, fp32: float, fp64: float, link: float) -> Accelerator:
    return Accelerator(memory_gb, {"bf16": bf16, "tf32": tf32, "fp32": fp32, "fp64": fp64}, link)


# Of the SXM or OAM form where nothing else is said. The data sheets are named in docs/devices.md. NVLink and Infinity
# Fabric are given there as both directions together, matrix products of 2023 and later with sparsity: half stands here.
ACCELERATORS = {
    "A100-40": _accelerator(40, 312.0, 156.0, 19.5, 19.5, 300.0),
    "A100-80": _accelerator(80, 312.0, 156.0, 19.5, 19.5, 300.0),
    "H100": _accelerator(80, 989.5, 494.5, 67.0, 67.0, 450.0),
    "H100-PCIE": _accelerator(80, 756.5, 378.0, 51.0, 51.0, 64.0),
    "H100-NVL": _accelerator(94, 835.5, 417.5, 60.0, 60.0, 300.0),
    "H200": _accelerator(141, 989.5, 494.5, 67.0, 67.0, 450.0),
    "B200": _accelerator(180, 2250.0, 1125.0, 75.0, 37.0, 900.0),
    "MI300X": _accelerator(192, 1307.4, 653.7, 163.4, 163.4, 448.0),
}

DRIVER_NAMES = {
    r"NVIDIA A100-(SXM4|PCIE)-40GB": "A100-40",
    r"NVIDIA A100(-SXM4-80GB| 80GB PCIe)": "A100-80",
    r"NVIDIA H100 80GB HBM3": "H100",
    r"NVIDIA H100 PCIe": "H100-PCIE",
    r"NVIDIA H100 NVL": "H100-NVL",
    r"NVIDIA H200": "H200",
    r"NVIDIA B200": "B200",
    r"AMD Instinct MI300X( OAM| VF)?": "MI300X",
}
"""What drivers call them, whole: a GH200, a GB200, an H200 NVL or a MIG slice is another device."""


def known_as(name: str) -> str | None:
    """The entry of `ACCELERATORS` that a driver's name stands for; None for a device that is not in the table."""
    return next((known for pattern, known in DRIVER_NAMES.items() if re.fullmatch(pattern, name.strip())), None)


def sheet_flops_per_s(name: str, precision: str, *, tf32: bool) -> float | None:
    """What the data sheet of a device says of dense matrix products, in FLOP/s; None for one that is not in the table.

    Args:
        name: as the driver has it.
        precision: a `train.precision`.
        tf32: float32 products may round to TF32.
    """
    known = known_as(name)
    if known is None:
        return None
    return 1e12 * ACCELERATORS[known].tflops["tf32" if tf32 and precision == "fp32" else precision]
