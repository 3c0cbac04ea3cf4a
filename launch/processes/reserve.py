"""Ranks that the layout cannot use now: they wait, and are started again with the others when a node is lost.

`tensor` and `pipeline` stay as configured; the data-parallel size is the largest that the lanes can be shared out over.
Training on is worth more than waiting for a number of nodes that fits, and the others are there at once when one is
lost.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from launch.processes.worker import NOT_NEEDED
from pipeline.config.layout import usable_processes
from pipeline.config.schema import Config
from pipeline.training.elastic import ACTIVE, CLAIM_FOLDER, tell_launcher, this_attempt
from pipeline.training.regroup import told_idle
from pipeline.training.stopping import PASSED_ON

LOOK_S = 0.5


def is_in_reserve(config: Config, world_size: int) -> bool:
    """Whether this rank is one too many. Makes the others a world of their own; does nothing where the number of nodes
    is fixed."""
    if this_attempt() is None:
        return False
    env = os.environ
    usable = usable_processes(config, world_size)
    tell_launcher(ACTIVE, str(usable))
    if int(env["RANK"]) >= usable:
        return True
    if usable < world_size and env["RANK"] == "0":
        print(f"infini: {told_idle(config, world_size, usable)}", file=sys.stderr, flush=True)
    first_here = int(env["RANK"]) - int(env["LOCAL_RANK"])
    env["WORLD_SIZE"] = str(usable)
    env["LOCAL_WORLD_SIZE"] = str(min(int(env["LOCAL_WORLD_SIZE"]), usable - first_here))
    return False


def wait_in_reserve() -> int:
    """Wait until the launcher says that this rank may leave, or is gone; returns the exit code."""
    for number in PASSED_ON:  # meant for those that train
        signal.signal(number, signal.SIG_IGN)
    mark, launcher = Path(os.environ[CLAIM_FOLDER], NOT_NEEDED), os.getppid()
    while not mark.exists() and os.getppid() == launcher:
        time.sleep(LOOK_S)
    return 0
