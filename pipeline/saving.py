"""Writing checkpoints: whole or absent, behind the training when asked to.

A step waits only while this process's tensors are copied to host memory. A thread then writes them and, through a
process group of its own, agrees with the other processes' threads whether all succeeded; only then does rank 0 give
the checkpoint its name and move `latest`. At most one save is in flight.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from model.sharding import partition_of
from pipeline.checkpoint import FORMAT_VERSION, LATEST, SUMMARY, RunState, checkpoint_name, file_hash, sealed
from pipeline.executor import Memory
from pipeline.optimizer import ZeroOptimizer
from pipeline.topology import Topology


@dataclass
class Snapshot:
    """One process's part of a checkpoint, in host memory."""

    state: RunState
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


def take_snapshot(
    state: RunState,
    optimizer: ZeroOptimizer,
    memory: Memory,
    topology: Topology,
    *,
    lane_range: tuple[int, int],
    summary: dict[str, Any],
) -> Snapshot:
    """Copy what this process owns: its ZeRO fragments, and the memory of its lanes and heads."""
    optimizer.set_steps_taken(*optimizer.steps_taken())  # a checkpoint of step 0 has empty moments, not none
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    for fragment in optimizer.fragments():
        partition = partition_of(fragment.parameter)
        replica = getattr(fragment.parameter, "ds_pipe_replicated", False)  # a tied copy: the first stage writes it
        if replica or (partition.dim is None and topology.tensor_rank > 0):
            continue
        if fragment.shared and topology.data_rank > 0:
            continue
        split = partition.dim is not None
        for kind, tensor in fragment.tensors.items():
            key = f"{kind}/{fragment.name}"
            tensors[key] = tensor.detach().to("cpu", copy=True)
            entries.append(
                {
                    "key": key,
                    "start": fragment.start,
                    "count": tensor.numel(),
                    "local_shape": list(optimizer.local_shape(fragment.parameter)),
                    "partition_dim": partition.dim,
                    "partition_stride": partition.stride,
                    "tensor_rank": topology.tensor_rank if split else 0,
                    "tensor_size": topology.tensor_size if split else 1,
                }
            )
    for layer, layer_state in zip(optimizer.stage.layers, memory, strict=True):
        for name, tensor in {} if layer_state is None else layer_state._asdict().items():
            key = f"memory/{layer}/{name}"
            tensors[key] = tensor.detach().to("cpu", copy=True).contiguous()
            entries.append(
                {
                    "key": key,
                    "first_lane": lane_range[0],
                    "first_head": topology.tensor_rank * tensor.shape[1],
                    "shape": list(tensor.shape),
                }
            )
    tensors["rng"] = torch.get_rng_state()
    steps, backbone_steps = optimizer.steps_taken()
    summary = {"optimizer_steps": steps, "backbone_optimizer_steps": backbone_steps, **summary}
    owns_lanes = topology.tensor_rank == 0 and topology.pipeline_rank == 0
    return Snapshot(state, tensors, entries, summary, owns_lanes)


class CheckpointSaver:
    """Writes the checkpoints of a run. All processes make one together and call it at the same steps.

    Args:
        folder: `checkpoints` of the run.
        keep: newest checkpoints that are kept.
        keep_every: steps whose multiples are kept for good; 0 for none.
        asynchronous: write in a thread.
        timeout_s: a process that waits longer for another one's part gives up.
    """

    def __init__(
        self, folder: Path, *, keep: int, keep_every: int = 0, asynchronous: bool = False, timeout_s: float = 1800.0
    ) -> None:
        self.folder = folder
        self.keep, self.keep_every = keep, keep_every
        self.asynchronous = asynchronous
        self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
        self._thread: threading.Thread | None = None
        self._report: SaveReport | None = None
        self._failure: BaseException | None = None

    def save(self, make_snapshot) -> None:
        """Save what `make_snapshot()` returns; collective. Fetch the outcome with `finished`.

        Waits for an earlier save first. Whoever calls it asks `finished` before, or its outcome is lost.
        """
        start = time.perf_counter()
        self.wait()
        snapshot: Snapshot = make_snapshot()
        path = self.folder / checkpoint_name(snapshot.state.step)
        self._report = SaveReport(snapshot.state.step, path, stall_s=time.perf_counter() - start)
        self._failure = None
        if self.asynchronous:
            self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint-writer", daemon=True)
            self._thread.start()
            return
        self._run(snapshot)
        self._report.stall_s = time.perf_counter() - start

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
        except BaseException as failure:
            # The training thread raises it when it looks. It may never come to that, waiting for a rank that waits for
            # this thread: so the thread fails as well, and whoever watches over the process can end it.
            self._failure = failure
            raise
        finally:
            self._report.write_s = time.perf_counter() - start

    def _write(self, snapshot: Snapshot) -> None:
        """Write this process's files and finish the checkpoint together with the others."""
        report = self._report
        temporary = self.folder / f".{report.path.name}.partial"
        rank = dist.get_rank()
        error, written = None, {}
        if rank == 0:
            error = _try(lambda: _fresh_folder(temporary), temporary)
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
            "step": snapshot.state.step,
            "tokens": snapshot.state.tokens,
            "windows": snapshot.state.windows,
            "recent_losses": snapshot.state.recent_losses,
            "files": files,
            **snapshot.summary,
        }
        write_whole(temporary / SUMMARY, json.dumps(sealed(content), indent=1))
        _sync(temporary)
        if report.path.exists():  # the same step again, after a resume from an earlier one
            discarded = self.folder / f".{report.path.name}.replaced"
            shutil.rmtree(discarded, ignore_errors=True)
            os.rename(report.path, discarded)
            os.rename(temporary, report.path)
            shutil.rmtree(discarded, ignore_errors=True)
        else:
            os.rename(temporary, report.path)
        _sync(self.folder)
        move_latest(report.path)
        self._prune(report.path)

    def _prune(self, newest: Path) -> None:
        """Remove what `keep` and `keep_every` do not hold. Left-overs of killed saves go as well.

        Checkpoints of later steps than `newest` were left aside when the run went back: they go first.
        """
        for old in sorted(self.folder.glob("step_*"), key=lambda path: (path <= newest, path))[: -self.keep]:
            step = int(old.name.removeprefix("step_"))
            if not (self.keep_every and step % self.keep_every == 0):
                # Renamed first: a removal that is cut short must not leave half a checkpoint under a good name.
                discarded = old.with_name(f".{old.name}.replaced")
                os.rename(old, discarded)
        for leftover in (*self.folder.glob(".step_*.replaced"), *self.folder.glob(".step_*.partial")):
            shutil.rmtree(leftover, ignore_errors=True)


def move_latest(checkpoint: Path) -> None:
    """Make a run's `latest` name this one of its checkpoints."""
    write_whole(checkpoint.parent / LATEST, checkpoint.name + "\n")


def _try(action, folder: Path) -> str | None:
    """Run `action`; the reason when the disk would not have it."""
    try:
        action()
    except OSError as error:
        return f"rank {dist.get_rank()} could not write the checkpoint in {folder}: {error}"
    except Exception as error:
        # safetensors reports a full disk as an error of its own.
        if type(error).__name__ != "SafetensorError":
            raise
        return f"rank {dist.get_rank()} could not write the checkpoint in {folder}: {error}"
    return None


def _fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_part(folder: Path, rank: int, snapshot: Snapshot) -> dict[str, Any]:
    """Write one process's two files; their sizes and hashes by name."""
    tensors = folder / f"rank_{rank:05d}.safetensors"
    save_file(snapshot.tensors, tensors)
    _sync(tensors)
    index = folder / f"rank_{rank:05d}.json"
    lanes = snapshot.state.lanes if snapshot.owns_lanes else {}
    write_whole(index, json.dumps({"tensors": snapshot.entries, "lanes": lanes}))
    return {path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in (tensors, index)}


def _from_rank_zero(value: Any, group: dist.ProcessGroup) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is either the old one or all of the new one."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
