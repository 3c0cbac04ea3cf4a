"""A run as one of its processes: it joins the others, holds the locks, and trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from model.device import keep_freed_memory
from pipeline.config.schema import Config
from pipeline.parallel.topology import Topology, initialize, shutdown
from pipeline.training import stopping
from pipeline.training.elastic import REGROUP
from pipeline.training.same_start import check_clocks, check_same_start, check_shared_folder
from pipeline.training.starting import holding
from pipeline.training.trainer import Trainer


def train(config: Config, resume: str | None) -> int:
    """Train as one of the processes of a run; returns the exit code: 0, or `stopping.STOPPED` before everything is
    done, or `REGROUP` where more nodes are there.

    Args:
        config: validated configuration.
        resume: None for a new run, `latest`, or the path of a checkpoint.
    """
    topology = enter(config)
    check_shared_folder(Path(config.run_dir), topology)
    with holding(config) as confirm_store:
        return _train(config, topology, resume, confirm_store)


def enter(config: Config) -> Topology:
    """Become one of the processes of a run, which are all started alike; collective."""
    topology = initialize(
        tensor=config.parallel.tensor,
        pipeline=config.parallel.pipeline,
        context=config.parallel.context,
        timeout_s=config.parallel.timeout_s,
        greet=lambda: check_same_start(config),
    )
    check_clocks(topology)
    return topology


def _train(config: Config, topology: Topology, resume: str | None, confirm_store: Callable[[], None]) -> int:
    keep_freed_memory(topology.device)
    trainer = Trainer(config, topology, confirm_store)
    trainer.watchdog.start()
    trainer.start(resume)
    trainer.train()
    trainer.close()
    stopping.ignore()
    trainer.watchdog.stop()
    shutdown()
    if trainer.is_done:
        return 0
    return REGROUP if trainer.regrouping else stopping.STOPPED
