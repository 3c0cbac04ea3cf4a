"""Where a run begins: at its beginning, at a checkpoint, or with the weights of another run.

What one process alone reads or writes here goes through `on_main`: its error is then everybody's, and all begin at the
same place.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from data.files import Place, StoreError, StorePath, place
from pipeline.checkpoint.find_tokenizer import check_run_folder, check_tokenizer
from pipeline.checkpoint.folder import candidates, check_new, checkpoint_step, find_checkpoint, whole_checkpoints
from pipeline.checkpoint.loading import open_newest, open_verified
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.uploading import CONFIG, check_new_store, folders_of
from pipeline.checkpoint.weights_only import start_from
from pipeline.checkpoint.writer import move_latest
from pipeline.config.load import save_config
from pipeline.config.schema import Config
from pipeline.parallel.optimizer import ZeroOptimizer
from pipeline.parallel.topology import Topology, on_main
from pipeline.training.elastic import this_attempt
from pipeline.training.lock_file import DiskLockFile, StoreLockFile
from pipeline.training.run_lock import NAME, RunLock, this_process


@contextlib.contextmanager
def holding(config: Config) -> Iterator[Callable[[], None]]:
    """The locks of a run's folder and store, while the block runs; collective.

    Yields:
        Makes sure, on the main process, that the store is this run's: see `RunLock.confirm`.

    Raises:
        ConfigError, OSError: as `RunLock.acquire`, on all processes. A store that does not answer is no error yet.
    """
    own = this_process()
    folder = RunLock(DiskLockFile(Path(config.run_dir) / NAME), "run_dir", own)
    locks = [folder]
    if config.checkpoint.store is not None:
        locks.append(RunLock(StoreLockFile(StorePath(config.checkpoint.store) / NAME), "checkpoint.store", own))

    def acquire() -> None:
        folder.acquire()
        for store in locks[1:]:
            try:
                store.acquire(folder.gone)
            except StoreError as error:  # a run that goes on from its disk does so; others will ask it themselves
                print(f"{store.folder} IS NOT LOCKED, which is tried again before the first copy: {error}", flush=True)

    try:
        on_main(acquire)
        yield locks[-1].confirm
    finally:
        for lock in locks:
            lock.release()


def begin(
    config: Config,
    topology: Topology,
    optimizer: ZeroOptimizer,
    *,
    tokenizer: tuple[str, Path | str],
    vocab_size: int,
    resume: str | None,
    load: Callable[[CheckpointReader], None],
) -> tuple[list[str], bool]:
    """Prepare the run folder and load what the run begins with; collective. See `Trainer.start`.

    Args:
        optimizer: whose parameters `train.init_from` gives their first values.
        tokenizer: hash, and where it is.
        vocab_size: tokens, without padding.
        load: goes on from a checkpoint.

    Returns:
        What is to be said about it; whether the run goes on with what its folder holds.
    """
    notes: list[str] = []
    run_dir, folders = Path(config.run_dir), folders_of(config)
    restart = _told_restart(topology)
    if restart:
        notes.append(restart)
        # One after the other: a store that does not answer is not asked where the disk has something.
        if resume is None or on_main(lambda: any(map(candidates, folders))):
            resume = "latest"
    on_main(lambda: _check_folder(config, tokenizer, new=resume is None))
    reader = None
    if resume == "latest":
        reader = open_newest(folders, notes.append)
        if reader is None:
            notes.append(f"no whole checkpoint in {' or '.join(map(str, folders))} yet: starting from the beginning")
    elif resume is not None:
        reader = open_verified(on_main(lambda: find_checkpoint(place(resume))))
    if reader is not None:
        notes += check_tokenizer(reader, *tokenizer)
        load(reader)
        if resume != "latest":
            on_main(lambda: _go_on_from(reader.folder, folders))
    else:
        optimizer.initialize(config.train.seed)
        if config.train.init_from is not None:
            source = open_verified(on_main(lambda: find_checkpoint(place(config.train.init_from))))
            notes += check_tokenizer(source, *tokenizer)
            notes += start_from(source, optimizer, topology, config, vocab_size)
    if reader is not None and reader.summary.step >= config.train.steps:
        notes.append(f"train.steps = {config.train.steps} are done already: nothing is left to train")
    topology.barrier()
    on_main(lambda: _write_config(config, run_dir))
    return notes, resume is not None


def _told_restart(topology: Topology) -> str | None:
    """Which start of the same launch this is; None for the first."""
    if attempt := this_attempt():
        return str(attempt) if attempt.number else None
    # Only the node where a rank failed counts the restart.
    own = float(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    restarts = int(topology.all_reduce([own], op=dist.ReduceOp.MAX)[0])
    return f"restart {restarts} after a failure" if restarts else None


def _check_folder(config: Config, tokenizer: tuple[str, Path | str], *, new: bool) -> None:
    run_dir = Path(config.run_dir)
    if new:
        check_new(run_dir)
        if config.checkpoint.store is not None:
            check_new_store(config.checkpoint.store)
            # It can be written to: better said now than at the first checkpoint.
            save_config(config, place(config.checkpoint.store) / CONFIG)
    check_run_folder(run_dir, *tokenizer)


def _go_on_from(checkpoint: Place, folders: list[Place]) -> None:
    """Restarts and roll-backs must not pass it: every folder of the run's checkpoints that holds some names it.

    A store that lacks it will get it, and names the newest before it until then: others read there what `latest` names.
    """
    step = checkpoint_step(checkpoint)
    if step is None or not any(_same(checkpoint.parent, folder) for folder in folders):
        return
    for folder in folders:
        found = whole_checkpoints(folder)
        before = [path for path in found if checkpoint_step(path) <= step]
        if isinstance(folder, StorePath) and before:
            move_latest(before[-1])
        elif found:
            move_latest(folder / checkpoint.name)


def _same(folder: Place, other: Place) -> bool:
    both_here = isinstance(folder, Path) and isinstance(other, Path)
    return folder.resolve() == other.resolve() if both_here else folder == other


def _write_config(config: Config, run_dir: Path) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, run_dir / CONFIG)
