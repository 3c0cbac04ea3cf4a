"""The configuration of an evaluation or a generation: the run's, but for the layout. Light: a launcher checks it
before any rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data.files import Place
from model.config import same_function
from pipeline.config.derived import processes_per_lane, told_per_lane
from pipeline.config.load import ConfigError, load_config, stored_config
from pipeline.config.schema import Config
from pipeline.config.validate import validate

OWN_LAYOUT = [
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "parallel.context=1",
    "parallel.layers_per_stage=null",
    "parallel.sequence_parallel=false",
    "bptt.chunks_per_window=1",
    "parallel.zero_stage=1",
    "resilience.hang_timeout_s=0",
    "model.backend=local",
    "model.compile=false",
    "model.packed_attention=auto",
    "model.memory.kernel=auto",
]
"""What an evaluation does not take from the run: a checkpoint can be read on any layout and any machine, and nothing
watches."""


def evaluation_config(run_dir: Place, overrides: Sequence[str], world_size: int) -> Config:
    """The run's configuration with the layout of an evaluation on `world_size` processes.

    Raises:
        ConfigError: it cannot run so.
        OSError: the folder holds no run.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} is not a run folder: there is no {path.name}")
    config = load_config(path, [*OWN_LAYOUT, *overrides], own=False)
    _check_layout(config, world_size, str(path), overrides)
    return config


def generation_config(
    saved: dict[str, Any],
    overrides: Sequence[str],
    world_size: int,
    where: str = "checkpoint",
    *,
    copies: bool = False,
) -> Config:
    """The configuration that a checkpoint was written with, with the layout of a generation on `world_size` processes.

    Args:
        saved: `config` of the checkpoint's summary.
        where: the checkpoint, for messages.
        copies: there may be several copies of the model, each with texts of its own.

    Raises:
        ConfigError: it cannot run so, needs data parallelism, or would be another model.
    """
    config = stored_config(saved, [*OWN_LAYOUT, *overrides], where)
    problems = []
    if same_function(config.model) != same_function(stored_config(saved, [], where).model):
        problems.append("settings under model belong to the checkpoint: generation cannot change them")
    if config.parallel.sequence_parallel:
        problems.append(
            "parallel.sequence_parallel = True: it splits segments over the ranks, but generation goes on token by "
            "token: leave it out"
        )
    if config.parallel.context > 1:
        problems.append(
            f"parallel.context = {config.parallel.context}: it splits what is read over the ranks, but generation goes "
            "on token by token: leave it out, tensor and pipeline share the model"
        )
    elif world_size > processes_per_lane(config) and not copies:
        problems.append(
            f"{told_per_lane(config)} on {world_size} processes: generation has no data parallelism, their product "
            "must be the number of processes"
        )
    if problems:
        raise ConfigError(problems)
    _check_layout(config, world_size, where, overrides)
    return config


def _check_layout(config: Config, world_size: int, file: str, overrides: Sequence[str]) -> None:
    size = processes_per_lane(config)
    if world_size % size:
        raise ConfigError(
            [
                f"{told_per_lane(config)} on {world_size} process(es): their number must be a multiple of {size}, such "
                f"as --nproc {size}"
            ]
        )
    # Data-parallel ranks share documents, not the run's lanes.
    validate(config, size, data_exists=False, file=file, overrides=overrides)
