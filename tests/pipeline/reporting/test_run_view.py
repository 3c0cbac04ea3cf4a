"""`infini monitor`: what a run has written is what the screen says, while it writes and afterwards."""

from __future__ import annotations

import io
import json
import math
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from launch import cli
from model.config import MemoryConfig
from pipeline.reporting.console_file import ConsoleFile
from pipeline.reporting.metrics import MetricsWriter, Start
from pipeline.reporting.run_screen import Drawing, screen
from pipeline.reporting.run_view import POINTS, QUIET_AT_FIRST_S, QUIET_LEAST_S, QUIET_TIMES, Curve, RunView

NOW = 1_800_000_000.0
START = Start(
    name="books [large]",
    steps=400,
    tokens_per_step=1000,
    hosts=["node1", "node1", "node2", "node2"],
    layout="tensor 1 x pipeline 1 x data 4",
    memory=MemoryConfig(rule="delta", write_gate="hard"),
    straggler_bound=1.25,
)
INTERVAL = {
    "loss/train": 2.5,
    "speed/tokens_per_s": 500.0,
    "speed/step_s": 2.0,
    "speed/data_s": 7e-5,
    "speed/forward_backward_s": 1.5,
    "speed/optimizer_s": 0.3,
    "optimizer/gradient_norm": 0.7,
    "optimizer/learning_rate": 1e-3,
    "progress/tokens": 10_000,
    "ranks/slowest": 2,
    "ranks/slowest_s": 1.9,
    "ranks/median_s": 1.4,
    "ranks/slowdown": 1.36,
}


@pytest.fixture
def clock(monkeypatch):
    """The time that the writer stamps its lines with."""
    now = [NOW]
    monkeypatch.setattr("pipeline.reporting.metrics.time.time", lambda: now[0])
    stamps = SimpleNamespace(strptime=time.strptime, mktime=time.mktime)
    stamps.strftime = lambda form: time.strftime(form, time.localtime(now[0]))
    monkeypatch.setattr("pipeline.reporting.console_file.time", stamps)
    return now


def write(folder, clock, steps=(10, 20, 30), *, resume=None, s=20.0):
    """A run's lines: a start, an interval every `s` seconds, the memory of two layers, no end."""
    writer = MetricsWriter(folder, tensorboard=False, resume_step=resume)
    writer.start(resume or 0, START)
    for step in steps:
        clock[0] += s
        writer.scalars(step, INTERVAL | {"loss/train": 3.0 - step / 100, "progress/tokens": 1000 * step})
        layers = {"mix_gate": 0.5, "share_of_output": 0.3, "write_gate": 0.9, "norm_M": 2.0, "effective_rank": 8.0}
        layers |= {"norm_z": 3.0, "read_variation": 0.6}
        writer.scalars(step, {f"{name}/layer_{i:02d}": x + i / 10 for name, x in layers.items() for i in range(2)})
    return writer


def shown(view, now, **options):
    console = Console(file=io.StringIO(), width=140, **options)
    console.print(screen(view, now))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def viewed(folder):
    view = RunView(folder / "metrics.jsonl")
    view.update()
    return view


def test_the_screen_says_what_was_written(tmp_path, clock):
    writer = write(tmp_path, clock)
    writer.scalars(30, {"checkpoint/stall_s": 0.5, "checkpoint/write_s": 3.0})
    evaluated = {
        "text/loss_on": 2.5,
        "text/loss_off": 2.75,
        "text/loss_reset": 2.625,
        "task_on/recall pairs 4": 0.5,
        "task_shuffled/recall pairs 4": 0,
    }
    evaluated |= {"text/loss_by_segment_on/0": 3.0, "seconds": 9.0, "other": 7.0}
    writer.scalars(30, {f"evaluation/{name}": value for name, value in evaluated.items()})
    view = viewed(tmp_path)
    assert view.step_s == 2.0 and view.left_s == 370 * 2.0
    text = shown(view, clock[0] + 5)
    for line in (
        "books [large]  running, last line 5s ago",
        "step 30 of 400 ",
        "eta 12m20s  30.0 K tokens",
        "loss                 2.7000  █▄▁  from 2.9000",
        "tokens per second    500 ",
        "seconds per step     2  data under 0.001, forward and backward 1.5, optimizer 0.3",
        "optimizer            learning rate 1.00e-03, gradient norm 0.7",
        "4 on node1, node2; SLOW: rank 2 on node2, 1.9 s of its own per step, 1.36 times the others",
        "checkpoint           step 30, 5s ago (training waited 0.5 s, writing took 3 s)",
        "evaluation, step 30  loss of text: on 2.5, off 2.75, emptied 2.625\n"
        "                     recall pairs 4, right: on 0.5, exchanged 0\n"
        "                     other: 7\n",
        "memory at step 30, mean over 2 layers",
        "mixing gate           0.55     0.5    0.6   ▁█         moves by 0.005 or more from where it began",
        "whether that is healthy can be said from step 200 on",
    ):
        assert line in text, text
    assert "\x1b" not in text


def test_every_finding_of_the_diagnosis_is_on_the_screen(tmp_path, clock):
    write(tmp_path, clock, (100, 200))
    assert "nothing wrong is seen" in shown(viewed(tmp_path), clock[0])
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_step=200)
    writer.scalars(250, {f"{name}/layer_{i:02d}": 1e-5 for name in ("share_of_output", "write_gate") for i in range(2)})
    view = viewed(tmp_path)
    text = " ".join(shown(view, clock[0]).split())
    assert [finding.name for finding in view.findings] == ["nothing is written", "memory is not used"]
    assert all(f"memory: {finding}" in text for finding in view.findings)


def test_a_live_file_is_followed_and_a_resumed_one_read_anew(tmp_path, clock):
    writer = write(tmp_path, clock)
    view = viewed(tmp_path)
    writer.scalars(40, INTERVAL)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 50, "loss/tr')  # still being written
    view.update()
    assert view.step == 40 and view.values["loss/train"] == 2.5 and len(view.curves["loss/train"].values) == 4
    write(tmp_path, clock, (30, 40), resume=20)
    view.update()
    assert view.step == 40 and view.starts == 2 and view.values["loss/train"] == 2.6
    assert view.curves["loss/train"].values == [2.9, 2.8, 2.7, 2.6] and view.broken == 0
    assert "started 2 times" in shown(view, clock[0])


def test_a_run_that_has_ended_says_why_and_a_silent_one_is_suspected(tmp_path, clock):
    writer = write(tmp_path, clock)
    silent = max(QUIET_TIMES * 20, QUIET_LEAST_S) + 1
    assert viewed(tmp_path).silent_s(clock[0] + silent - 2) is None
    assert f"SILENT for {silent - 60:.0f}" not in shown(viewed(tmp_path), clock[0] + silent - 2)
    assert "SILENT for 1m41s: dead, hanging" in shown(viewed(tmp_path), clock[0] + silent)
    beginning = write(tmp_path / "new", clock, ())
    beginning.close()
    assert viewed(tmp_path / "new").silent_s(clock[0] + QUIET_AT_FIRST_S - 1) is None
    assert viewed(tmp_path / "new").silent_s(clock[0] + QUIET_AT_FIRST_S + 1) == QUIET_AT_FIRST_S + 1
    writer.end(30, "stopped: signal SIGTERM")
    text = shown(viewed(tmp_path), clock[0] + 3600)
    assert "stopped: signal SIGTERM 1h00m ago" in text and "SILENT" not in text and "eta" not in text


def test_why_a_run_failed_is_shown(tmp_path, clock):
    """Of its newest start, by a rank or by the launcher."""
    file = ConsoleFile(tmp_path)
    file.write("[rank 0] error: of an earlier start")
    clock[0] += 100
    write(tmp_path, clock)
    file.write("[rank 3] error: shard 3 is\x1b[2J gone\n(traceback in error-rank3.txt)")
    file.write("error: rank 1 on node2 was killed by SIGKILL")
    file.write("step 30/400  loss 2.7  error: no")
    view = viewed(tmp_path)
    text = shown(view, clock[0])
    assert len(view.failures()) == 2 and "earlier" not in text
    assert "[rank 3] error: shard 3 is\\x1b[2J gone\nerror: rank 1 on node2 was killed by SIGKILL" in text


def test_files_of_older_versions_are_shown_as_far_as_they_go(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 5, "loss/train": None, "nonfinite": ["loss/train"], "memory_layer_00/norm_M": 1.5}) + "\n"
        "broken\n"
    )
    view = viewed(tmp_path)
    assert view.steps is None and math.isnan(view.left_s) and view.findings is None and view.broken == 1
    text = shown(view, NOW)
    assert "step 5\n" in text and "loss  " in text and "nan" in text and "1 lines of" in text


def test_curves_stay_small_and_keep_their_shape():
    curve = Curve()
    for value in range(100_000):
        curve.add(float(value))
    assert POINTS <= len(curve.values) < 2 * POINTS
    steps = {b - a for a, b in zip(curve.values, curve.values[1:], strict=False)}
    assert len(steps) == 1 and curve.values[0] == 0
    assert Drawing(curve.values, width=8).text() == "▁▂▃▄▅▆▇█" and Drawing([]).text() == ""
    assert Drawing([2.0, math.nan, 2.0]).text() == "▄▄"


def test_the_command_in_a_pipe_has_no_escape_codes(tmp_path, clock, capsys):
    write(tmp_path / "run", clock).end(30, "finished")
    assert cli.main(["monitor", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "books [large]  finished" in out and "\x1b" not in out
    assert all(line == line.rstrip() for line in out.splitlines())
    assert cli.main(["monitor", str(tmp_path / "run" / "metrics.jsonl"), "--once"]) == 0
    for folder, told in ((tmp_path, f"runs in it: {tmp_path}/run"), (tmp_path / "no", "does not exist")):
        assert cli.main(["monitor", str(folder)]) == 2
        assert told in capsys.readouterr().err


def test_in_a_terminal_it_is_drawn_until_the_run_ends(tmp_path, clock, monkeypatch, capsys):
    """The run ends while it is watched."""
    writer = write(tmp_path, clock)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("launch.commands.monitor.time.sleep", lambda seconds: writer.end(30, "finished"))
    assert cli.main(["monitor", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b[?1049h" in out and out.index("running, last line") < out.index("\x1b[?1049l") < out.rindex("finished")
