"""`infini config`: what a run takes, and what its settings mean."""

import pytest
import yaml

from launch import cli
from pipeline.config.keys import settings
from pipeline.config.load import load_config


def shown(capsys, *arguments: str) -> str:
    assert cli.main(["config", *arguments]) == 0
    return capsys.readouterr().out


def test_every_setting_is_explained_with_type_default_and_meaning(capsys):
    text = shown(capsys, "--help-keys")
    for setting in settings():
        assert f"\n{setting.key}: " in f"\n{text}"
        assert setting.meaning[:40] in " ".join(text.split())
    assert "model.num_layers: an integer, 1 to 2,048; default 4\n    Layers; each of `memory.layers`" in text
    assert "bptt.gradient: one of full, detached; default full\n" in text
    assert "optimizer.lr: a number, above 0 to 1,000; default 0.001\n" in text
    assert "data.sets.*.path: text; no default\n" in text
    assert "model.kv_channels: an integer or null, 1 to 16,384; default null\n" in text


@pytest.mark.parametrize(
    ("pattern", "first"),
    [
        ("heads", "model.num_attention_heads"),
        ("HEADS", "model.num_attention_heads"),
        ("rope_theta", "model.rope_base"),
        ("learning_rate", "optimizer.lr"),
        ("tensorboard", "metrics.tensorboard"),
        ("checkpoint.*", "checkpoint.interval"),
        ("file stop", "resilience.stop_file"),
        ("haystack of nothing", None),
    ],
)
def test_settings_are_searched(capsys, pattern, first):
    if first is None:
        assert cli.main(["config", "--help-keys", pattern]) == 2
        assert "no setting has 'haystack of nothing'" in capsys.readouterr().err
    else:
        assert shown(capsys, "--help-keys", pattern).startswith(f"{first}: ")


def test_the_configuration_is_shown_as_a_run_takes_it(capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: 2026_11\nmodel: {num_layers: 6}\n")
    text = shown(capsys, str(path), "train.steps=0100")
    saved = tmp_path / "shown.yaml"
    saved.write_text(text)
    assert load_config(saved, []) == load_config(path, ["train.steps=100"])
    assert yaml.safe_load(text)["name"] == "2026_11"
    assert yaml.safe_load(shown(capsys, "name=x"))["run_dir"] == "runs/x"


def test_one_that_cannot_run_is_shown_with_what_is_wrong(capsys):
    assert cli.main(["config", "train.lanes=0"]) == 2
    printed = capsys.readouterr()
    assert "lanes: 0\n" in printed.out and "train.lanes = 0: must be at least 1" in printed.err


def test_help_and_a_file_together_are_refused(capsys):
    assert cli.main(["config", "name=x", "--help-keys"]) == 2
    assert "leave the file and settings out" in capsys.readouterr().err
