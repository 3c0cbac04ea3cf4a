"""Checkpoints that hold weights alone: written by an import, and what a new run may start from.

They are checkpoints like any other (`pipeline.checkpoint.reader`), of step 0, without moments, memory, lanes or random
states.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from data.files import sealed, some, write_whole, writing
from model.config import saved_shape
from model.huggingface.weights import backbone_weights
from model.sharding import partition_named, partition_of
from pipeline.checkpoint.folder import SUMMARY, CheckpointError, checkpoint_name
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.schema import FORMAT_VERSION
from pipeline.checkpoint.tensor_file import TensorFile
from pipeline.checkpoint.writer import file_facts, move_latest
from pipeline.config.schema import Config
from pipeline.parallel.optimizer import ZeroOptimizer
from pipeline.parallel.setup import versions
from pipeline.parallel.topology import Topology

FILE_BYTES = 2 << 30
"""Files are cut at about this size, so that many processes can share the hashing."""


def write_weights(
    folder: Path,
    config: Config,
    vocab_size: int,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    *,
    source: Mapping[str, Any],
    tokenizer_sha256: str | None,
) -> Path:
    """Write a checkpoint of step 0 into `folder` (a run's `checkpoints`), one tensor at a time.

    Args:
        config: the configuration that the weights belong to.
        vocab_size: tokens, without padding.
        shapes: of all parameters, whole, by global name.
        read: gives a parameter, whole, float32.
        source: where they came from; kept in `checkpoint.json`.
        tokenizer_sha256: `Tokenizer.hash` of what the token ids mean; None when nobody knows.

    Returns:
        The checkpoint's folder.
    """
    path = folder / checkpoint_name(0)
    path.mkdir(parents=True)
    files: dict[str, Any] = {}
    for number, names in enumerate(_parts(shapes)):
        tensors = path / f"weights_{number:05d}.safetensors"
        with writing(tensors) as out:
            file = TensorFile(out, {f"master/{name}": (math.prod(shapes[name]),) for name in names})
            for name in names:
                file.write(f"master/{name}", read(name).flatten())
            files[tensors.name] = file.facts()
        index = path / f"weights_{number:05d}.json"
        text = json.dumps({"tensors": [_entry(name, shapes[name]) for name in names], "lanes": {}}).encode()
        write_whole(index, text)
        files[index.name] = file_facts(text)
    content = {
        "format_version": FORMAT_VERSION,
        "step": 0,
        "tokens": 0,
        "windows": 0,
        "recent_losses": [],
        "optimizer_steps": 0,
        "weights_only": True,
        "source": dict(source),
        "files": files,
        "layout": {"tensor": 1, "pipeline": 1, "data": 1, "zero_stage": 0, "world_size": 1},
        "vocab_size": vocab_size,
        "tokenizer_sha256": tokenizer_sha256,
        "config": asdict(config),
        "versions": versions(),
    }
    write_whole(path / SUMMARY, json.dumps(sealed(content), indent=1))
    move_latest(path)
    return path


def start_from(
    reader: CheckpointReader, optimizer: ZeroOptimizer, topology: Topology, config: Config, vocab_size: int
) -> list[str]:
    """Give a new run the weights of a checkpoint: its parameters and nothing else.

    The memory's parameters keep their initial values where the checkpoint has none (its run had no memory, or no write
    gate), or none that were trained (an imported plain model).

    Returns:
        Notes about what started from its initial value.

    Raises:
        CheckpointError: the model is another one; names every setting that differs.
    """
    problems = model_differences(reader, config, vocab_size)
    if problems:
        raise CheckpointError(f"{reader.folder} cannot start this run: " + "; ".join(problems))
    backbone = backbone_weights(config.model, vocab_size).keys()
    held = {key.removeprefix("master/") for key in reader.keys() if key.startswith("master/")}
    untrained = reader.summary.source.memory == "initial"
    usable = held & backbone if untrained else held
    own = set().union(*topology.over_stages({name for name, _ in optimizer.stage.global_parameters()}))
    if missing := sorted((own & backbone) - held):
        raise CheckpointError(f"{reader.folder} holds no {', '.join(missing)}")
    if extra := sorted(usable - own):
        raise CheckpointError(
            f"{reader.folder} holds {some(extra, 4)}, which this run's model does not have: model.memory must be as it "
            "was trained"
        )
    optimizer.set_steps_taken(0, 0)
    for fragment in optimizer.fragments():
        if fragment.name not in usable:
            continue
        shape, partition = optimizer.local_shape(fragment.parameter), partition_of(fragment.parameter)
        master, place = fragment.tensors["master"], (topology.tensor_rank, topology.tensor_size)
        # The padding behind the tokens may be another one here.
        rows = vocab_size if fragment.name in ("embedding.weight", "output.weight") else None
        bounds = fragment.start, fragment.start + master.numel()
        master.copy_(reader.local_range(f"master/{fragment.name}", shape, partition, *place, *bounds, rows=rows))
    optimizer.refresh_parameters()
    notes = [f"weights from {reader.folder}, step {reader.summary.step}"]
    if initial := sorted({name.split(".attention.", 1)[-1] for name in own - usable}):
        notes.append(f"not in those weights, initial values in every layer: {', '.join(initial)}")
    return notes


def model_differences(reader: CheckpointReader, config: Config, vocab_size: int) -> list[str]:
    """What keeps a checkpoint's weights from being this model's; empty when nothing does.

    The segment length, the padding of the vocabulary, how the memory starts and (before its parameters are trained)
    which memory it is may differ.
    """
    saved, current, summary = asdict(reader.config.model), asdict(config.model), reader.summary
    for model in (saved, current):
        _, _, model["num_query_groups"], model["kv_channels"] = saved_shape(model)
    names = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size")
    names += ("tie_embeddings", "qkv_bias", "qk_norm", "rope_base", "rope_scaling", "norm_epsilon")
    problems = [
        f"model.{name} is {current[name]!r} here, {saved[name]!r} there"
        for name in names
        if current[name] != saved[name]
    ]
    if summary.vocab_size != vocab_size:
        problems.append(f"the vocabulary has {vocab_size} tokens here, {summary.vocab_size} there")
    trained = summary.source.memory != "initial"
    for name in ("rule", "write_gate"):
        ours, theirs = current["memory"][name], saved["memory"][name]
        if trained and theirs != "none" and ours != theirs:
            problems.append(f"model.memory.{name} is {ours!r} here, {theirs!r} there")
    return problems


def _parts(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    parts: list[list[str]] = []
    size = FILE_BYTES
    for name, shape in shapes.items():
        if size >= FILE_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += 4 * math.prod(shape)
    return parts


def _entry(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    partition = partition_named(name)
    return {
        "key": f"master/{name}",
        "start": 0,
        "count": math.prod(shape),
        "local_shape": list(shape),
        "partition_dim": partition.dim,
        "partition_stride": partition.stride,
        "tensor_rank": 0,
        "tensor_size": 1,
    }
