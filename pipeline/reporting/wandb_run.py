"""Weights & Biases beside TensorBoard: one run there for all starts of a run here.

Names are those of `metrics.jsonl`. Curves go by the metric `step`, not by W&B's own counter of calls, which refuses to
go back: steps that a resumed run takes again are drawn over the ones before.
"""

from __future__ import annotations

import logging
import secrets
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.files import FileError, read_text, write_whole
from pipeline.config.schema import WandbConfig
from pipeline.reporting.dashboard import flatten

logger = logging.getLogger(__name__)

RUN_ID_FILE = "wandb_run_id"
_ALPHABET = string.ascii_lowercase + string.digits


def run_id(run_dir: Path) -> str:
    """The id of this run at W&B, which its folder keeps; a new one where there is none yet.

    Raises:
        ValueError: the file holds something else.
    """
    path = run_dir / RUN_ID_FILE
    try:
        found = read_text(path, 200).strip()
    except FileNotFoundError:
        found = "".join(secrets.choice(_ALPHABET) for _ in range(8))
        write_whole(path, found + "\n")
    except FileError as error:
        raise ValueError(str(error)) from error
    if not found or not set(found) <= set(_ALPHABET):
        raise ValueError(f"{path} holds no run id of W&B (letters and digits): restore it, or remove it for a new run")
    return found


class WandbRun:
    """A run at W&B.

    Args:
        config: with a project.
        run_dir: folder of the run; `wandb/` in it is W&B's.
        name: what the run is called.

    Raises:
        ValueError: W&B cannot be started; says what to do.
    """

    def __init__(self, config: WandbConfig, run_dir: Path, name: str) -> None:
        import wandb

        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                group=config.group,
                name=name,
                id=run_id(run_dir),
                resume="allow",
                mode=config.mode,
                dir=str(run_dir),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"metrics.wandb: W&B cannot be started ({error}): `wandb login` once, or metrics.wandb.mode=offline, "
                "or no metrics.wandb.project"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """One point of each curve."""
        self._log(step, dict(numbers))

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """The distribution of finite values, not empty."""
        self._log(step, {name: self._wandb.Histogram(values.tolist())})

    def binned_histogram(self, step: int, name: str, counts: np.ndarray, edges: np.ndarray) -> None:
        """The same of counts per bin."""
        self._log(step, {name: self._wandb.Histogram(np_histogram=(counts, edges))})

    def image(self, step: int, name: str, image: str | Path | np.ndarray) -> None:
        """A PNG file or an array `[height, width, 3]`."""
        self._log(step, {name: self._wandb.Image(image if isinstance(image, np.ndarray) else str(image))})

    def text(self, step: int, name: str, text: str) -> None:
        """Markdown, in the run's summary."""
        self._run.summary[name] = text

    def settings(self, step: int, settings: Mapping[str, Any], text: str) -> None:
        """The configuration. A resumed run may change some of it."""
        self._run.config.update(flatten(settings), allow_val_change=True)

    def flush(self) -> None:
        """W&B writes as it is told."""

    def close(self) -> None:
        self._run.finish()

    def _log(self, step: int, values: dict[str, Any]) -> None:
        try:
            self._run.log({"step": step, **values})
        except self._wandb.errors.Error as error:
            logger.warning("W&B has not taken step %d: %s", step, error)
