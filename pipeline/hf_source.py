"""A model in a Hugging Face folder: its configuration, and its tensors one at a time.

Headers are read when the folder is opened, so that everything that is wrong with it is known before anything is
written; a tensor's bytes are read when it is asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_FLOATS = ("F64", "F32", "F16", "BF16")


class ModelSource(Protocol):
    """What an import reads from: a folder or a GGUF file."""

    path: Path
    config: dict[str, Any]
    """As in Hugging Face's `config.json`."""
    config_name: str
    """Where the configuration stands, for messages."""
    shapes: dict[str, tuple[int, ...]]
    """Of every tensor, by Hugging Face's names."""

    def read(self, name: str) -> Tensor:
        """One whole tensor, float32."""
        ...

    def tokenizer_files(self) -> dict[str, bytes]:
        """`tokenizer.json` and, where there is one, `tokenizer_config.json`."""
        ...


class FolderSource:
    """A folder with `config.json` and safetensors files, one or many.

    Raises:
        ValueError: something is missing, damaged, or of a kind that is not read; names the file.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.config_name = str(folder / "config.json")
        self.config = _json(folder / "config.json")
        self._files = self._locate()
        self.shapes = {}
        for file in sorted(set(self._files.values())):
            self.shapes |= self._header(file)
        if lost := sorted(self._files.keys() - self.shapes.keys()):
            raise ValueError(f"{folder / self._files[lost[0]]} holds no {lost[0]}, which {INDEX} says it does")

    def read(self, name: str) -> Tensor:
        path = self.path / self._files[name]
        try:
            with safe_open(path, framework="pt") as tensors:
                return tensors.get_tensor(name).to(torch.float32)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: cannot read {name}: {error}") from error

    def tokenizer_files(self) -> dict[str, bytes]:
        path = self.path / "tokenizer.json"
        if not path.is_file():
            raise ValueError(
                f"{self.path} holds no tokenizer.json; `AutoTokenizer.from_pretrained({str(self.path)!r})"
                f".save_pretrained({str(self.path)!r})` of transformers makes one from a tokenizer.model"
            )
        names = ("tokenizer.json", "tokenizer_config.json")
        return {name: (self.path / name).read_bytes() for name in names if (self.path / name).is_file()}

    def _locate(self) -> dict[str, str]:
        """The file of every tensor; those of a single file are not known before its header is read."""
        if (self.path / INDEX).is_file():
            files = _json(self.path / INDEX).get("weight_map")
            if not isinstance(files, dict) or not files:
                raise ValueError(f"{self.path / INDEX} has no weight_map")
            return files
        if (self.path / SINGLE).is_file():
            return dict.fromkeys(self._header(SINGLE), SINGLE)
        pickles = sorted(path.name for path in self.path.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle, which is not read: convert it to safetensors" if pickles else ""
        raise ValueError(f"{self.path} holds neither {SINGLE} nor {INDEX}{hint}")

    def _header(self, file: str) -> dict[str, tuple[int, ...]]:
        path = self.path / file
        if not path.is_file():
            raise ValueError(f"{path} is missing; {INDEX} names it")
        shapes = {}
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    part = tensors.get_slice(name)
                    if part.get_dtype() not in _FLOATS:
                        raise ValueError(
                            f"{path}: {name} has type {part.get_dtype()}; readable are {', '.join(_FLOATS)} "
                            "(a quantised model has to be imported from its unquantised form)"
                        )
                    shapes[name] = tuple(part.get_shape())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged or cut short: {error}") from error
        return shapes


def open_source(path: Path) -> ModelSource:
    """The model at `path`.

    Raises:
        ValueError: it is neither a folder with a model nor a GGUF file, or is damaged.
    """
    if path.is_dir():
        return FolderSource(path)
    if path.is_file() and path.suffix == ".gguf":
        from pipeline.gguf_source import GgufSource

        return GgufSource(path)
    raise ValueError(f"{path} is neither a folder with a Hugging Face model nor a .gguf file")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold settings")
    return content
