"""The table of exit codes in the documentation is that of the code."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli
from launch.commands import inspect
from launch.processes import worker
from pipeline.training import stopping

DOCUMENT = Path(__file__).parents[2] / "docs" / "command_line.md"


def documented() -> dict[str, str]:
    section = DOCUMENT.read_text().split("## Exit codes")[1]
    return dict(re.findall(r"^\| ([0-9n+ ]+) \| ([^|]+)", section, re.M))


def test_every_code_of_the_program_is_in_the_table():
    known = {0, 1, cli.USER_ERROR, inspect.DAMAGED, worker.FOLLOWED, worker.INTERRUPTED, cli.READER_GONE}
    known |= {stopping.STOPPED}
    assert {int(code) for code in documented() if code.isdigit()} == known
    assert "128 + n" in documented()


def test_no_other_code_is_left_with():
    numbers = set()
    for path in [*Path(cli.__file__).parent.rglob("*.py"), *DOCUMENT.parents[1].glob("pipeline/**/*.py")]:
        numbers |= {int(n) for n in re.findall(r"(?:_exit|sys\.exit|_leave)\((\d+)\)", path.read_text())}
    assert numbers <= {int(code) for code in documented() if code.isdigit()}


@pytest.mark.parametrize("command", [["config"], ["config", "--help-keys"]])
def test_a_reader_that_goes_is_no_error(command):
    program = "import sys; from launch.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (128 + signal.SIGPIPE, "")
