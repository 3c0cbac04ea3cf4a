"""A model in a Hugging Face folder: its configuration, and its tensors one at a time.

The folder is what transformers would load from it. Where something stands there twice, its choice is taken and said
(`notes`), or the folder is refused; nothing of it is run, and no file outside of it is opened.

Headers are read when the folder is opened, so that everything that is wrong with it is known before anything is
written; a tensor's bytes are read when it is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.files import open_regular, shown, some
from model.huggingface.config import is_exported
from model.huggingface.describe import EXPORTED_CODE
from pipeline.huggingface.schema import CONFIG, INDEX, ModelSettings, WeightIndex, file_of, read_settings
from pipeline.huggingface.tokens import SourceTokens, read_tokens

SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"

_FLOATS = ("F64", "F32", "F16", "BF16")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


class ModelSource(Protocol):
    """What an import reads from: a folder or a GGUF file."""

    path: Path
    config: dict[str, Any]
    """As in Hugging Face's `config.json`, of the types that `pipeline.huggingface.schema` declares."""
    config_name: str
    """Where the configuration stands, for messages."""
    shapes: dict[str, tuple[int, ...]]
    """Of every tensor, by Hugging Face's names."""
    notes: list[str]
    """What was found twice, passed over or left out, for people."""

    def read(self, name: str) -> Tensor:
        """One whole tensor, float32."""
        ...

    def place(self, name: str) -> str:
        """The file and the tensor's name in it, for messages."""
        ...

    def tokens(self) -> SourceTokens:
        """The tokenizer and what else says what tokens mean."""
        ...


class FolderSource:
    """A folder with `config.json` and safetensors files, one or many.

    Raises:
        ValueError: something is missing, damaged, contradictory, or of a kind that is not read; names the file.
        OSError: a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.notes: list[str] = []
        config = file_of(folder, CONFIG, str(folder))
        self.config_name = str(config)
        settings, self.config = read_settings(config, ModelSettings)
        self._refuse_other_sources(settings)
        self._files = self._locate()
        self.shapes = self._headers()
        self._say_what_is_passed_over()

    def read(self, name: str) -> Tensor:
        path = self.path / self._files[name]
        try:
            with safe_open(path, framework="pt") as tensors:
                return tensors.get_tensor(name).to(torch.float32)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: cannot read {name}: {error}") from error

    def place(self, name: str) -> str:
        return f"{self.path / self._files[name]}: {name}"

    def tokens(self) -> SourceTokens:
        return read_tokens(self.path)

    def _refuse_other_sources(self, settings: ModelSettings) -> None:
        """Refuse what would make transformers load another configuration or other weights than are read here."""
        for name in ("configuration_files", "transformers_weights"):
            if value := getattr(settings, name):
                raise ValueError(
                    f"{self.config_name}: {name} = {shown(value)} names other files than {CONFIG} and {SINGLE}, and "
                    "transformers reads those: make the folder one model, and leave the setting out"
                )
        if (self.path / ADAPTER).exists():
            raise ValueError(
                f"{self.path} holds {ADAPTER} beside {CONFIG}: an adapter, which transformers adds to the weights of "
                "another model; merge the two first (`merge_and_unload` of peft)"
            )

    def _locate(self) -> dict[str, str]:
        """The file of every tensor; those of a single file are not known before its header is read.

        As transformers does it: a single file counts before an index.
        """
        single, index = ((self.path / name).is_file() for name in (SINGLE, INDEX))
        named = self._index() if index else {}
        if single and named and set(named.values()) != {SINGLE}:
            self.notes.append(
                f"{self.path} holds {SINGLE} and {INDEX}, which names {len(set(named.values()))} other file(s): the "
                "single file is read and the index is not, as in transformers"
            )
        if single:
            return dict.fromkeys(self._header(SINGLE), SINGLE)
        if index:
            return named
        pickles = sorted(path.name for path in self.path.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle, which is not read: convert it to safetensors" if pickles else ""
        raise ValueError(f"{self.path} holds neither {SINGLE} nor {INDEX}{hint}")

    def _index(self) -> dict[str, str]:
        return read_settings(file_of(self.path, INDEX, str(self.path)), WeightIndex)[0].weight_map

    def _headers(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors of the files that are read; the index and the files must say the same."""
        shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self._files.values())):
            for name, shape in self._header(file).items():
                if name not in self._files:
                    raise ValueError(
                        f"{self.path / file} holds {shown(name)}, which {INDEX} does not name: transformers would load "
                        "it; one of the two is older"
                    )
                if self._files[name] == file:
                    shapes[name] = shape
                else:
                    raise ValueError(
                        f"{self.path / file} holds {shown(name)}, which {INDEX} says is in {shown(self._files[name])}"
                    )
        if lost := sorted(self._files.keys() - shapes.keys()):
            raise ValueError(
                f"{self.path / self._files[lost[0]]} holds no {shown(lost[0])}, which {INDEX} says it does"
            )
        return shapes

    def _header(self, file: str) -> dict[str, tuple[int, ...]]:
        path = file_of(self.path, file, str(self.path / INDEX) if file != SINGLE else str(self.path))
        try:
            open_regular(path).close()  # safetensors would wait for a fifo
        except FileNotFoundError:
            raise ValueError(f"{path} is missing; {INDEX} names it") from None
        shapes = {}
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    part = tensors.get_slice(name)
                    if part.get_dtype() not in _FLOATS:
                        raise ValueError(
                            f"{path}: {shown(name)} has type {part.get_dtype()}; readable are {', '.join(_FLOATS)} "
                            "(a quantised model has to be imported from its unquantised form)"
                        )
                    shapes[name] = tuple(part.get_shape())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged or cut short: {error}") from error
        return shapes

    def _say_what_is_passed_over(self) -> None:
        """Other weights, and code: neither is opened."""
        names = sorted(path.name for path in self.path.iterdir())
        read = {file.split("/")[0] for file in self._files.values()}
        if weights := [name for name in names if name.endswith(_WEIGHTS) and name not in read]:
            self.notes.append(
                f"{self.path}: not read: {some(map(shown, weights))} ({len(weights)} file(s) of other weights)"
            )
        own = EXPORTED_CODE if is_exported(self.config) else {}
        code = [name for name in names if name.endswith(".py") and not (own and name.endswith("_infini.py"))]
        if code:
            self.notes.append(
                f"{self.path}: {some(map(shown, code))} ({len(code)} file(s) of code) is neither run nor taken over"
            )
        if (named := self.config.get("auto_map")) and named != own:
            self.notes.append(
                f"{self.config_name}: auto_map names code of the model's own, which is neither run nor taken over: the "
                f"model is read as {self.config.get('model_type')}"
            )


def open_source(path: Path) -> ModelSource:
    """The model at `path`.

    Raises:
        ValueError: it is neither a folder with a model nor a GGUF file, or is damaged.
        OSError: it cannot be read.
    """
    if path.is_dir():
        return FolderSource(path)
    if path.suffix == ".gguf" and path.exists():
        from pipeline.huggingface.gguf_source import GgufSource

        return GgufSource(path)
    raise ValueError(f"{path} is neither a folder with a Hugging Face model nor a .gguf file")
