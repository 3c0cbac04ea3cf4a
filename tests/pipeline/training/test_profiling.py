"""The window of the profiler: which steps it has, on which ranks, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import ConfigError, load_config
from pipeline.config.schema import ProfileConfig
from pipeline.config.validate import validate
from pipeline.training.profiling import ProfileWindow


@pytest.mark.parametrize(
    ("start", "done", "traced", "left_out", "note"),
    [
        (None, 0, [], [], None),
        (1, 0, [1, 2, 3], [1, 2, 3], None),  # nothing comes before, to warm up in
        (5, 0, [5, 6, 7], [4, 5, 6, 7], None),
        (5, 4, [5, 6, 7], [5, 6, 7], None),
        (5, 5, [6, 7], [6, 7], "step 5 is behind, the trace begins with 6"),
        (5, 7, [], [], "step 7 is behind, nothing is traced"),
    ],
)
def test_a_run_that_goes_on_traces_what_is_left(start, done, traced, left_out, note):
    window = ProfileWindow(ProfileConfig(start=start), Path("run"), 0, done)
    assert list(window.steps) == traced
    assert [step for step in range(done + 1, 12) if step in window] == left_out
    assert window.note == (note and f"metrics.profile: {note}")


def test_steps_that_are_taken_again_are_not_traced_again():
    window = ProfileWindow(ProfileConfig(start=5), Path("run"), 1, 0)
    with window.step(5):  # another rank's
        pass
    window.close()
    assert 5 not in window and not window.path.exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("{start: 99, steps: 3}", "the trace would end with step 101, but train.steps = 100"),
        ("{start: 10, ranks: [0, 4]}", r"metrics.profile.ranks = \[0, 4\]: there is no rank 4, 4 process"),
        ("{start: 10, ranks: []}", "metrics.profile.ranks is empty"),
        ("{start: 0}", "metrics.profile.start = 0: must be at least 1"),
    ],
)
def test_what_cannot_be_traced_is_refused(settings, told):
    config = load_config(None, ["train.steps=100", f"metrics.profile={settings}"])
    with pytest.raises(ConfigError, match=told):
        validate(config, 4, data_exists=False)


def test_the_last_steps_can_be_traced():
    validate(load_config(None, ["train.steps=100", "metrics.profile={start: 98}"]), 1, data_exists=False)
