"""What the first version wrote is still read, and means the same: sets, checkpoints, memory files, exports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "first_version"
LOSSES = {3: 5.291510351002216, 4: 5.18291113525629}
"""Of steps 3 and 4, by the code that wrote the checkpoint of step 2."""


@pytest.fixture
def old(tmp_path) -> Path:
    shutil.copytree(FIXTURE, tmp_path / "old")
    return tmp_path / "old"


def infini(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "INFINI_DEBUG")}
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        cwd=folder,
        env=inherited | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_a_run_goes_on_on_another_layout(old):
    infini(old, "train", "run/config.yaml", "--resume")
    lines = map(json.loads, (old / "run" / "metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line["loss/train"] for line in lines if "loss/train" in line}
    assert {step: losses[step] for step in LOSSES} == pytest.approx(LOSSES, rel=1e-6)


def test_a_memory_file_is_gone_on_from(old):
    asked = ["--load-memory", "memory.safetensors", "--prompt", " The", "--max-new-tokens=12"]
    done = infini(old, "generate", "run", *asked)
    assert done.stdout == "t" * 12 + "\n"


def test_sets_and_checkpoints_are_intact(old):
    for folder in ("set", "run"):
        infini(old, "inspect", folder)


def test_an_export_loads_and_is_imported(old, remote_modules):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(old / "export", trust_remote_code=True)
    tokens = torch.tensor([list(b"There is an important info hidden inside a lot of irrelevant text. The")])
    text = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12)[0, tokens.shape[1] :]
    assert bytes(text.tolist()) == b"t" * 12
    infini(old, "import-hf", "export", "--out", "imported")
    infini(old, "inspect", "imported")
