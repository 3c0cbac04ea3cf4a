"""The command line of the generation: what reaches the processes, and what is refused before any of them starts."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from launch import agent, cli, generate
from launch.bench_generate import report
from pipeline.bench_generate import GenerationCosts


@pytest.fixture
def launched(monkeypatch):
    """Calls of launch_workers, which starts nothing; without a launcher, and with what a test sets taken back."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    calls = []
    monkeypatch.setattr(agent, "launch_workers", lambda *arguments: calls.append(arguments) or 0)
    return calls


def test_the_ranks_get_the_same_arguments(launched, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("It was")
    asked = [
        "generate",
        "runs/demo",
        "parallel.tensor=2",
        "--prompt=-- and then",
        "--prompt",
        "x\ny",
        "--file",
        str(book),
    ]
    asked += ["--stop=\n", "--temperature", "0.7", "--top-k", "5", "--top-p", "0.9", "--seed", "3"]
    asked += ["--raw", "--max-new-tokens", "9", "--save-memory", "m", "--tokenizer", "t"]
    assert cli.main([*asked, "--nproc", "2", "--master-port", "4321"]) == 0
    ((module, arguments, nproc, port),) = launched
    assert (module, nproc, port) == ("launch.cli", 2, 4321)
    expected, found = vars(cli.parse(asked)), vars(cli.parse(arguments))
    assert found == expected
    assert found["prompt"] == ["-- and then", "x\ny"] and found["overrides"] == ["parallel.tensor=2"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to read: give --prompt or --file"),
        (["--file", "/nowhere/book.txt"], "there is no file /nowhere/book.txt"),
        (["--prompt", "x", "--load-memory", "/nowhere/m"], "there is no file /nowhere/m"),
        (["--prompt", "x", "--save-memory", "/"], "--save-memory / is a folder"),
        (["--prompt", "x", "--save-memory", "/dev/null/m"], "cannot be written: /dev/null is no folder"),
        (["--prompt", "x", "--max-new-tokens", "0"], "or 0 to only read (with --save-memory)"),
        (["--prompt", "x", "--nproc", "0"], "--nproc 0"),
        (["--prompt", "x", "--temperature", "-1"], "temperature -1.0: must be at least 0"),
        (["--prompt", "x", "--top-p", "0"], "top-p 0.0"),
        (["--prompt", "x"], "/nowhere/run: no checkpoint here"),
    ],
)
def test_what_cannot_be_done_is_refused(launched, capfd, arguments, message):
    assert cli.main(["generate", "/nowhere/run", *arguments]) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not launched


TITLE = "a\tb\n\x1b]0;owned\x07 \x9b2J \u202e end\r"


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize(
    ("terminal", "options", "expected"),
    [
        (True, [], "a\tb\n\\x1b]0;owned\\x07 \\x9b2J \\u202e end\\r"),
        (True, ["--raw"], TITLE),
        (False, [], TITLE),
    ],
)
def test_generated_text_does_not_command_a_terminal(monkeypatch, lanes, terminal, options, expected):
    """Neither when it comes piece by piece (one prompt) nor when it comes as a whole."""

    class Model:
        def complete(self, state, on_text=None, **_):
            for piece in TITLE if on_text else ():
                on_text(0, piece)
            return [SimpleNamespace(text=TITLE, tokens=[1], ended_by="eos") for _ in range(state.lanes)]

    written = io.StringIO()
    written.isatty = lambda: terminal
    monkeypatch.setattr("sys.stdout", written)
    monkeypatch.setenv("RANK", "0")
    args = cli.parse(["generate", "runs/demo", "--prompt", "x", *options])
    generate._complete(Model(), SimpleNamespace(lanes=lanes), None, args)
    heads = ("", "\n") if lanes == 1 else ("== prompt 1 (eos)\n", f"\n== prompt 2 (eos)\n{expected}\n")
    assert written.getvalue() == heads[0] + expected + heads[1]


def test_the_note_has_a_row_per_prompt():
    class Note:
        def text(self, text):
            self.said = text

        def table(self, header, rows):
            self.rows = rows

    note = Note()
    measured = {"parameters": 100, "segment_length": 64, "read_cpu_s": 0.5, "new_tokens": 8, "new_token_s": 0.008}
    measured |= {"new_token_cpu_s": 0.004, "rss_before_bytes": 300 << 20, "rss_peak_bytes": 310 << 20}
    costs = [GenerationCosts(tokens, read_s=1.0, memory_file_bytes=2048, **measured) for tokens in (1024, 2048)]
    report(costs, note)
    assert note.rows[0] == ["1,024", "1.0", "0.5", "2,048", "8.0", "4.0", "250", "300", "310", "2"]
    assert note.rows[1][:4] == ["2,048", "1.0", "0.5", "4,096"]
