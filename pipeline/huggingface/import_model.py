"""A Hugging Face model (folder or GGUF file) as a checkpoint that runs start from, one tensor at a time.

Everything is checked before anything is written, and the folder gets its name when it is whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from data.files import making_folder, some, write_whole
from data.tokenizer.tokenizer import Tokenizer
from model.config import MemoryConfig, ModelConfig
from model.huggingface.config import is_exported, model_config
from model.huggingface.weights import Weight, backbone_weights, memory_weight
from pipeline.checkpoint.memory_parameters import memory_parameters
from pipeline.checkpoint.weights_only import write_weights
from pipeline.config.load import ConfigError
from pipeline.config.schema import Config, OptimizerConfig, TrainConfig
from pipeline.config.validate import validate
from pipeline.config.yaml import dump
from pipeline.huggingface.folder_source import ModelSource, open_source
from pipeline.huggingface.tokens import SourceTokens

BETA_LR_SCALE = 100.0
"""In the configuration that an import writes: with the backbone's rate beta stays where it starts."""

_IGNORED = ("rotary_emb.inv_freq",)
"""Tensors that older exports carry and that follow from the configuration."""
_HF_NAMES = {
    "num_query_groups": "num_key_value_heads",
    "num_layers": "num_hidden_layers",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "rope_base": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
    "init_std": "initializer_range",
    **{name: name for name in ("num_attention_heads", "hidden_size", "vocab_size", "segment_length")},
}
"""What `config.json` calls our settings."""


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
        segment_length: tokens that the local attention sees; None: see `model.huggingface.config.model_config`.
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
    notes = list(opened.notes)
    model = model_config(
        opened.config, source=opened.config_name, segment_length=segment_length, memory=memory, notes=notes
    )
    config = Config(
        name=out.name,
        model=model,
        train=TrainConfig(init_from=str(out)),
        optimizer=OptimizerConfig(lr=5e-5, beta_lr_scale=BETA_LR_SCALE),
    )
    _validate(config, opened)
    # The files' shapes bound what is built from the configuration's numbers.
    backbone = backbone_weights(model, model.vocab_size)
    _check_tensors(opened, backbone, with_memory=is_exported(opened.config))
    initial = memory_parameters(config, model.vocab_size)
    trained = _trained_memory(opened, initial)
    weights = backbone | trained
    _check_tensors(opened, weights)
    notes += _check_tied(opened, model)
    tokens = opened.tokens()
    notes += tokens.notes
    _check_tokenizer(tokens.tokenizer, opened, model, notes)

    with making_folder(out) as partial:
        _write_tokenizer(partial / "tokenizer", tokens)

        def read(name: str) -> Tensor:
            weight = weights.get(name)
            if weight is None:
                return initial[name]
            parts = [_finite(opened, hf_name) for hf_name in weight.hf_names]
            progress(sum(part.numel() for part in parts))
            return weight.from_hf(parts)

        shapes = {name: weight.shape for name, weight in backbone.items()}
        shapes |= {name: tuple(tensor.shape) for name, tensor in initial.items()}
        origin = {"path": str(source), "model_type": opened.config["model_type"]}
        origin["memory"] = "trained" if trained else "initial"
        write_weights(
            partial / "checkpoints",
            config,
            model.vocab_size,
            shapes,
            read,
            source=origin,
            tokenizer_sha256=tokens.tokenizer.hash,
        )
        write_whole(partial / "config.yaml", _yaml(config, source))
    return notes


def parameter_elements(source: ModelSource) -> int:
    """Elements of all tensors."""
    return sum(torch.Size(shape).numel() for shape in source.shapes.values())


def _trained_memory(source: ModelSource, initial: dict[str, Tensor]) -> dict[str, Weight]:
    """The memory's parameters, where the source is an exported model of ours."""
    if not is_exported(source.config):
        return {}
    return {name: memory_weight(name, tensor.shape) for name, tensor in initial.items()}


def _validate(config: Config, source: ModelSource) -> None:
    """See `pipeline.config.validate`; what is wrong goes by the names of the file that says it."""
    try:
        validate(config, data_exists=False)
    except ConfigError as error:
        names = re.compile(r"\bmodel\.(\w+)")
        problems = [names.sub(lambda found: _HF_NAMES.get(found[1], found[0]), text) for text in error.problems]
        raise ValueError(f"{source.config_name}: " + "; ".join(problems)) from None


def _finite(source: ModelSource, name: str) -> Tensor:
    """A tensor of the source, without NaN and infinity.

    Raises:
        ValueError: there are some; names the file and the tensor, and says how many.
    """
    tensor = source.read(name)
    if bad := tensor.numel() - int(torch.isfinite(tensor).sum()):
        raise ValueError(
            f"{source.place(name)} holds {bad:,} of {tensor.numel():,} numbers that are NaN or infinite in float32: "
            "nothing can be computed with such a model"
        )
    return tensor


def _check_tensors(source: ModelSource, weights: dict[str, Weight], *, with_memory: bool = False) -> None:
    """Exactly the expected tensors, each with the expected shape.

    Args:
        with_memory: let tensors of a memory be there that `weights` does not have.

    Raises:
        ValueError: names the first of each kind of trouble.
    """
    expected = {name: shape for w in weights.values() for name, shape in zip(w.hf_names, w.hf_shapes, strict=True)}
    given = {name: shape for name, shape in source.shapes.items() if not name.endswith(_IGNORED)}
    if "lm_head.weight" not in expected:
        given.pop("lm_head.weight", None)  # compared with the embedding in `_check_tied`
    problems = []
    if missing := [name for name in expected if name not in given]:
        problems.append(f"missing: {some(missing)}")
    if extra := [name for name in given if name not in expected and not (with_memory and ".memory." in name)]:
        problems.append(f"not part of this decoder: {some(extra)}")
    wrong = [
        f"{name} has shape {list(given[name])} where {source.config_name} means {list(shape)}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    if wrong:
        problems.append(some(wrong))
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


def _check_tokenizer(tokenizer: Tokenizer, source: ModelSource, model: ModelConfig, notes: list[str]) -> None:
    """Refuse a tokenizer with tokens that the model lacks, or another one than the model was exported with."""
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"{source.path}: the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {model.vocab_size}"
        )
    if tokenizer.vocab_size < model.vocab_size:
        notes.append(f"the embedding has {model.vocab_size - tokenizer.vocab_size} rows more than the tokenizer tokens")
    named = source.config.get("tokenizer_sha256")
    if named is not None and named != tokenizer.hash:
        raise ValueError(
            f"{source.config_name}: tokenizer_sha256 is {named[:12]}..., but the tokenizer beside it is "
            f"{tokenizer.hash[:12]}...: another one than the model was exported with. Put the right one there, or take "
            "the setting out if the change is meant"
        )


def _write_tokenizer(folder: Path, tokens: SourceTokens) -> None:
    """Write the tokenizer and what goes with it."""
    tokens.tokenizer.save(folder)
    for name, content in tokens.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_whole(folder / name, content)


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
