"""What a run does about a changing number of nodes: who trains, when to start again on more nodes, what that cost."""

from __future__ import annotations

import time

from pipeline.config import derived
from pipeline.config.layout import usable_processes
from pipeline.config.schema import Config
from pipeline.training.elastic import NODES, Attempt, launcher_folder, told_by_ranks


def check_least(config: Config, attempt: Attempt, processes_per_node: int) -> None:
    """Raises: ValueError: the least number of nodes cannot hold one copy of the model."""
    size = derived.processes_per_lane(config)
    if attempt.min_nodes * processes_per_node < size:
        raise ValueError(
            f"NNODES={attempt.min_nodes}:{attempt.max_nodes}: {attempt.min_nodes} node(s) of {processes_per_node} "
            f"process(es) cannot hold {derived.told_per_lane(config)}: the least number of nodes must be "
            f"{-(-size // processes_per_node)}"
        )


def told_idle(config: Config, world_size: int, usable: int) -> str:
    """What is to be said of processes that have nothing to do."""
    size = derived.processes_per_lane(config)
    return (
        f"{world_size - usable} of {world_size} processes wait: {size} for {derived.told_per_lane(config)} and "
        f"train.lanes = {config.train.lanes} make {usable // size} data-parallel rank(s) of them at the most; the "
        "others step in when a node is lost"
    )


class Regroup:
    """Whether the run should be started again on more nodes; asked at every step boundary, on the main process."""

    def __init__(self, config: Config, world_size: int) -> None:
        self.config, self.world_size = config, world_size
        self.known = 0

    def wanted(self) -> tuple[bool, str | None]:
        """True when nodes wait with which more ranks could train; and what is to be said, once for each such number."""
        folder = launcher_folder()
        text = told_by_ranks(folder, NODES) if folder is not None else None
        if text is None:
            return False, None
        nodes, processes = map(int, text.split())
        news, self.known = nodes != self.known, nodes
        usable = usable_processes(self.config, processes)
        if usable > self.world_size:
            return (
                True,
                f"{nodes} nodes are there: saved, to go on with {usable} processes in place of {self.world_size}",
            )
        told = f"{nodes} nodes are there, but {processes} processes could not be used better: {usable} train"
        return False, told if news else None


def recovery(attempt: Attempt, *, start_step: int, start_tokens: int, data_size: int) -> tuple[str, dict[str, float]]:
    """After the first step of an attempt that is not the first one: what is to be said, and numbers for the metrics.

    Args:
        start_step, start_tokens: where this attempt began.
    """
    values = {"recovery/attempt": attempt.number, "recovery/data_parallel_size": data_size}
    if attempt.before is None:
        return f"{attempt}: how far the one before had come is not known", values
    steps = max(attempt.before.step - start_step, 0)
    tokens = max(attempt.before.tokens - start_tokens, 0)
    seconds = time.time() - attempt.before.time
    values |= {
        "recovery/seconds": seconds,
        "recovery/steps_recomputed": steps,
        "recovery/tokens_recomputed": tokens,
    }
    return (
        f"recovered ({attempt}): {seconds:.1f} s from step {attempt.before.step}, the last one before, to step "
        f"{start_step + 1}, the first one after; {steps} steps ({tokens:,} tokens) computed again; data-parallel size "
        f"{data_size}"
    ), values
