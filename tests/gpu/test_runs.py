"""Whole commands on the device: training on every layout, checkpoints that change devices, generation, the benchmark.

Each command is a process of its own, as a user starts it. The CPU is the reference, in float32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import target
from tests.prepared import write_set

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
STEPS, SAVED = 6, 3
SETTINGS = [
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_attention_heads=8",
    "model.ffn_hidden_size=96",
    "model.segment_length=32",
    "model.memory.write_gate=sigmoid",
    "train.lanes=8",
    "train.segments_per_window=4",
    f"train.steps={STEPS}",
    "optimizer.lr=3e-3",
    "optimizer.warmup_steps=2",
    "bptt.chunks_per_window=2",
    "metrics.interval=1",
    "metrics.memory_interval=2",
    "metrics.tensorboard=false",
    f"checkpoint.interval={SAVED}",
]
FLOAT32_BAND = 1e-5
"""Relative, of a step's loss: what all layouts are held to on a CPU. Rounding is some 1e-8 of it there."""
BFLOAT16_BAND = 4e-3
"""Half a rounding of bfloat16: in the mean over all tokens most of them average out (2e-4 on a CPU)."""


def infini(device: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command on `device` and see that it ends well."""
    environment = os.environ | target.environment(device)
    command = [sys.executable, "-m", "launch.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"infini {' '.join(map(str, arguments))}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


class Run:
    """A run that has ended: its folder, what it printed, and the loss of every step."""

    def __init__(self, folder: Path, printed: str) -> None:
        self.folder, self.printed = folder, printed
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        self.losses = {row["step"]: row["loss/train"] for row in rows if "loss/train" in row}

    @property
    def checkpoint(self) -> Path:
        """The one in the middle."""
        return self.folder / "checkpoints" / f"step_{SAVED:08}"


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """`train(device, *overrides, nproc=, resume=)` gives a `Run`; the same call is made once."""
    folder = tmp_path_factory.mktemp("gpu")
    data = write_set(folder / "set", [400, 1000, 260, 128, 500, 190, 90, 800])
    config = folder / "run.yaml"
    config.write_text("name: gpu\n", encoding="utf-8")
    known: dict[tuple, Run] = {}

    def train(device: str, *overrides: str, nproc: int = 1, resume: Path | None = None) -> Run:
        key = (device, overrides, nproc, resume)
        if key not in known:
            run = folder / f"run{len(known)}"
            more = ["--nproc", nproc] if nproc > 1 else []
            more += ["--resume", resume] if resume else []
            settings = [*SETTINGS, f"data.sets=[{{path: {data}}}]", f"run_dir={run}", *overrides]
            known[key] = Run(run, infini(device, "train", config, *settings, *more).stdout)
        return known[key]

    return train


def differences(found: Run, expected: Run) -> dict[str, float]:
    """Relative, of the loss of every step of `found`."""
    assert max(found.losses) == STEPS
    return {f"step {step}": abs(x - expected.losses[step]) / expected.losses[step] for step, x in found.losses.items()}


def layouts() -> list[tuple[int, str, list[str]]]:
    """Number of processes, name and settings."""
    found = [(1, "alone", [])]
    for world in target.processes()[1:]:
        world = 1 << (min(world, 8).bit_length() - 1)  # lanes and heads are eight
        found += [(world, "data", []), (world, "data, ZeRO 3", ["parallel.zero_stage=3"])]
        sequence = "parallel.sequence_parallel=true"
        found += [
            (world, "tensor", [f"parallel.tensor={world}", sequence]),
            (world, "pipeline", ["parallel.pipeline=2"]),
        ]
    return found


@pytest.mark.parametrize(("world", "name", "settings"), layouts(), ids=lambda x: x if isinstance(x, str) else None)
def test_layout_trains_as_one_cpu_process(device, within, train, world, name, settings):
    run = train(device.type, *settings, nproc=world)
    assert f"{world} processes on {device.type}" in run.printed
    within(differences(run, train("cpu")), FLOAT32_BAND)


@pytest.mark.parametrize("rule", ["delta", "gated_deltanet"])
def test_bfloat16(device, within, train, rule):
    """With `gated_deltanet`, flash-linear-attention where it is installed; the run says which kernel it took."""
    setting = f"model.memory.rule={rule}"
    run = train(device.type, setting, "train.precision=bf16")
    assert ("memory is written by" in run.printed) == (rule == "gated_deltanet")
    within(differences(run, train("cpu", setting)), BFLOAT16_BAND)


def test_a_cpu_checkpoint_goes_on_on_the_device(device, within, train):
    whole = train("cpu")
    within(differences(train(device.type, resume=whole.checkpoint), whole), FLOAT32_BAND)


def test_a_checkpoint_of_the_device_goes_on_on_a_cpu(device, within, train):
    whole = train(device.type)
    within(differences(train("cpu", resume=whole.checkpoint), whole), FLOAT32_BAND)


def test_generation_gives_the_same_tokens(device, train):
    checkpoint = train("cpu").checkpoint
    prompt = "some words to go on from, " * 4
    asked = ("generate", checkpoint, "--prompt", prompt, "--max-new-tokens", 48)
    texts = [infini(where, *asked).stdout for where in ("cpu", device.type)]
    assert texts[0] == texts[1] and texts[0].strip()


def test_benchmark(device, tmp_path):
    """`infini bench step` at its quick sizes; what it measured is beside the report."""
    done = infini(device.type, "bench", "step", "--quick", "--device", device.type, "--out", tmp_path, "--against")
    (record,) = tmp_path.glob("*.json")
    assert json.loads(record.read_text(encoding="utf-8")) and device.type in record.read_text(encoding="utf-8")
    print(done.stdout)
