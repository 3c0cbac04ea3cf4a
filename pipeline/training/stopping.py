"""How a run is asked to stop, from its first line to its last, and what it answers.

A signal that comes while it is still starting is kept, and one that comes when it has ended kills nothing.

A rank comes to the world with its signals blocked (`launch.processes.agent`), so that none can arrive before `record`.
From then on they are remembered until `pipeline.training.resilience.StopRequest` heeds them. Nothing heavy is imported
here: it is the first thing that a rank does.
"""

from __future__ import annotations

import signal
import threading

from pipeline.config.schema import STOP_SIGNALS

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends a process that has no handler."""
STOPPING = (signal.SIGTERM, *(signal.Signals[f"SIG{name}"] for name in STOP_SIGNALS))
"""What may ask a run to save and leave, besides an interrupt."""
PASSED_ON = (*dict.fromkeys((*ENDING, *STOPPING)),)
"""What a launcher hands to its ranks, and blocks in them until they are ready for it."""
ECHO_S = 1.0
"""An interrupt within this time of one before is its echo: a terminal sends it to a whole group of processes, Slurm to
all of a step, and the launcher passes it on. Only a later one means 'now'."""

STOPPED = 85
"""Exit code of a run that was told to stop: it has saved, is not finished, and goes on with --resume. HTCondor's
manual uses it for 'checkpointed, start me again'."""
STOP_FILE = "INFINI_STOP_FILE"
"""Environment variable with the path of a second stop file, which belongs to the launcher: a batch script makes it
beside sending a signal, for ranks that had no process yet when that came."""
JOB_FOLDER = "INFINI_JOB_FOLDER"
"""Environment variable with a folder of the batch job's, in which it finds what the run has come to."""
JOB_SAVED, JOB_STOPPED = "saved", "stopped"
"""Files there: the step of the newest checkpoint; why the run was told to stop."""

_recorded: list[signal.Signals] = []


def unblock() -> None:
    """Let the signals in that the launcher has blocked in this process."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)


def record() -> None:
    """Remember from now on what asks to stop; what is ignored stays ignored (as `nohup` wants it)."""
    if threading.current_thread() is not threading.main_thread():
        return  # Python has signals handled by the main thread alone
    for number in STOPPING:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _record)
    unblock()


def _record(number: int, frame: object) -> None:
    _recorded.append(signal.Signals(number))


def recorded() -> list[signal.Signals]:
    """What has come so far, the first one first."""
    return list(_recorded)


def release(heeded: set[signal.Signals]) -> None:
    """Somebody heeds these signals now: the others mean again what they meant, also those that came meanwhile."""
    for number in STOPPING:
        if number not in heeded and signal.getsignal(number) == _record:
            signal.signal(number, signal.SIG_DFL)
            if number in _recorded:
                signal.raise_signal(number)


def forget() -> None:
    """Nobody asks any more: what was recorded is dropped, and signals mean again what they meant."""
    for number in STOPPING:
        if signal.getsignal(number) == _record:
            signal.signal(number, signal.SIG_DFL)
    _recorded.clear()


def ignore() -> None:
    """The work is done and saved: what asks to stop comes too late, and must not make a failure of it."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
