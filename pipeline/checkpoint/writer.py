"""Writing checkpoints: whole or absent, behind the training when asked to.

A step waits only while this process's tensors are copied to host memory. A thread then writes them and, through a
process group of its own, agrees with the other processes' threads whether all succeeded; only then does rank 0 give
the checkpoint its name and move `latest`; where the run has a store, the thread goes on to copy it there (see
`pipeline.checkpoint.uploading`). At most one save is in flight.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from data.files import Place, StorePath, sealed, shown, sync_folder, temporary_name, write_whole
from pipeline.checkpoint.folder import (
    LATEST,
    SUMMARY,
    checkpoint_folders,
    checkpoint_name,
    checkpoint_step,
    leftovers,
    others_in,
    superfluous,
)
from pipeline.checkpoint.run_state import FIELDS, HasState, HasTensors, Parts
from pipeline.checkpoint.schema import FORMAT_VERSION
from pipeline.checkpoint.tensor_file import write_tensors
from pipeline.checkpoint.uploading import Uploader, UploadReport


@dataclass
class Snapshot:
    """One process's part of a checkpoint, in host memory."""

    step: int
    numbers: dict[str, Any]
    """What `checkpoint.json` says of the parts' states."""
    lanes: dict[str, Any]
    """Cursors of this process's lanes, by global lane number."""
    tensors: dict[str, Tensor]
    entries: list[dict[str, Any]]
    """What the tensors are: see `CheckpointReader`."""
    summary: dict[str, Any]
    owns_lanes: bool


@dataclass
class SaveReport:
    """How a save ended; the same on all processes except for the times, which are this process's."""

    step: int
    path: Path
    error: str | None = None
    stall_s: float = 0.0
    """Time that the training waited: for an earlier save, and for the copy."""
    write_s: float = 0.0
    bytes: int = 0
    """Written by this process."""
    notes: list[str] = field(default_factory=list)
    """What was left alone while older checkpoints were removed; on rank 0."""
    upload: UploadReport | None = None
    """What came of the copy in the store; None where there is no store, or nothing to copy."""


def take_snapshot(parts: Parts, summary: dict[str, Any], *, owns_lanes: bool) -> Snapshot:
    """Copy what this process owns of every part of a run; collective.

    Args:
        summary: what `checkpoint.json` says besides.
        owns_lanes: no other process writes where these lanes stand.
    """
    states: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    for name, part in parts.items():
        if isinstance(part, HasState):
            state = part.state_dict()
            if state.keys() != set(FIELDS[name]):
                raise TypeError(f"{name} saves {sorted(state)}, a checkpoint has room for {sorted(FIELDS[name])}")
            states |= state
        if isinstance(part, HasTensors):
            for key, tensor, entry in part.own_tensors():
                tensors[key] = tensor
                entries += [] if entry is None else [entry]
    lanes = states.pop("lanes", {})
    numbers = {field: states[field] for fields in FIELDS.values() for field in fields if field in states}
    return Snapshot(numbers["step"], numbers, lanes, tensors, entries, summary, owns_lanes)


class CheckpointSaver:
    """Writes the checkpoints of a run. All processes make one together and call it at the same steps.

    Args:
        folder: `checkpoints` of the run.
        keep: newest checkpoints that are kept.
        keep_every: steps whose multiples are kept for good; 0 for none.
        asynchronous: write in a thread.
        timeout_s: a process that waits longer for another one's part gives up.
        store: where copies go, see `checkpoints_in`; None for nowhere.
        confirm_store: see `Uploader`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_every: int = 0,
        asynchronous: bool = False,
        timeout_s: float = 1800.0,
        store: StorePath | None = None,
        confirm_store: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.keep, self.keep_every = keep, keep_every
        self.asynchronous = asynchronous
        self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
        self._thread: threading.Thread | None = None
        self._report: SaveReport | None = None
        self._failure: BaseException | None = None
        self._noted: set[Path] = set()
        self._uploader = store and Uploader(
            folder, store, keep=keep, keep_every=keep_every, group=self.group, confirm=confirm_store
        )

    def save(self, make_snapshot) -> None:
        """Save what `make_snapshot()` returns; collective. Fetch the outcome with `finished`.

        Waits for an earlier save first. Whoever calls it asks `finished` before, or its outcome is lost.
        """
        start = time.perf_counter()
        self.wait()
        snapshot: Snapshot = make_snapshot()
        path = self.folder / checkpoint_name(snapshot.step)
        self._report = SaveReport(snapshot.step, path, stall_s=time.perf_counter() - start)
        self._failure = None
        if self.asynchronous:
            self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint-writer", daemon=True)
            self._thread.start()
            return
        self._run(snapshot)
        self._report.stall_s = time.perf_counter() - start

    def upload(self) -> UploadReport | None:
        """Copy to the store what it lacks, and wait for it; collective. None where there is no store."""
        self.wait()
        return self._uploader and self._uploader.upload()

    def close(self) -> None:
        """Wait for the save in flight and give the process group back (its threads cost time even when idle)."""
        self.wait()
        dist.destroy_process_group(self.group)

    @property
    def has_failed(self) -> bool:
        """A save has ended without a checkpoint, and nobody has fetched the report yet."""
        return self._thread_is_done() and self._report is not None and self._report.error is not None

    @property
    def has_succeeded(self) -> bool:
        """A checkpoint was written, and nobody has fetched the report yet."""
        return self._thread_is_done() and self._report is not None and self._report.error is None

    def wait(self) -> None:
        """Wait for the save in flight."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def finished(self) -> SaveReport | None:
        """The report of a save that has ended, once; None while there is none.

        Raises:
            RuntimeError: another process vanished while the parts were put together.
        """
        if not self._thread_is_done():
            return None
        self.wait()
        report, self._report = self._report, None
        return report

    def _thread_is_done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def _run(self, snapshot: Snapshot) -> None:
        start = time.perf_counter()
        try:
            self._write(snapshot)
            self._report.write_s = time.perf_counter() - start
            if self._uploader and self._report.error is None:
                self._report.upload = self._uploader.upload()
        except BaseException as failure:
            # The training thread raises it when it looks. It may never come to that, waiting for a rank that waits for
            # this thread: so the thread fails as well, and whoever watches over the process can end it.
            self._failure = failure
            raise

    def _write(self, snapshot: Snapshot) -> None:
        """Write this process's files and finish the checkpoint together with the others."""
        report = self._report
        rank = dist.get_rank()
        error, written = None, {}
        # A name that nobody can have taken before; rank 0 makes the folder, the others must write into the same one.
        temporary = _from_rank_zero(temporary_name(report.path), self.group)
        if rank == 0:
            error = _try(lambda: _make_folder(temporary), temporary)
        error = _from_rank_zero(error, self.group)
        if error is None:
            error = _try(lambda: written.update(_write_part(temporary, rank, snapshot)), temporary)
        report.bytes = sum(facts["bytes"] for facts in written.values())
        parts: list[tuple[str | None, dict[str, Any]]] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (error, written), group=self.group)
        error = next((part[0] for part in parts if part[0]), None)
        if error is None and rank == 0:
            files = {name: facts for _, part in parts for name, facts in part.items()}
            error = _try(lambda: self._finish(temporary, report, snapshot, files), temporary)
        error = _from_rank_zero(error, self.group)
        if error is not None and rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        report.error = error

    def _finish(self, temporary: Path, report: SaveReport, snapshot: Snapshot, files: dict[str, Any]) -> None:
        content = {
            "format_version": FORMAT_VERSION,
            **snapshot.numbers,
            "files": files,
            **snapshot.summary,
        }
        write_whole(temporary / SUMMARY, json.dumps(sealed(content), indent=1))
        sync_folder(temporary)
        if report.path.exists():  # the same step again, after a resume from an earlier one
            discarded = _set_aside(report.path)
            os.rename(temporary, report.path)
            self._discard(discarded)
        else:
            os.rename(temporary, report.path)
        sync_folder(self.folder)
        move_latest(report.path)
        try:
            self._prune(report.path)
        except OSError as error:  # the new checkpoint is whole: an old one that stays is no failure of this save
            report.notes.append(f"older checkpoints could not all be removed: {error}")

    def _prune(self, newest: Path) -> None:
        """Remove what `keep` and `keep_every` do not hold. Left-overs of killed saves go as well.

        Whatever has another name than a save gives is the user's and stays, a checkpoint with a file of theirs in it
        as well.
        """
        found = checkpoint_folders(self.folder)
        for old in superfluous(found, checkpoint_step(newest), keep=self.keep, keep_every=self.keep_every):
            if others := others_in(old):
                self._note(old, f"{old} is not removed: {shown(others[0])} in it was not put there by a save")
                continue
            # Renamed first: a removal that is cut short must not leave half a checkpoint under a good name.
            _set_aside(old)
        for leftover in leftovers(self.folder):
            self._discard(leftover)

    def _discard(self, folder: Path) -> None:
        """Remove a folder that saves have made, unless something else has come into it."""
        if others := others_in(folder):
            self._note(folder, f"{folder} is not removed: {shown(others[0])} in it was not put there by a save")
            return
        shutil.rmtree(folder, ignore_errors=True)

    def _note(self, folder: Path, note: str) -> None:
        """Say something of a folder, once."""
        if folder not in self._noted:
            self._noted.add(folder)
            self._report.notes.append(note)


def _set_aside(checkpoint: Path) -> Path:
    """Take a checkpoint's name from its folder; the new one."""
    aside = temporary_name(checkpoint).with_suffix(".replaced")
    os.rename(checkpoint, aside)
    return aside


def move_latest(checkpoint: Place) -> None:
    """Make the `latest` of a `checkpoints` folder name this one."""
    write_whole(checkpoint.parent / LATEST, checkpoint.name + "\n")


def _try(action: Callable[[], object], folder: Path) -> str | None:
    """Run `action`; the reason when the disk would not have it."""
    try:
        action()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = ": make room there, or keep fewer checkpoints (checkpoint.keep, checkpoint.keep_every)" if full else ""
        return f"rank {dist.get_rank()} could not write the checkpoint in {folder}: {error}{remedy}"
    return None


def _make_folder(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir()


def _write_part(folder: Path, rank: int, snapshot: Snapshot) -> dict[str, Any]:
    """Write one process's two files; their sizes and hashes by name."""
    tensors, index = f"rank_{rank:05d}.safetensors", f"rank_{rank:05d}.json"
    lanes = snapshot.lanes if snapshot.owns_lanes else {}
    text = json.dumps({"tensors": snapshot.entries, "lanes": lanes}).encode()
    facts = {tensors: write_tensors(folder / tensors, snapshot.tensors)}
    write_whole(folder / index, text)
    return facts | {index: file_facts(text)}


def file_facts(contents: bytes) -> dict[str, Any]:
    """Size and hash of a file's contents, as `checkpoint.json` records them."""
    return {"bytes": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}


def _from_rank_zero(value: Any, group: dist.ProcessGroup) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]
