"""Signals that come too early and too late, in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
STARTING = """
import os, pathlib, signal, sys
from pipeline.training import stopping
stopping.record()
for name in sys.argv[1:]:
    os.kill(os.getpid(), getattr(signal, name))
import torch.distributed as dist
dist.get_rank = lambda: 1
from pipeline.config.schema import ResilienceConfig
from pipeline.training.resilience import StopRequest
stop = StopRequest(ResilienceConfig(), pathlib.Path("nowhere"))
assert stop.asked is None
stop.install()
print(stop.asked, flush=True)
stop.uninstall()
os.kill(os.getpid(), signal.SIGUSR1)
stopping.ignore()
os.kill(os.getpid(), signal.SIGUSR1)
os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize(
    ("signals", "told", "code"),
    [
        (["SIGUSR1"], "signal SIGUSR1", 0),
        (["SIGTERM", "SIGTERM", "SIGUSR1"], "signal SIGTERM", 0),
        ([], "None", 0),
        (["SIGUSR2"], "", -signal.SIGUSR2),  # not the stop signal of this run: it means what it always meant
    ],
)
def test_a_signal_counts_from_the_first_line_to_the_last(signals, told, code):
    done = subprocess.run([sys.executable, "-c", STARTING, *signals], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (code, told), done.stderr


def test_what_is_ignored_stays_so():
    """As under nohup."""
    program = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); from pipeline.training import stopping; "
        "stopping.record(); print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)"
    )
    assert subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True) == "True\n"


def test_commands_that_do_not_heed_signals_die_of_them():
    program = (
        "import os, signal\nfrom launch import cli\n"
        "cli.parse = lambda argv: os.kill(os.getpid(), signal.SIGTERM) or real(argv)\n"
        "cli.main(['config'])\n"
    ).replace("from launch import cli\n", "from launch import cli\nreal = cli.parse\n")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, ""), done.stderr
