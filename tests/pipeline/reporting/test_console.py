"""Plain lines in a log, a bar in a terminal, and a time left that is right."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from pipeline.reporting.console import (
    LOG_WIDTH,
    Eta,
    RunConsole,
    format_bytes,
    format_count,
    format_duration,
    print_table,
    progress,
)

VALUES = {
    "loss/train": 2.34512,
    "optimizer/learning_rate": 1e-3,
    "optimizer/gradient_norm": 0.5199,
    "speed/tokens_per_s": 12345.4,
    "speed/mfu": 0.3104,
    "system/process_bytes": 1.2 * 2**30,
    "speed/data_s": 0.1,
}


class FakeClock:
    now = 1000.0

    def __call__(self):
        return self.now


def log_file():
    return Console(file=io.StringIO(), width=LOG_WIDTH, highlight=False)


def terminal(width=100):
    return Console(
        file=io.StringIO(), width=width, force_terminal=True, highlight=False, _environ={"TERM": "xterm-256color"}
    )


def test_plain_line_has_everything_once():
    console, clock = log_file(), FakeClock()
    with RunConsole(1000, 100, console=console, clock=clock) as run:
        clock.now += 60.0  # start-up
        run.begin()
        clock.now += 5.0
        run.log(110, VALUES)
        clock.now += 4.0
        run.log(120, VALUES)
        run.message("checkpoint written to runs/[demo]/step-120")
    first, second, message = console.file.getvalue().splitlines()
    # 10 steps in 5 s, 890 steps left: all there is to go by.
    assert first.endswith("eta 7m25s")
    # 10 steps in 4 s, 880 steps left: 352 s.
    assert second == (
        "step 120/1000  loss 2.3451  lr 1.0e-03  grad 0.52  12,345 tok/s  mfu 31 %  mem 1.20 GiB  eta 5m52s"
    )
    assert message == "checkpoint written to runs/[demo]/step-120"


def test_values_that_are_missing_or_not_finite_do_not_break_a_line():
    console = log_file()
    with RunConsole(10, console=console, clock=FakeClock()) as run:
        run.log(1, {"loss/train": math.nan, "optimizer/gradient_norm": math.inf, "speed/mfu": math.nan})
    assert console.file.getvalue() == "step 1/10  loss nan  grad inf  mfu nan %  eta 0s\n"


@pytest.mark.parametrize("width", [100, 200])
def test_terminal_shows_a_bar_and_messages_above_it(width):
    console, clock = terminal(width), FakeClock()
    with RunConsole(10_000, console=console, clock=clock) as run:
        run.log(100, VALUES)
        clock.now += 10.0
        run.message("resumed [here]")
        run.log(200, VALUES | {"loss/answer": 1.5})
    text = console.file.getvalue()
    assert "200/10000" in text and "loss 2.3451" in text and "answer 1.5000" in text
    assert "12,345 tok/s" in text and "eta 16m20s" in text  # not cut off at the right
    assert "resumed [here]" in text and "step 200/10000  loss" not in text


def test_dumb_terminal_gets_plain_lines():
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    with RunConsole(10, console=console) as run:
        run.log(1, {"loss/train": 1.0})
    assert "step 1/10  loss 1.0000" in console.file.getvalue()


def test_the_first_step_says_what_it_took_and_what_that_makes():
    console, clock = log_file(), FakeClock()
    with RunConsole(101, console=console, clock=clock) as run:
        clock.now += 6.0
        run.first_step(1, {"loss/train": 5.5, "optimizer/gradient_norm": 2.0}, 6.0)
        clock.now += 18.0
        run.log(10, {"loss/train": 5.0})
    assert console.file.getvalue().splitlines() == [
        "step 1/101  loss 5.5000  grad 2  took 6 s  eta 10m00s at this pace (the first step is slow)",
        "step 10/101  loss 5.0000  eta 3m02s",  # 9 steps in 18 s
    ]


def test_eta_leaves_out_the_start_up_as_soon_as_it_can():
    clock = FakeClock()
    eta = Eta(100, clock)
    assert math.isnan(eta.update(0))
    clock.now += 60.0  # compilation
    assert eta.update(10) == 540.0
    clock.now += 5.0
    assert eta.update(20) == pytest.approx(40.0)
    clock.now += 40.0
    assert eta.update(100) == 0.0


def test_progress_in_a_log_is_sparse_and_ends_with_a_line():
    console, clock = log_file(), FakeClock()
    with progress(100, "passkey", console=console, clock=clock) as advance:
        for _ in range(50):
            clock.now += 1.0
            advance(2)
    lines = console.file.getvalue().splitlines()
    assert lines == [
        "passkey 30/100  eta 35s",
        "passkey 60/100  eta 20s",
        "passkey 90/100  eta 5s",
        "passkey 100/100  took 50s",
    ]


def test_progress_in_a_terminal():
    console = terminal()
    with progress(4, "documents", console=console) as advance:
        for _ in range(4):
            advance()
    assert "documents" in console.file.getvalue() and "4/4" in console.file.getvalue()


def test_progress_beside_the_steps_is_silent_when_it_is_short():
    console, clock = log_file(), FakeClock()
    with RunConsole(10, console=console, clock=clock) as run:
        with run.beside(100, "evaluating step 4, tokens") as advance:
            clock.now += 10.0
            advance(60)
            assert console.file.getvalue() == ""
            clock.now += 10.0
            advance(20)
            advance(20)
    assert console.file.getvalue() == "evaluating step 4, tokens 80/100  eta 5s\n"
    shown = terminal()
    with RunConsole(10, console=shown) as run:
        with run.beside(100, "evaluating step 4, tokens") as advance:
            advance(30)
        run.log(4, VALUES)
    text = shown.file.getvalue()
    assert "evaluating step 4" in text and "evaluating" not in text[text.rindex("4/10") :]


def test_table_is_aligned_and_whole():
    console = log_file()
    rows = [("tokens per step", "131,072"), ("lanes [G]", "8"), ("a/" + "long" * 20, "x")]
    print_table("Derived", rows, header=("quantity", "value"), console=console)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert lines[:2] == ["", "Derived"] and lines[2].split() == ["quantity", "value"]
    assert lines[3].startswith("tokens per step") and lines[4].startswith("lanes [G]")
    assert {len(line) for line in lines[2:]} == {len("a/" + "long" * 20) + 3 + len("131,072")}


def test_units():
    assert format_count(8_030_261_248) == "8.03 B"
    assert format_count(134_515_008) == "135 M"
    assert format_count(999_999) == "1.00 M"
    assert format_count(512) == "512"
    assert format_count(0.25) == "0.25"
    assert format_bytes(16_908_288) == "16.1 MiB"
    assert format_bytes(2**30 - 1) == "1.00 GiB"
    assert format_bytes(100) == "100 B"
    assert [format_duration(s) for s in (0.4, 59.7, 192, 18_420, 183_600, math.nan)] == [
        "0s",
        "1m00s",
        "3m12s",
        "5h07m",
        "2d03h",
        "?",
    ]
