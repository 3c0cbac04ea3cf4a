"""A Hugging Face model (folder or GGUF file) as a checkpoint that runs start from, one tensor at a time.

Everything is checked before anything is written, and the folder gets its name when it is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from data.tokenizer import Tokenizer, load_tokenizer
from model.config import MemoryConfig, ModelConfig
from model.hf_config import is_exported, model_config
from model.hf_weights import Weight, backbone_weights, memory_weight
from pipeline.config import Config, OptimizerConfig, TrainConfig
from pipeline.config_yaml import dump
from pipeline.hf_source import ModelSource, open_source
from pipeline.initial_memory import memory_parameters
from pipeline.validate import validate
from pipeline.weights import write_weights

BETA_LR_SCALE = 100.0
"""In the configuration that an import writes: with the backbone's rate beta stays where it starts."""

_IGNORED = ("rotary_emb.inv_freq",)
"""Tensors that older exports carry and that follow from the configuration."""
_LISTED = 5


def import_model(
    source: Path,
    out: Path,
    *,
    memory: MemoryConfig | None,
    segment_length: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Read a model and write `out`: `config.yaml`, `tokenizer/`, `checkpoints/step_00000000/`.

    A process group must be there (a world of one).

    Args:
        source: folder of a Hugging Face model, or a GGUF file of the Llama family.
        out: folder that does not exist yet.
        memory: what a plain model does not have; None for a model that this project exported, which keeps its own.
        segment_length: tokens that the local attention sees; None: see `model.hf_config.model_config`.
        progress: called with the number of elements read, parameter by parameter.

    Returns:
        What a reader should know, as lines.

    Raises:
        ValueError: the model is not one that this decoder covers, is damaged or incomplete; or the tokenizer does not
            fit. Nothing has been written then.
        OSError: something cannot be read or written; `out` is not there then.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already: choose another folder")
    opened = open_source(source)
    model = model_config(opened.config, source=opened.config_name, segment_length=segment_length, memory=memory)
    config = Config(
        name=out.name,
        model=model,
        train=TrainConfig(init_from=str(out)),
        optimizer=OptimizerConfig(lr=5e-5, beta_lr_scale=BETA_LR_SCALE),
    )
    validate(config, data_exists=False)
    weights = backbone_weights(model, model.vocab_size)
    initial = memory_parameters(config, model.vocab_size)
    trained = _trained_memory(opened, initial)
    _check_tensors(opened, weights | trained)
    notes = _check_tied(opened, model)
    tokenizer_files = opened.tokenizer_files()

    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        tokenizer = _write_tokenizer(partial / "tokenizer", tokenizer_files)
        if tokenizer.vocab_size > model.vocab_size:
            raise ValueError(
                f"{opened.path}: the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding "
                f"{model.vocab_size}"
            )

        def read(name: str) -> Tensor:
            weight = weights.get(name) or trained.get(name)
            if weight is None:
                return initial[name]
            parts = [opened.read(hf_name) for hf_name in weight.hf_names]
            progress(sum(part.numel() for part in parts))
            return weight.from_hf(parts)

        shapes = {name: weight.shape for name, weight in weights.items()}
        shapes |= {name: tuple(tensor.shape) for name, tensor in initial.items()}
        origin = {"path": str(source), "model_type": opened.config["model_type"]}
        origin["memory"] = "trained" if trained else "initial"
        write_weights(partial / "checkpoints", config, model.vocab_size, shapes, read, source=origin)
        (partial / "config.yaml").write_text(_yaml(config, source), encoding="utf-8")
        if out.exists():
            out.rmdir()
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if tokenizer.vocab_size < model.vocab_size:
        notes.append(f"the embedding has {model.vocab_size - tokenizer.vocab_size} rows more than the tokenizer tokens")
    return notes


def parameter_elements(source: ModelSource) -> int:
    """Elements of all tensors."""
    return sum(torch.Size(shape).numel() for shape in source.shapes.values())


def _trained_memory(source: ModelSource, initial: dict[str, Tensor]) -> dict[str, Weight]:
    """The memory's parameters, where the source is an exported model of ours."""
    if not is_exported(source.config):
        return {}
    return {name: memory_weight(name, tensor.shape) for name, tensor in initial.items()}


def _check_tensors(source: ModelSource, weights: dict[str, Weight]) -> None:
    """Exactly the expected tensors, each with the expected shape.

    Raises:
        ValueError: names the first of each kind of trouble.
    """
    expected = {name: shape for w in weights.values() for name, shape in zip(w.hf_names, w.hf_shapes, strict=True)}
    given = {name: shape for name, shape in source.shapes.items() if not name.endswith(_IGNORED)}
    if "lm_head.weight" not in expected:
        given.pop("lm_head.weight", None)  # compared with the embedding in `_check_tied`
    problems = []
    if missing := [name for name in expected if name not in given]:
        problems.append(f"missing: {_some(missing)}")
    if extra := [name for name in given if name not in expected]:
        problems.append(f"not part of this decoder: {_some(extra)}")
    wrong = [
        f"{name} has shape {list(given[name])} where {source.config_name} means {list(shape)}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    if wrong:
        problems.append(_some(wrong))
    if problems:
        raise ValueError(f"{source.path}: " + "; ".join(problems))


def _check_tied(source: ModelSource, model: ModelConfig) -> list[str]:
    """An output matrix beside a tied embedding must be the same one."""
    if not model.tie_embeddings or "lm_head.weight" not in source.shapes:
        return []
    if not torch.equal(source.read("lm_head.weight"), source.read("model.embed_tokens.weight")):
        raise ValueError(
            f"{source.path}: tie_word_embeddings is true, but lm_head.weight is another matrix than "
            "model.embed_tokens.weight"
        )
    return ["lm_head.weight is the tied embedding once more and was left out"]


def _write_tokenizer(folder: Path, files: dict[str, bytes]) -> Tokenizer:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    tokenizer = load_tokenizer(folder)
    tokenizer.save(folder)
    return tokenizer


def _yaml(config: Config, source: Path) -> str:
    """The configuration of a run that continues from the import: complete but for the data."""
    sections = asdict(config)
    optimizer = {name: sections["optimizer"][name] for name in ("lr", "beta_lr_scale", "write_gate_lr_scale")}

    return (
        f"# Continues the pretraining of {source}.\n"
        f"#   infini prepare DOCUMENTS --out prepared/long --tokenizer {config.train.init_from}/tokenizer\n"
        f"#   infini train {config.train.init_from}/config.yaml data.sets.0.path=prepared/long --nproc N\n"
        + dump({"name": config.name, "run_dir": "runs/${name}"})
        + "\n# The model's own numbers; segment_length and the memory are ours to choose.\n"
        + dump({"model": sections["model"]})
        + "\n# Documents of many segments, tokenised with the tokenizer beside this file.\n"
        + dump({"data": {"sets": [{"path": "prepared/long"}]}})
        + "\n# The memory's parameters need a higher rate than pretrained weights.\n"
        + dump({"optimizer": optimizer})
        + "\n# init_from: the weights beside this file, with a fresh optimizer.\n"
        + dump({"train": {"init_from": config.train.init_from}})
    )


def _some(items: list[str]) -> str:
    return ", ".join(items[:_LISTED]) + (f" and {len(items) - _LISTED} more" if len(items) > _LISTED else "")
