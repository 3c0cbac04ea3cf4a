"""The folder of a run's checkpoints: which names in it are ours, what `latest` says, what each one records of itself.

A name that this module does not know is somebody else's: it is neither read nor removed. Names that a file gives stay
inside the folder of that file. The folder may lie in a store (`pipeline.checkpoint.uploading`). What fails there is a
`StoreError` and told as such: it says nothing about a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.files import (
    FileError,
    Place,
    StoreError,
    StorePath,
    convert,
    decode_json,
    inside,
    is_there,
    open_regular,
    read_bytes,
    read_text,
    sealed,
    shown,
    size_of,
)
from pipeline.checkpoint.schema import FORMAT_VERSION, FileFacts, Summary
from pipeline.config.load import ConfigError

SUMMARY = "checkpoint.json"
LATEST = "latest"
LATEST_LIMIT = 4096
"""Bytes of `latest` that are read: it holds one name."""

_NAME = re.compile(r"step_([0-9]{8,18})\Z")
_LEFTOVER = re.compile(r"\.step_[0-9]{8,18}(\.[0-9a-f]{16})?\.(partial|replaced)\Z")
# What a save makes in a checkpoint's folder: its files, and a file of the first version on its way to its name.
_CONTENT = re.compile(
    r"(rank|weights)_[0-9]{5,7}\.(json|safetensors)\Z|checkpoint\.json\Z"
    r"|\.((rank|weights)_[0-9]{5,7}|checkpoint)\.(json|safetensors)(\.[0-9a-f]{16})?\.partial\Z"
)


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or does not fit; the message names the file."""


@contextlib.contextmanager
def checkpoint_errors() -> Iterator[None]:
    """What a file's contents or the disk do wrong is the checkpoint's error."""
    try:
        yield
    except (CheckpointError, StoreError):
        raise
    except FileError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from error
    except RecursionError as error:
        raise CheckpointError(f"a file is nested too deeply: {error}") from error


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def checkpoint_step(path: Place) -> int | None:
    """The step of a checkpoint's folder by its name; None where the name is not one that we give."""
    match = _NAME.match(path.name)
    step = int(match[1]) if match else None
    return step if step is not None and checkpoint_name(step) == path.name else None


def checkpoint_folders(folder: Place) -> list[Place]:
    """Folders with a checkpoint's name, be they whole or not, by step. Links are the user's own, and so left alone."""
    if isinstance(folder, StorePath):
        found = [folder / name for name, size in folder.sizes().items() if size is None]
        return sorted((path for path in found if checkpoint_step(path) is not None), key=checkpoint_step)
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if checkpoint_step(path) is not None]
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=checkpoint_step)


def superfluous(found: Sequence[Place], last: int, *, keep: int, keep_every: int) -> list[Place]:
    """The checkpoints that `keep` and `keep_every` do not hold.

    Those of later steps than `last`, the newest, were left aside when the run went back: they go first.
    """
    found = sorted(found, key=lambda path: (checkpoint_step(path) <= last, checkpoint_step(path)))
    return [old for old in found[:-keep] if not (keep_every and checkpoint_step(old) % keep_every == 0)]


def linked(folder: Place) -> list[str]:
    """What is passed over because it bears a checkpoint's name, but is a link, one message each."""
    if isinstance(folder, StorePath):  # which has no links
        return []
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [
        f"{path} is a link and was passed over: name the folder that it leads to instead"
        for path in found
        if checkpoint_step(path) is not None and path.is_symlink()
    ]


def leftovers(folder: Path) -> list[Path]:
    """What saves that were killed have left behind."""
    return sorted(path for path in folder.iterdir() if _LEFTOVER.match(path.name) and path.is_dir())


def others_in(checkpoint: Path) -> list[str]:
    """Names in a checkpoint's folder that no save has made."""
    return sorted(path.name for path in checkpoint.iterdir() if not (is_content(path.name) and path.is_file()))


def is_content(name: str) -> bool:
    """Whether a file of a checkpoint's folder bears a name that a save gives."""
    return _CONTENT.match(name) is not None


def read_latest(folder: Place) -> tuple[str | None, str | None]:
    """The checkpoint that `latest` in a run's `checkpoints` folder names, and what is wrong with that.

    Returns:
        The name, which need not be there, or None without a `latest` or when it holds something else; the problem, or
        None.
    """
    pointer = folder / LATEST
    if not is_there(pointer):
        return None, None
    try:
        text = read_text(inside(folder, LATEST, str(folder)), LATEST_LIMIT).strip()
    except StoreError:
        raise
    except (FileError, OSError) as error:
        return None, str(error)
    if checkpoint_step(Path(text)) is None or "/" in text:
        return None, f"{pointer} holds {shown(text)}, which is not a checkpoint's name such as {checkpoint_name(100)}"
    if folder / text not in checkpoint_folders(folder) or not (folder / text / SUMMARY).is_file():
        return text, f"{pointer} names {text}, which is not a checkpoint here (no {SUMMARY})"
    return text, None


def check_new(run_dir: Path) -> None:
    """Raises: ConfigError: a new run in this folder would overwrite an old one."""
    if (run_dir / "metrics.jsonl").exists():
        raise ConfigError(
            [f"run_dir: {run_dir} holds a run already; go on with --resume, or choose another name or run_dir"]
        )


def whole_checkpoints(folder: Place) -> list[Place]:
    """The checkpoints of a run's `checkpoints` folder whose last file was written, by step."""
    return [path for path in checkpoint_folders(folder) if (path / SUMMARY).is_file()]


def candidates(*folders: Place) -> list[Place]:
    """The checkpoints in a run's `checkpoints` folders, best first: what `latest` names, the ones before it, newest
    first, and then those after it: a run that went back to an earlier checkpoint has left them aside. Of equal ones
    those in the folder that is named first."""
    left_aside: dict[Place, bool] = {}
    for folder in folders:
        name, _ = read_latest(folder)
        named = None if name is None else checkpoint_step(Path(name))
        for path in reversed(whole_checkpoints(folder)):
            left_aside[path] = named is not None and checkpoint_step(path) > named
    return sorted(left_aside, key=lambda path: (left_aside[path], -checkpoint_step(path)))


def find_checkpoint(folder: Place) -> Place:
    """The checkpoint that `latest` names in a run's `checkpoints` folder, or `folder` itself when it is a checkpoint.

    Raises:
        CheckpointError: there is none.
        StoreError: the store does not say.
    """
    if (folder / SUMMARY).is_file():
        return folder
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    name, problem = read_latest(folder)
    if problem:
        raise CheckpointError(problem)
    if name is None:
        raise CheckpointError(f"{folder}: no checkpoint here (no {SUMMARY}, no {LATEST})")
    return folder / name


def read_summary(folder: Place) -> Summary:
    """What a checkpoint's `checkpoint.json` says.

    Raises:
        CheckpointError: it is missing, damaged or of another version.
    """
    path = folder / SUMMARY
    with checkpoint_errors():
        content = decode_json(read_bytes(inside(folder, SUMMARY, str(folder))), dict[str, Any], str(path))
        version = content.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise CheckpointError(
                f"{path}: format version {shown(version)}; this program reads version {FORMAT_VERSION}"
            )
        if content.get("sha256") != sealed(content)["sha256"]:
            raise CheckpointError(f"{path} was changed after it was written (its SHA-256 differs)")
        summary = convert(content, Summary, str(path))
        for name in summary.files:
            partner = str(Path(name).with_suffix(".safetensors" if name.endswith(".json") else ".json"))
            if partner not in summary.files:
                raise CheckpointError(f"{path}: files lists {name}, but no {partner}")
        return summary


def read_index(folder: Place, name: str, facts: FileFacts) -> bytes:
    """The contents of one of a checkpoint's indices, compared with what `checkpoint.json` records of it.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = folder / name
    raise_damage(file_damage(folder, name, facts, contents=False))
    with checkpoint_errors():
        contents = read_bytes(path)
        if hashlib.sha256(contents).hexdigest() != facts.sha256:
            raise CheckpointError(f"{path} was changed after it was written (SHA-256 differs)")
        return contents


def file_hash(path: Place) -> str:
    """SHA-256 of a regular file.

    Raises:
        FileError, OSError: as `open_regular`.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_damage(folder: Place, name: str, facts: FileFacts, *, contents: bool) -> str | None:
    """What is wrong with a file of a checkpoint; None when it is as recorded.

    Args:
        facts: what was recorded.
        contents: compare the hash as well.
    """
    path = folder / name
    try:
        inside(folder, name, str(folder / SUMMARY))
        if (size := size_of(path)) != facts.bytes:
            return f"{path} has {size} bytes; the checkpoint recorded {facts.bytes} bytes"
        if contents and file_hash(path) != facts.sha256:
            return f"{path} was changed after it was written (SHA-256 differs)"
    except FileNotFoundError:
        return f"{path} is missing; the checkpoint recorded {facts.bytes} bytes"
    except FileError as error:
        return str(error)
    except StoreError:
        raise
    except OSError as error:
        return f"{path} cannot be read: {error}"
    return None


def raise_damage(damage: str | None) -> None:
    """Raise what `file_damage` found."""
    if damage is not None:
        raise CheckpointError(damage)
