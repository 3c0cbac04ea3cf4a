"""What a run is made of before its first step: the stage, the vocabulary, and what a resumed run must not change."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict, replace
from typing import Any

import torch.distributed as dist

from data.prepared.shards import PreparedSet
from model.backend import check_backend
from model.compiling import compile_block_attention, compile_pieces
from model.config import same_function
from model.decoder import DecoderStage, split_layers
from model.layers.decoder_layer import StageOptions
from model.rules.kernel import memory_kernel
from pipeline.config.derived import recomputes_logits
from pipeline.config.load import ConfigError
from pipeline.config.schema import Config
from pipeline.parallel.topology import Topology


def build_stage(config: Config, topology: Topology, vocab_size: int, *, drawn: bool = True) -> DecoderStage:
    """This process's part of the model, on its device.

    Args:
        drawn: with its initial values; else whoever calls gives all parameters their values.

    Raises:
        ValueError: a backend, a kernel or a compiler is asked for that this machine does not have.
    """
    memory_kernel(config.model, config.train.precision, topology.device.type)
    check_backend(config.model.backend, config.train.precision, topology.device.type)
    layers = split_layers(config.model.num_layers, topology.pipeline_size, config.parallel.layers_per_stage)
    first, last = layers[topology.pipeline_rank]
    options = StageOptions(
        precision=config.train.precision,
        recompute="none" if config.bptt.recompute == "window" else config.bptt.recompute,
        detach_reads=config.bptt.gradient == "detached",
        sequence_parallel=config.parallel.sequence_parallel,
        recompute_logits=recomputes_logits(config, dist.get_world_size(), vocab_size),
    )
    stage = DecoderStage(
        config.model,
        options,
        vocab_size=vocab_size,
        first_layer=first,
        last_layer=last,
        tensor_rank=topology.tensor_rank,
        tensor_size=topology.tensor_size,
        context=topology.context,
    )
    if drawn:
        stage.initialize(config.train.seed)
    stage.to(topology.device)
    if config.model.compile:
        compile_pieces(stage, topology.device)
    if config.model.packed_attention == "flex":
        compile_block_attention(stage, topology.device)
    return stage


def vocabulary(config: Config) -> int:
    """The model's vocabulary: the configured one, or that of the prepared data.

    Raises:
        ConfigError: the data has tokens that the model does not know.
    """
    sets = {entry.path: PreparedSet(entry.path).vocab_size for entry in config.data.sets}
    largest = max(sets.values())
    if config.model.vocab_size is None:
        return largest
    if config.model.vocab_size < largest:
        path = max(sets, key=sets.get)
        raise ConfigError(
            [f"model.vocab_size is {config.model.vocab_size}, but the tokenizer of {path} has {largest} tokens"]
        )
    return config.model.vocab_size


FIXED_FOR_A_RUN: dict[str, Any] = {
    "model": None,
    "train": ("lanes", "segments_per_window", "seed", "freeze_backbone_steps", "trainable"),
    "data": ("sets", "stagger", "packing"),
}
"""Sections (or keys of them) that a resumed run must share with its checkpoint: they decide what the saved numbers
mean. Everything else (layout, learning rate, intervals, number of steps, kernels) may change."""


def check_same_run(saved: Config, config: Config) -> None:
    """Refuse to resume with settings that contradict the checkpoint's, which has today's defaults where it is older.

    Raises:
        ConfigError: names every key that differs.
    """
    current, before = (asdict(replace(run, model=same_function(run.model))) for run in (config, saved))
    problems = []

    def compare(key: str, old: Any, new: Any) -> None:
        if isinstance(new, dict):
            for name in new:
                compare(f"{key}.{name}", old[name], new[name])
        elif old != new:
            problems.append(f"{key} is {new!r}, but the checkpoint was written with {old!r}")

    for section, keys in FIXED_FOR_A_RUN.items():
        for name in keys or current[section]:
            compare(f"{section}.{name}", before[section][name], current[section][name])
    if problems:
        raise ConfigError(problems)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    packages = ("infini-pretrain", "torch", "megatron-core", "deepspeed", "webdataset")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def written_for(config: Config, topology: Topology, vocab_size: int, tokenizer_sha256: str) -> dict[str, Any]:
    """What a checkpoint says of the run that wrote it."""
    return {
        "layout": {
            "tensor": topology.tensor_size,
            "pipeline": topology.pipeline_size,
            "context": topology.context_size,
            "data": topology.data_size,
            "zero_stage": config.parallel.zero_stage,
            "world_size": dist.get_world_size(),
        },
        "vocab_size": vocab_size,
        "tokenizer_sha256": tokenizer_sha256,
        "config": asdict(config),
        "versions": versions(),
    }
