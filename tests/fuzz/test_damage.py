"""Damaged and hostile files: every command says what is wrong and names the file, or does the right thing.

Never a traceback, a hang, another result, a file touched outside of the folder, or memory without a bound. Some hundred
examples run with the suite, always the same; `INFINI_FUZZ=5000 pytest tests/fuzz` looks further, elsewhere each time.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

from tests.fuzz import damage  # noqa: E402
from tests.fuzz.server import Outcome, Server  # noqa: E402
from tests.tiny_gguf import write_gguf  # noqa: E402
from tests.tiny_hf import write_hf_model  # noqa: E402

EXAMPLES = int(os.environ.get("INFINI_FUZZ", "0"))
IN_SUITE = 150
TIMEOUT_S = 60
"""Of a command that takes a second, on a busy machine."""
GROWTH_MB = 700
"""More memory than this means that a file's size was believed."""

CONFIG = """\
name: fuzz
run_dir: run
data: {sets: [{path: set}]}
model:
  num_layers: 2
  hidden_size: 16
  num_attention_heads: 2
  num_query_groups: 1
  ffn_hidden_size: 24
  segment_length: 16
  local_context: sliding
  memory:
    rule: delta
    write_gate: hard
train:
  steps: 4
  lanes: 2
  segments_per_window: 2
optimizer:
  warmup_steps: 1
  lr: 0.01
checkpoint:
  interval: 1
  asynchronous: false
metrics: {interval: 1, memory_interval: 2, tensorboard: false}
"""

RESUME = ("train", "config.yaml", "--resume")
FRESH = ("train", "config.yaml", "run_dir=fresh", "train.steps=2", "checkpoint.interval=0")
GENERATE = ("generate", "run", "--prompt", "The grass is green. The sky", "--max-new-tokens", "8")
RECALL = ("generate", "run", "--load-memory", "memory.safetensors", "--prompt", " The", "--max-new-tokens", "8")
EXPORT = ("export-hf", "run", "--out", "export")
EVALUATE = ("evaluate", "run", "--no-passkey", "--documents", "1")
IMPORT_GGUF = ("import-hf", "model.gguf", "--out", "imported", "--segment-length", "16")
IMPORT = ("import-hf", "hf", "--out", "imported", "--segment-length", "16")
PREPARE = ("prepare", "text", "--out", "prepared", "--processes=1", "--valid-fraction=0", "--max-document-bytes=1M")
TOKENIZE = ("prepare", "text/a.txt", "--out", "prepared", "--processes=1", "--valid-fraction=0", "--tokenizer", "hf")
PLAN = ("plan", "config.yaml", "--world-size", "1")


@dataclass(frozen=True)
class Target:
    """Files that are damaged, how, and what is done with them then."""

    files: str
    damages: Sequence[Callable]
    commands: Sequence[tuple[str, ...]]
    exact: bool
    """Nothing but the undamaged result may come out. Otherwise the damage may have made another, valid file."""


TARGETS = {
    "checkpoint": Target(
        "run/checkpoints/*/*",
        (*damage.BYTES, damage.link_out, damage.json_value, damage.safetensors_header),
        (("inspect", "run"), GENERATE, EXPORT, RESUME, EVALUATE),
        exact=True,
    ),
    "latest": Target("run/checkpoints/latest", damage.BYTES, (("inspect", "run"), GENERATE, RESUME), exact=False),
    "hostile checkpoint": Target(
        "run/checkpoints/*/*.json",
        (damage.resealed_json,),
        (("inspect", "run"), GENERATE, EXPORT, RESUME, EVALUATE),
        exact=False,
    ),
    "metrics": Target("run/metrics.jsonl", damage.BYTES, (("inspect", "run"), RESUME), exact=False),
    "held-out": Target("set/*", (*damage.BYTES, damage.json_value), (EVALUATE,), exact=False),
    "set": Target("set/*", (*damage.BYTES, damage.link_out, damage.json_value), (("inspect", "set"),), exact=True),
    "set in training": Target("set/*[!r]", (*damage.BYTES, damage.link_out, damage.json_value), (FRESH,), exact=False),
    "hostile set": Target("set/*.json", (damage.resealed_json,), (("inspect", "set"), FRESH), exact=False),
    "memory file": Target("memory.safetensors", (*damage.BYTES, damage.safetensors_header), (RECALL,), exact=True),
    "model": Target("hf/*", (*damage.BYTES, damage.link_out, damage.safetensors_header), (IMPORT,), exact=False),
    "GGUF": Target("model.gguf", damage.BYTES, (IMPORT_GGUF,), exact=False),
    "model's settings": Target("hf/*.json", (damage.json_value,), (IMPORT, TOKENIZE), exact=False),
    "text": Target("text/*", damage.BYTES, (PREPARE,), exact=False),
    "configuration": Target("config.yaml", (*damage.BYTES, damage.text_line), (PLAN,), exact=False),
}
SHARE = {
    "checkpoint": 4,
    "hostile checkpoint": 3,
    "set": 3,
    "model's settings": 3,
    "configuration": 3,
    "hostile set": 2,
}
"""How often a target comes up, relative to the others."""


class Laboratory:
    """Undamaged files of every kind, made once, and the results of the commands on them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.server, self.known, self.count = folder, Server(), {}, 0
        whole = self.whole = folder / "whole"
        (whole / "text").mkdir(parents=True)
        (whole / "config.yaml").write_text(CONFIG)
        (whole / "text" / "a.txt").write_text("The colour of the box is red.\n" * 40)
        (whole / "text" / "b.jsonl").write_text('{"text": "one line", "id": 3}\n{"text": "another line"}\n')
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": [f"row {i} of the table" for i in range(9)]}), whole / "text" / "c.parquet")
        write_hf_model(whole / "hf", "llama")
        tied = write_hf_model(folder / "tied", "llama-tied")
        write_gguf(whole / "model.gguf", tied, folder / "tied" / "tokenizer.json")
        self.make("prepare", "passkey:12,length=256..320", "--out", "set", "--valid-fraction", "0.25")
        self.make("train", "config.yaml")
        shutil.rmtree(whole / "run" / "checkpoints" / "step_00000004")
        (whole / "run" / "checkpoints" / "latest").write_text("step_00000003\n")
        self.make(*GENERATE[:4], "--max-new-tokens", "0", "--save-memory", "memory.safetensors")

    def make(self, *command: str) -> None:
        outcome = self.server.run(self.whole, list(command), 240)
        assert outcome.code == 0, outcome.err

    def copy(self) -> Path:
        """A copy to damage, with a copy of its files beside it that must stay as it is."""
        self.count += 1
        folder = self.folder / f"case{self.count}"
        shutil.copytree(self.whole, folder / "inner")
        outside = folder / "outside"
        outside.mkdir()
        for path in self.whole.rglob("*"):
            if path.is_file():
                shutil.copyfile(path, outside / path.name)
        return folder

    def right(self, command: tuple[str, ...]) -> tuple[int, str]:
        """Exit code and result on undamaged files."""
        if command not in self.known:
            folder = self.copy()
            outcome = self.server.run(folder / "inner", list(command), 240)
            assert outcome.code == 0, outcome.err
            self.known[command] = result(command, folder / "inner", outcome)
            shutil.rmtree(folder)
        return self.known[command]


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    laboratory = Laboratory(tmp_path_factory.mktemp("fuzz"))
    yield laboratory
    laboratory.server.close()


def result(command: tuple[str, ...], folder: Path, outcome: Outcome) -> str:
    """What a command has come to, without times."""
    if command == EXPORT:
        return hashlib.sha256((folder / "export" / "model.safetensors").read_bytes()).hexdigest()
    if command in (RESUME, FRESH):
        run = folder / ("run" if command == RESUME else "fresh")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "loss/train" in line]
        return f"loss {lines[-1]['loss/train']} at step {lines[-1]['step']}"
    return re.sub(r"[\d,.:]+ ?(s|ms|min|MB/s|tokens/s)\b", "", outcome.out)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def judge(laboratory: Laboratory, name: str, draw) -> None:
    """One file damaged in one way, one command."""
    target = TARGETS[name]
    folder = laboratory.copy()
    inner, outside = folder / "inner", folder / "outside"
    files = sorted(path for path in inner.glob(target.files) if path.is_file())
    path = draw(st.sampled_from(files))
    what = draw(st.sampled_from(target.damages))
    json_only = what in (damage.json_value, damage.resealed_json)
    if json_only and path.suffix != ".json" or what is damage.safetensors_header and path.suffix != ".safetensors":
        what = damage.flip
    said = what(draw, path)
    command = draw(st.sampled_from(target.commands))
    if said is None:
        shutil.rmtree(folder)
        return
    before = tree(outside)
    outcome = laboratory.server.run(inner, list(command), TIMEOUT_S)
    story = (
        f"{path.relative_to(inner)}: {said}; infini {' '.join(command)}\n{outcome.out[-1500:]}\n{outcome.err[-3000:]}"
    )
    assert not outcome.timed_out, f"HANGS: {story}"
    assert outcome.growth_mb < GROWTH_MB, f"TAKES {outcome.growth_mb:.0f} MB: {story}"
    assert "Traceback (most recent call last)" not in outcome.err, f"TRACEBACK: {story}"
    assert tree(outside) == before, f"TOUCHES WHAT IS OUTSIDE: {story}"
    assert outcome.code in (0, 1, 2), f"EXIT CODE {outcome.code}: {story}"
    if outcome.code:
        assert "error: " in outcome.err or "NOT INTACT" in outcome.out.upper() or outcome.out, f"NO REASON: {story}"
        names = {path.name, path.parent.name, *(part.name for part in inner.iterdir())}
        assert any(part in outcome.err + outcome.out for part in names), f"NO FILE NAMED: {story}"
        assert len(outcome.err) < 20_000, f"SAYS TOO MUCH: {story[:3000]}"
    elif target.exact:
        expected = laboratory.right(command)
        assert result(command, inner, outcome) == expected, f"ANOTHER RESULT: {story}"
    assert not any(c in outcome.err for c in "\x1b\0"), f"CONTROL CHARACTERS: {story!r}"
    shutil.rmtree(folder)


@functools.cache
def weighted() -> tuple[str, ...]:
    return tuple(name for name in TARGETS for _ in range(SHARE.get(name, 1)))


@pytest.mark.timeout(0 if EXAMPLES else 900)
def test_damage_is_named_or_does_no_harm(laboratory):
    found: list[str] = []

    @settings(
        max_examples=EXAMPLES or IN_SUITE,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def examples(data):
        # All failures are told together: one kind of them would hide the others.
        try:
            judge(laboratory, data.draw(st.sampled_from(weighted())), data.draw)
        except AssertionError as failure:
            found.append(str(failure))

    examples()
    assert not found, f"{len(found)} of {EXAMPLES or IN_SUITE} examples:\n\n" + "\n\n".join(found)
