"""Accelerators by their data sheets: what a plan knows of a device that is not there."""

from __future__ import annotations

from dataclasses import dataclass

GPUS_PER_NODE = 8
"""Of every machine that these devices are sold in."""


@dataclass(frozen=True)
class Accelerator:
    """Data-sheet values; dense, without sparsity."""

    memory_gb: int
    """10^9 bytes. Drivers report up to 7 % more, which the context and communication buffers need."""
    tflops: dict[str, float]
    """Matrix products, TFLOP/s by `train.precision`. float32 is float32: torch rounds to TF32 only when told to."""
    node_link_gb_per_s: float
    """To the other devices of a node, each way."""

    @property
    def memory_bytes(self) -> int:
        return self.memory_gb * 10**9


def _accelerator(memory_gb: int, bf16: float, fp32: float, fp64: float, link: float) -> Accelerator:
    return Accelerator(memory_gb, {"bf16": bf16, "fp32": fp32, "fp64": fp64}, link)


# Sources, all of the SXM or OAM form: NVIDIA's data sheets of A100 (June 2021), H100 (2023), H200 (2024), DGX B200 and
# HGX B200 (2024, an eighth of the eight GPUs' values); AMD's of Instinct MI300X (2023). NVLink and Infinity Fabric are
# given there as both directions together: half of that stands here.
ACCELERATORS = {
    "A100-40": _accelerator(40, 312.0, 19.5, 19.5, 300.0),
    "A100-80": _accelerator(80, 312.0, 19.5, 19.5, 300.0),
    "H100": _accelerator(80, 989.5, 67.0, 67.0, 450.0),
    "H200": _accelerator(141, 989.5, 67.0, 67.0, 450.0),
    "B200": _accelerator(180, 2250.0, 75.0, 37.0, 900.0),
    "MI300X": _accelerator(192, 1307.4, 163.4, 163.4, 448.0),
}
