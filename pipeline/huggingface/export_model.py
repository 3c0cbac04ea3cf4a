"""A checkpoint as a Hugging Face folder that `transformers` loads, one tensor at a time.

With its memory the model goes with the code in `model.huggingface.exported`; `plain` leaves the memory out and writes
an ordinary Llama, Qwen 2 or Qwen 3. Everything is checked before anything is written, and the folder gets its name when
it is whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.files import Place, making_folder, some, write_whole, writing
from data.tokenizer.huggingface import tokenizer_files
from data.tokenizer.tokenizer import INFO, TOKENIZER_JSON, Tokenizer, tokenizer_of_files
from model.config import ModelConfig, memory_layers
from model.huggingface import exported
from model.huggingface.describe import describe_infini, describe_plain
from model.huggingface.weights import Weight, backbone_weights, memory_weight
from pipeline.checkpoint.find_tokenizer import find_tokenizer
from pipeline.checkpoint.folder import CheckpointError, find_checkpoint
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.tensor_file import TensorFile
from pipeline.huggingface.schema import CONFIG, GENERATION_CONFIG, INDEX, TOKENIZER_CONFIG
from pipeline.huggingface.tokens import TOKEN_IDS, SourceTokens, as_json, source_tokens

SHARD_BYTES = 5 * 10**9
"""Of one safetensors file."""

_MASTER = "master/"


@dataclass
class Export:
    """What an export came to."""

    checkpoint: Place
    parameters: int = 0
    bytes: int = 0
    shards: int = 0
    notes: list[str] = field(default_factory=list)
    """What a reader should know."""


@dataclass
class _Shard:
    weights: list[tuple[str, Weight]] = field(default_factory=list)
    """Our names, and what becomes of them."""
    bytes: int = 0


def export_model(
    source: Place,
    out: Path,
    *,
    plain: bool = False,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Export:
    """Write the Hugging Face folder `out`, in float32 as the parameters are.

    Args:
        source: a checkpoint's folder, or a run's: its newest checkpoint then.
        out: folder that does not exist yet, or is empty.
        plain: leave the memory out.
        shard_bytes: size of a safetensors file; one parameter is never split.
        tokenizer: folder of the tokenizer; None looks beside the checkpoint, then in the run's first data set.
        progress: called with the number of elements of every parameter written.

    Raises:
        ValueError: the checkpoint is damaged or incomplete, the model cannot be written so, the tokenizer is missing
            or does not fit, or `out` holds something. Nothing has been written then.
        OSError: something cannot be read or written; `out` is not there then.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already: choose another folder")
    reader = CheckpointReader(find_checkpoint(source))
    reader.verify()
    run, vocab_size = reader.config, reader.summary.vocab_size
    config = run.model
    export = Export(reader.folder)
    described = (describe_plain if plain else describe_infini)(config, vocab_size)
    described["dtype"] = "float32"
    shards = _plan(_weights(reader, config, plain, export), shard_bytes)
    folder, found = find_tokenizer(reader, run, tokenizer, export.notes)
    files = tokenizer_files(folder, found)
    kept = source_tokens(folder, found, run.train.init_from)
    files |= _token_files(kept, found, described)
    export.notes += kept.notes
    described["tokenizer_sha256"] = _exported_tokenizer(files, folder, found, export.notes).hash

    with making_folder(out) as partial:
        files[CONFIG] = as_json(described)
        if not plain:
            files |= _code()
        _write_weights(partial, shards, reader, progress)
        for name, content in files.items():
            (partial / name).parent.mkdir(exist_ok=True)
            write_whole(partial / name, content)
    export.bytes, export.shards = sum(shard.bytes for shard in shards), len(shards)
    return export


def _token_files(kept: SourceTokens, tokenizer: Tokenizer, described: dict[str, Any]) -> dict[str, bytes]:
    """What goes with the tokenizer, by file; `config.json` gets what it says of tokens.

    What came with an imported model goes out as it came. Else the tokenizer's end token ends a text, and there is no
    other special token: null, because a Llama's default is token 1.
    """
    ids = kept.ids or {"bos_token_id": None, "eos_token_id": tokenizer.eos_id}
    described |= ids
    files = {name: content for name, content in kept.files.items() if name != TOKEN_IDS}
    return {GENERATION_CONFIG: as_json({"eos_token_id": ids.get("eos_token_id"), "do_sample": False})} | files


def _exported_tokenizer(files: dict[str, bytes], folder: Place, trained: Tokenizer, notes: list[str]) -> Tokenizer:
    """The tokenizer as an import of the folder would read it.

    Raises:
        ValueError: it ends documents with another token than the trained one.
    """
    tokenizer = tokenizer_of_files({name: files[name] for name in (TOKENIZER_JSON, TOKENIZER_CONFIG)}, str(folder))
    if tokenizer.eos_id != trained.eos_id:
        raise ValueError(
            f"{folder}: {TOKENIZER_CONFIG} names the end token {tokenizer.eos_id}; the model was trained with "
            f"{trained.eos_id}, by {INFO} there"
        )
    if tokenizer.begin_ids != trained.begin_ids:
        notes.append(
            f"the exported tokenizer begins a text with the tokens {list(tokenizer.begin_ids)}; the documents of the "
            f"training began with {list(trained.begin_ids)}"
        )
    return tokenizer


def exported_elements(source: Place) -> int:
    """Elements of all parameters of a checkpoint."""
    reader = CheckpointReader(find_checkpoint(source))
    return sum(torch.Size(reader.shape(key)).numel() for key in reader.keys() if key.startswith(_MASTER))


def _weights(reader: CheckpointReader, config: ModelConfig, plain: bool, export: Export) -> dict[str, Weight]:
    """What the checkpoint's parameters become, by our names: all of the model's, and no others.

    Raises:
        ValueError: a parameter is missing, has another shape, or has no place in the exported model.
    """
    weights = backbone_weights(config, reader.summary.vocab_size)
    shapes = {key.removeprefix(_MASTER): reader.shape(key) for key in reader.keys() if key.startswith(_MASTER)}
    if missing := [name for name in weights if name not in shapes]:
        raise CheckpointError(f"{reader.folder} holds no {some(missing)}")
    memory = {name: memory_weight(name, shape) for name, shape in shapes.items() if name not in weights}
    mixing = "beta" if config.memory.mix_gate == "head" else "mix_gate.weight"
    parts = {name.split(".attention.")[1] for name in memory} | ({mixing} if config.memory.rule != "none" else set())
    expected = {f"layers.{layer}.attention.{part}" for layer in memory_layers(config) for part in parts}
    if missing := sorted(expected - memory.keys()):
        raise CheckpointError(f"{reader.folder} holds no {some(missing)}")
    for name, weight in weights.items():
        if tuple(shapes[name]) != weight.shape:
            raise CheckpointError(f"{reader.folder}: {name} has shape {shapes[name]}; its model's has {weight.shape}")
    if plain:
        if memory:
            count = sum(torch.Size(weight.shape).numel() for weight in memory.values())
            export.notes.append(
                f"--plain leaves out the memory: {len(memory)} parameters ({count:,} numbers), {some(sorted(memory))}"
                ". The plain model attends to all of its context instead"
            )
        memory = {}
    exported = (weights | memory).values()
    export.parameters = sum(torch.Size(shape).numel() for weight in exported for shape in weight.hf_shapes)
    return weights | memory


def _plan(weights: dict[str, Weight], shard_bytes: int) -> list[_Shard]:
    """Which parameter goes into which file."""
    shards = [_Shard()]
    for name, weight in weights.items():
        size = 4 * sum(torch.Size(shape).numel() for shape in weight.hf_shapes)
        if shards[-1].weights and shards[-1].bytes + size > shard_bytes:
            shards.append(_Shard())
        shards[-1].weights.append((name, weight))
        shards[-1].bytes += size
    return shards


def _write_weights(
    folder: Path, shards: list[_Shard], reader: CheckpointReader, progress: Callable[[int], None]
) -> None:
    """Write the safetensors files and, with several of them, their index."""
    places = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        shapes = {
            hf_name: shape
            for _, weight in shard.weights
            for hf_name, shape in zip(weight.hf_names, weight.hf_shapes, strict=True)
        }
        places |= dict.fromkeys(shapes, name)
        with writing(folder / name) as out:
            file = TensorFile(out, shapes, metadata={"format": "pt"})
            for own_name, weight in shard.weights:
                whole = reader.whole_tensor(_MASTER + own_name).to(torch.float32)  # the masters, but for fp64 runs
                for hf_name, tensor in zip(weight.hf_names, weight.to_hf(whole), strict=True):
                    if bad := tensor.numel() - int(torch.isfinite(tensor).sum()):
                        raise CheckpointError(
                            f"{reader.folder}: {own_name} ({hf_name}) holds {bad:,} of {tensor.numel():,} numbers that "
                            "are NaN or infinite in float32: take an earlier checkpoint"
                        )
                    file.write(hf_name, tensor)
                progress(whole.numel())
    if len(shards) > 1:
        total = sum(shard.bytes for shard in shards)
        content = {"metadata": {"total_size": total}, "weight_map": places}
        write_whole(folder / INDEX, as_json(content))


def _code() -> dict[str, bytes]:
    """The files that `trust_remote_code` runs."""
    folder = Path(exported.__path__[0])
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*_infini.py"))}
