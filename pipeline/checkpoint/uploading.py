"""Copies of a run's checkpoints in an object store, made behind the training from what is whole on the disk.

A store cannot rename. So a copy counts once its `checkpoint.json` is there, which is uploaded last, after every process
has said that its files have arrived; `latest` follows. A copy that is made again, or removed, loses `checkpoint.json`
first. What fails leaves the checkpoint on the disk, and is tried again with the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from data.files import Place, StorePath, read_bytes, shown, write_whole
from pipeline.checkpoint.folder import (
    LATEST,
    SUMMARY,
    CheckpointError,
    checkpoint_folders,
    checkpoint_step,
    is_content,
    read_latest,
    read_summary,
    superfluous,
    whole_checkpoints,
)
from pipeline.checkpoint.schema import Summary
from pipeline.config.load import ConfigError
from pipeline.config.schema import Config

Value = TypeVar("Value")

CONFIG = "config.yaml"
"""A run's configuration, in its folder and in its store, where it makes a run of the copies."""


def checkpoints_in(store: str) -> StorePath:
    """The folder of the checkpoints of a run whose `checkpoint.store` this is."""
    return StorePath(store) / "checkpoints"


def folders_of(config: Config) -> list[Place]:
    """Where a run's checkpoints are, the folder to prefer first."""
    own: list[Place] = [Path(config.run_dir) / "checkpoints"]
    return own if config.checkpoint.store is None else [*own, checkpoints_in(config.checkpoint.store)]


def check_new_store(store: str) -> None:
    """Raises: ConfigError: a new run would overwrite the checkpoints of another one."""
    if found := whole_checkpoints(checkpoints_in(store)):
        raise ConfigError(
            [
                f"checkpoint.store: {store} holds checkpoints already ({found[-1].name}, ...); go on with --resume, or "
                "choose another name or store"
            ]
        )


@dataclass
class UploadReport:
    """How the copying after a save ended; the same on all processes except for the time."""

    names: list[str] = field(default_factory=list)
    """Checkpoints that are in the store now."""
    error: str | None = None
    notes: list[str] = field(default_factory=list)
    """What was left alone while older copies were removed; on rank 0."""
    seconds: float = 0.0


class Uploader:
    """Keeps in a store what `keep` and `keep_every` hold of a run's checkpoints, and the configuration and tokenizer
    beside them. All processes make one together.

    Args:
        folder: `checkpoints` of the run, on a disk that all processes see.
        store: the same in the store.
        keep, keep_every: see `CheckpointSaver`.
        group: of the threads that call it.
        confirm: called on rank 0 before anything there is changed, and before a copy counts; raises OSError or
            ValueError where the store is not this run's.
    """

    def __init__(
        self,
        folder: Path,
        store: StorePath,
        *,
        keep: int,
        keep_every: int,
        group: dist.ProcessGroup,
        confirm: Callable[[], None],
    ) -> None:
        self.folder, self.store = folder, store
        self.keep, self.keep_every = keep, keep_every
        self._group, self._confirm = group, confirm
        self._there: dict[str, str | None] = {}
        """Of checkpoints in the store, by name: the hash of `checkpoint.json`, None where nobody knows; on rank 0."""
        self._noted: set[StorePath] = set()
        self._has_companions = False

    def upload(self) -> UploadReport:
        """Bring what the store lacks there, newest first, and remove what it need not keep; collective."""
        start = time.perf_counter()
        report = UploadReport()
        missing, report.error = self._from_rank_zero(lambda: self._missing(report.notes))
        for name, summary in missing or ():
            report.error = self._upload_checkpoint(name, summary)
            if report.error is not None:
                break
            report.names.append(name)
        if report.error is None:
            notes, report.error = self._from_rank_zero(self._tidy)
            report.notes += notes or []
        report.seconds = time.perf_counter() - start
        return report

    def _upload_checkpoint(self, name: str, summary: Summary) -> str | None:
        """Copy one; what went wrong. Collective."""
        stems = sorted({file.rpartition(".")[0] for file in summary.files})
        # As the processes wrote them: a node's disk cache has its own.
        own = stems[dist.get_rank() :: dist.get_world_size()]
        _, error = _attempt(lambda: self._upload_files(name, own))
        errors: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error, group=self._group)
        first = next((error for error in errors if error), None)
        return first or self._from_rank_zero(lambda: self._finish(name, summary))[1]

    def _missing(self, notes: list[str]) -> list[tuple[str, Summary]]:
        """The checkpoints that should be in the store and are not, newest first."""
        self._confirm()
        here = whole_checkpoints(self.folder)
        newest, _ = read_latest(self.folder)
        last = checkpoint_step(self.folder / newest) if newest else -1
        # What a run that went back has left aside is not worth the way.
        wanted = [path for path in here if checkpoint_step(path) <= last]
        gone = superfluous(wanted, last, keep=self.keep, keep_every=self.keep_every)
        there = {path.name for path in whole_checkpoints(self.store)}
        self._there = {name: self._there.get(name) for name in there}
        missing = []
        for path in reversed([path for path in wanted if path not in gone]):
            try:
                summary = read_summary(path)
            except CheckpointError as error:
                notes.append(f"not uploaded: {error}")
                continue
            if path.name in there and self._there[path.name] is None:
                self._there[path.name] = self._hash_there(path.name)
            if self._there.get(path.name) == summary.sha256:
                continue
            if path.name in there:  # the same step of what the run has given up
                (self.store / path.name / SUMMARY).remove()
                del self._there[path.name]
            missing.append((path.name, summary))
        return missing

    def _hash_there(self, name: str) -> str | None:
        try:
            return read_summary(self.store / name).sha256
        except CheckpointError:
            return None

    def _upload_files(self, name: str, stems: Sequence[str]) -> None:
        for stem in stems:
            for kind in ("safetensors", "json"):
                (self.store / name / f"{stem}.{kind}").upload(self.folder / name / f"{stem}.{kind}")

    def _finish(self, name: str, summary: Summary) -> None:
        """All files of a checkpoint are there: it counts from here on."""
        self._confirm()
        write_whole(self.store / name / SUMMARY, read_bytes(self.folder / name / SUMMARY))
        self._there[name] = summary.sha256

    def _tidy(self) -> list[str]:
        """Point to the newest checkpoint, and remove what need not stay; what was left alone."""
        notes: list[str] = []
        newest, _ = read_latest(self.folder)
        if newest not in self._there:
            return notes
        if not self._has_companions:
            self._upload_companions()
        if read_latest(self.store)[0] != newest:
            write_whole(self.store / LATEST, newest + "\n")
        folders = checkpoint_folders(self.store)
        whole = [path for path in folders if path.name in self._there]
        last = checkpoint_step(self.store / newest)
        for path in superfluous(whole, last, keep=self.keep, keep_every=self.keep_every):
            del self._there[path.name]
        for path in folders:  # with the left-overs of uploads that were cut short
            if path.name not in self._there:
                notes += self._remove(path)
        return notes

    def _upload_companions(self) -> None:
        """What readers of checkpoints look for in the folder above them; it stays as it is while a run goes on."""
        run, there = self.folder.parent, self.store.parent
        names = [CONFIG, *(f"tokenizer/{path.name}" for path in sorted((run / "tokenizer").glob("*.json")))]
        for name in names:
            if (run / name).is_file():
                (there / name).upload(run / name)
        self._has_companions = True

    def _remove(self, checkpoint: StorePath) -> list[str]:
        names = checkpoint.sizes()
        if others := [name for name, size in names.items() if size is None or not is_content(name)]:
            if checkpoint in self._noted:
                return []
            self._noted.add(checkpoint)
            return [f"{checkpoint} is not removed: {shown(others[0])} in it was not put there by a save"]
        for name in sorted(names, key=lambda name: name != SUMMARY):
            (checkpoint / name).remove()
        return []

    def _from_rank_zero(self, action: Callable[[], Value]) -> tuple[Value | None, str | None]:
        """What `action` gives on rank 0, or why it does not; collective."""
        box = [_attempt(action) if dist.get_rank() == 0 else (None, None)]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


def _attempt(action: Callable[[], Value]) -> tuple[Value | None, str | None]:
    """What `action` gives, or the reason where disk or store would not have it."""
    try:
        return action(), None
    except (OSError, ValueError) as error:
        return None, f"rank {dist.get_rank()}: {error}"
