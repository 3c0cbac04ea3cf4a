"""Runs many `infini` commands, each in a process of its own, at the price of a fork: the libraries are loaded once.

A command gets a folder to work in, a limit of time and of memory; what it printed, its exit code, its time and the
growth of its memory come back. The server is a process without threads, so that it may fork.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class Outcome:
    """What became of a command."""

    code: int
    """Exit code; negative: the signal that ended it."""
    out: str
    err: str
    seconds: float
    growth_mb: float
    """Resident memory beyond the server's own, at its peak."""
    timed_out: bool


class Server:
    """Starts the server process; `run` may be called any number of times."""

    def __init__(self) -> None:
        inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        inherited |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=inherited,
            text=True,
        )

    def run(self, folder: Path, arguments: list[str], timeout_s: float) -> Outcome:
        """`infini ARGUMENTS` in `folder`."""
        request = {"folder": str(folder), "arguments": arguments, "timeout_s": timeout_s}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the server has died"
        return Outcome(**json.loads(answer))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)


def _serve() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # nothing else may write between the answers
    # What a command needs first, so that its process does not spend seconds on it.
    for module in (
        "launch.cli",
        "pipeline.training.trainer",
        "pipeline.evaluation.evaluate",
        "pipeline.inference.generate",
    ):
        importlib.import_module(module)
    for module in ("huggingface.export_model", "huggingface.import_model", "accounting.planner", "reporting.inspect"):
        importlib.import_module(f"pipeline.{module}")
    importlib.import_module("data.preparation.prepare")
    with os.fdopen(answers, "w") as stream:
        for line in sys.stdin:
            stream.write(json.dumps(_answer(**json.loads(line))) + "\n")
            stream.flush()


def _answer(folder: str, arguments: list[str], timeout_s: float) -> dict:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        own, start = _resident_kb(), time.monotonic()
        child = os.fork()
        if child == 0:
            _command(folder, arguments, out.fileno(), err.fileno())
        status, usage, timed_out = _wait(child, start + timeout_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what the command has started
        return {
            "code": os.waitstatus_to_exitcode(status),
            "out": _text(out),
            "err": _text(err),
            "seconds": time.monotonic() - start,
            "growth_mb": (usage.ru_maxrss - own) / 1024,
            "timed_out": timed_out,
        }


def _command(folder: str, arguments: list[str], out: int, err: int) -> None:
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
        os.chdir(folder)
        from launch.cli import main

        code = main(arguments)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, deadline: float) -> tuple[int, object, bool]:
    while time.monotonic() < deadline:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            return status, usage, False
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    return status, usage, True


def _text(file) -> str:
    file.seek(0)
    return file.read(1 << 20).decode("utf-8", errors="replace")


def _resident_kb() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


if __name__ == "__main__":
    _serve()
