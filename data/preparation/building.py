"""The folder of a prepared set while it is made and when it is replaced.

A set is built in `DIR/.building-<16 hex digits>`, a name that nobody can predict, and moved into `DIR` when it is
complete, the manifest last. What is removed from `DIR`, file by file, is what a manifest there lists: the one of the
set that is replaced, or those in the remains of a run that was killed. Anything else in it is somebody's, and refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from data.files import file_name, sync_folder
from data.preparation.identity import INPUTS
from data.prepared.manifest import MANIFEST, SPLITS, Manifest, index_name, load_manifest
from data.tokenizer.tokenizer import INFO, TOKENIZER_JSON, Tokenizer

TOKENIZER_FOLDER = "tokenizer"
PARTS_FOLDER = "parts"

_BUILDING = re.compile(r"\.building-[0-9a-f]{16}")
_WRITTEN = re.compile(r"(train|valid)-\d{6}\.tar")
_TOKENIZER_FILE = re.compile(rf"({re.escape(INFO)}|{re.escape(TOKENIZER_JSON)})")
_REPLACED = "replaced"
"""In the building folder, while the new set is moved: the manifest of the old one."""


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder against a second `infini prepare`; the system lets go when the process dies.

    Raises:
        ValueError: another one holds it.
    """
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another `infini prepare` is writing to {file_name(out)}") from None
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def building_in(out: Path) -> Iterator[Path]:
    """A new folder to build a set in; gone when the block ends, however it does."""
    building = out / f".building-{secrets.token_hex(8)}"
    building.mkdir()
    try:
        yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)


def clear_remains(out: Path) -> None:
    """Remove what runs that were killed have left in `out`, and nothing else. Needs the lock."""
    for building in sorted(out.iterdir()):
        if not _BUILDING.fullmatch(building.name) or building.is_symlink() or not building.is_dir():
            continue
        if not (out / MANIFEST).exists():
            # It died while it moved its files: some are here, some there, and the manifest comes last.
            for folder in (building, building / _REPLACED):
                manifest = _manifest(folder)
                if manifest is not None:
                    _remove(out, _names(manifest))
        _remove(building / _REPLACED, {MANIFEST})
        clear_building(building, also=(MANIFEST,))
        for folder in (building / _REPLACED, building):
            with contextlib.suppress(OSError):  # what is left in it is somebody's
                folder.rmdir()


def clear_building(building: Path, also: tuple[str, ...]) -> list[str]:
    """Remove what is written while a set, or a part of one, is built; returns the names of what else is there."""
    written = {entry.name for entry in building.iterdir() if _WRITTEN.fullmatch(entry.name)}
    _remove(building, written | {*also, INPUTS, TOKENIZER_FOLDER} | {index_name(split) for split in SPLITS})
    return sorted(entry.name for entry in building.iterdir())


def refuse_foreign(out: Path) -> None:
    """Raises: ValueError where `out` holds anything that is not a file of the set there, nor its parts."""
    manifest = _manifest(out)
    own = _names(manifest) if manifest is not None else set()
    foreign = sorted(entry.name for entry in out.iterdir() if entry.name not in own | {PARTS_FOLDER})
    if foreign:
        lost = f" ({MANIFEST} does not say which are a set's)" if MANIFEST in foreign else ""
        raise ValueError(
            f"--out {file_name(out)} holds other files ({file_name(foreign[0])}, ...){lost}; choose an empty or a new "
            "folder"
        )
    tokenizer = out / TOKENIZER_FOLDER
    if tokenizer.is_symlink() or (tokenizer.is_dir() and not all(map(_is_tokenizers, tokenizer.iterdir()))):
        raise ValueError(
            f"--out {file_name(out)}: its folder {TOKENIZER_FOLDER} is a link or holds other files; choose an empty or "
            "a new folder"
        )


def move_into_place(building: Path, out: Path) -> None:
    """Replace the set in `out`, or nothing, by the one in `building`. Needs the lock."""
    # The old manifest goes first and the new one comes last: between the two the folder holds no complete set, and
    # both manifests lie in the building folder, so that whoever comes after a kill knows which files are whose.
    old = _manifest(out)
    if old is not None:
        (building / _REPLACED).mkdir()
        (out / MANIFEST).rename(building / _REPLACED / MANIFEST)
        sync_folder(building / _REPLACED)
        _remove(out, _names(old))
    for entry in sorted(building.iterdir(), key=lambda entry: entry.name == MANIFEST):
        if entry.name != _REPLACED:
            entry.rename(out / entry.name)
    sync_folder(out)


def _manifest(folder: Path) -> Manifest | None:
    try:
        return load_manifest(folder)
    except (ValueError, OSError):
        return None


def _names(manifest: Manifest) -> set[str]:
    shards = {shard.name for split in manifest.splits.values() for shard in split.shards}
    return shards | {split.index.name for split in manifest.splits.values()} | {MANIFEST, INPUTS, TOKENIZER_FOLDER}


def _remove(folder: Path, names: set[str]) -> None:
    for name in names:
        path = folder / name
        if name != TOKENIZER_FOLDER:
            path.unlink(missing_ok=True)
        elif path.is_dir() and not path.is_symlink():
            for file in filter(_is_tokenizers, path.iterdir()):
                file.unlink()
            with contextlib.suppress(OSError):
                path.rmdir()


def _is_tokenizers(file: Path) -> bool:
    return bool(_TOKENIZER_FILE.fullmatch(file.name)) and not file.is_dir()


def save_tokenizer(building: Path, tokenizer: Tokenizer) -> None:
    """Put the set's tokenizer into the folder, and on the disk."""
    tokenizer.save(building / TOKENIZER_FOLDER)
    sync_folder(building / TOKENIZER_FOLDER)
