"""The command line of the generation: what reaches the processes, and what is refused before any of them starts."""

from __future__ import annotations

import pytest

from launch import cli
from launch.commands.bench_generate import report
from launch.processes import agent
from launch.processes.world import VARIABLES
from pipeline.benchmarks.generate import GenerationCosts


@pytest.fixture
def launched(monkeypatch):
    """Calls of launch_workers, which starts nothing; without a launcher, and with what a test sets taken back."""
    for name in VARIABLES:
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
        (["--prompt", "x", "--save-memory", __file__], f"--save-memory {__file__} exists already"),
        (["Who came first?"], "'Who came first?' is no setting (key=value); a text to go on from is given as --prompt"),
        (["--prompt", "x", "--max-new-tokens", "0"], "or 0 to only read (with --save-memory)"),
        (["--prompt", "x", "--file", "a", "--file", "b"], "2 times --file beside --prompt"),
        (["--prompt", "x", "--stop", ""], "--stop is empty"),
        (["--prompt", "x", "--top-k", "5"], "top-k 5 chooses what is drawn from, but temperature 0 draws nothing"),
        (["--prompt", "x", "--top-p", "0.9"], "top-p 0.9 chooses what is drawn from, but temperature 0"),
        (["--prompt", "x"], "/nowhere/run: no checkpoint here"),
    ],
)
def test_what_cannot_be_done_is_refused(launched, capfd, arguments, message):
    assert cli.main(["generate", "/nowhere/run", *arguments]) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not launched


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--temperature", "-1", "valid is 0 to 1e+06"),
        ("--temperature", "inf", "valid is 0 to 1e+06"),
        ("--temperature", "nan", "valid is 0 to 1e+06"),
        ("--temperature", "warm", "'warm' is no number"),
        ("--top-p", "0", "valid is above 0 to 1"),
        ("--top-p", "1.1", "valid is above 0 to 1"),
        ("--top-k", "0", "must be at least 1, not 0"),
        ("--seed", str(2**64), "must be at most 9,223,372,036,854,775,807"),
        ("--seed", "-1", "must be at least 0, not -1"),
        ("--max-new-tokens", "-1", "must be at least 0, not -1"),
        ("--max-new-tokens", "9" * 30, "must be at most 2,147,483,648"),
        ("--max-new-tokens", "1e3", "'1e3' is no whole number"),
        ("--nproc", "0", "must be at least 1, not 0"),
        ("--nproc", "1000000", "must be at most 4,096"),
        ("--master-port", "65536", "must be at most 65,535"),
    ],
)
def test_numbers_out_of_range_are_refused(capsys, option, value, message):
    with pytest.raises(SystemExit) as left:
        cli.main(["generate", "/nowhere/run", "--prompt", "x", f"{option}={value}"])
    assert left.value.code == 2
    assert f"argument {option}: " in (error := capsys.readouterr().err) and message in error


class FakeGenerator:
    """Notes what is read after what."""

    def __init__(self):
        self.read_calls = []
        self.saved = []

    def read(self, prompts, after=None, *, on_read=None):
        self.read_calls.append(list(prompts))
        before = [()] if after is None else after.texts
        lanes = before * len(prompts) if len(before) == 1 else before
        return FakeState([(*lane, prompt) for lane, prompt in zip(lanes, prompts, strict=True)])

    def load(self, path):
        return FakeState([("kept",)])

    def save(self, state, path):
        self.saved.append(state.texts)

    def complete(self, state, **options):
        self.completed = state.texts
        return []


class FakeState:
    def __init__(self, texts):
        self.texts, self.lanes = texts, len(texts)
        self.tokens_read = [10 * len(text) for text in texts]


@pytest.mark.parametrize(
    "arguments, lanes, tokens",
    [
        (["--prompt", "Who?", "--prompt", "When?"], [("Who?",), ("When?",)], 20),
        (["--file", "BOOK", "--file", "BOOK"], [("BOOK",), ("BOOK",)], 20),
        (["--file", "BOOK", "--prompt", "Who?"], [("BOOK", "Who?")], 20),
        (["--prompt", "Who?", "--file", "BOOK", "--prompt", "When?"], [("BOOK", "Who?"), ("BOOK", "When?")], 30),
        (["--load-memory", "BOOK", "--prompt", "Who?"], [("kept", "Who?")], 10),
        (["--load-memory", "BOOK", "--file", "BOOK", "--prompt", "a", "--prompt", "b"], None, 30),
    ],
)
def test_a_prompt_goes_on_after_the_file(launched, monkeypatch, tmp_path, capsys, arguments, lanes, tokens):
    from pipeline.inference.generate import Generator

    book = tmp_path / "book.txt"
    book.write_text("It was")
    fake = FakeGenerator()
    monkeypatch.setattr(Generator, "open", lambda *arguments, **options: fake)
    named = [str(book) if argument == "BOOK" else argument for argument in arguments]
    assert cli.main(["generate", "run", *named, "--save-memory", str(tmp_path / "m")]) == 0
    lanes = lanes or [("kept", "BOOK", "a"), ("kept", "BOOK", "b")]
    assert fake.completed == [tuple(book if text == "BOOK" else text for text in lane) for lane in lanes]
    # A file's memory is kept without what was asked about it this time: it serves other questions.
    asked = "--file" in arguments and "--prompt" in arguments
    assert fake.saved == [[fake.completed[0][:-1]] if asked else fake.completed]
    assert f"read {tokens} tokens" in capsys.readouterr().err
    assert sum(len(call) for call in fake.read_calls) == tokens // 10  # the book is read once


def test_the_note_has_a_row_per_prompt():
    class Note:
        def text(self, text):
            self.said = text

        def table(self, header, rows):
            self.rows = rows

        def number(self, *number, **of):
            pass

    note = Note()
    measured = {"parameters": 100, "segment_length": 64, "read_cpu_s": 0.5, "token_s": [0.008, 0.1, 0.007]}
    measured |= {
        "token_cpu_s": [0.004, 0.004, 0.5],
        "rss_before_bytes": 300 << 20,
        "rss_peak_bytes": 310 << 20,
        "state_bytes": 4096,
    }
    costs = [GenerationCosts(tokens, read_s=1.0, memory_file_bytes=2048, **measured) for tokens in (1024, 2048)]
    report(costs, note)
    assert note.rows[0] == ["1,024", "1.0", "0.5", "2,048", "8.0", "4.0", "250", "300", "310", "2"]
    assert note.rows[1][:4] == ["2,048", "1.0", "0.5", "4,096"]
