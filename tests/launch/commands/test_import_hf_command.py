"""`infini import-hf` from the command line, and what the other commands make of its folder."""

import json

import pytest
import torch.distributed as dist

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

from launch import cli  # noqa: E402
from launch.processes.world import VARIABLES  # noqa: E402
from tests.tiny_hf import write_hf_model  # noqa: E402


@pytest.fixture
def no_launcher(monkeypatch):
    """A process that nothing started: what join_world writes into the environment is taken back."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    assert not dist.is_initialized()


def test_import_and_inspect(no_launcher, tmp_path, capsys):
    write_hf_model(tmp_path / "hf", "qwen3")
    out = tmp_path / "out"
    options = ["--segment-length", "32", "--memory-rule", "linear", "--write-gate", "hard", "--beta-init", "-2"]
    assert cli.main(["import-hf", str(tmp_path / "hf"), "--out", str(out), *options]) == 0
    assert f"infini train {out}/config.yaml" in capsys.readouterr().out
    assert cli.main(["inspect", str(out / "checkpoints" / "step_00000000")]) == 0
    printed = capsys.readouterr().out
    for part in (
        "weights alone",
        "qwen3",
        "linear, write gate hard, segments of 32 tokens",
        "0.119",
        "all hashes match",
    ):
        assert part in printed


def test_errors_leave_nothing(no_launcher, tmp_path, capsys):
    write_hf_model(tmp_path / "hf", "llama")
    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "mamba"}))
    assert cli.main(["import-hf", str(tmp_path / "hf"), "--out", str(tmp_path / "out")]) == 2
    assert "model_type is 'mamba'" in capsys.readouterr().err
    assert cli.main(["import-hf", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert "neither a folder with a Hugging Face model nor a .gguf file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
