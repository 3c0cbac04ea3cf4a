"""The device under test, and what is there: `make test-gpu` sets INFINI_TEST_DEVICE; else it is the CPU."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence

import torch
from torch import Tensor

NAME = os.environ.get("INFINI_TEST_DEVICE", "cpu")
"""`cuda` or `cpu`."""
REPORT = os.environ.get("INFINI_TEST_REPORT")
"""Where the summary goes; None: nowhere."""
PACKAGES = ("torch", "triton", "fla-core", "transformer-engine", "megatron-core", "deepspeed", "transformers")


def obstacle() -> str | None:
    """Why nothing can run on the device; None when it can."""
    if NAME not in ("cpu", "cuda"):
        return f"INFINI_TEST_DEVICE={NAME}: must be cuda or cpu"
    if NAME == "cuda" and not torch.cuda.is_available():
        return f"no CUDA device: torch {torch.__version__} finds none"
    return None


def processes() -> list[int]:
    """World sizes to try: one, and as many as there are devices; two on a CPU."""
    count = torch.cuda.device_count() if NAME == "cuda" else 2
    return [1] if count < 2 else [1, count]


def environment(device: str) -> dict[str, str]:
    """What a process needs in its environment to compute on `device`."""
    return {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}


def described() -> dict[str, object]:
    """What the tests run on."""
    found: dict[str, object] = {"device": NAME, "python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["torch"] = torch.__version__  # its build, too
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        found["devices"] = [torch.cuda.get_device_name(i) for i in range(count)]
        found["compute capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        found |= {"cuda of torch": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["driver"] = _driver()
    return found


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"unknown ({type(error).__name__})"


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in float64 on the CPU."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).norm() / expected.norm()).item()


def eps(dtype: torch.dtype, factor: float) -> float:
    """A tolerance: so many roundings of `dtype`."""
    return factor * torch.finfo(dtype).eps


def worst(errors: dict[str, float]) -> Sequence[object]:
    name = max(errors, key=errors.get)
    return name, errors[name]
