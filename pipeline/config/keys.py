"""The settings as their dataclasses declare them: names, types, defaults, meanings, and what may have been meant."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_type_hints

from data.files import shown
from pipeline.config.schema import Config
from pipeline.config.values import list_item

SYNONYMS = {
    "adam_beta1": "optimizer.betas",
    "attention_bias": "model.qkv_bias",
    "batch_size": "train.lanes",
    "context_length": "model.segment_length",
    "cp": "parallel.context",
    "d_ff": "model.ffn_hidden_size",
    "d_model": "model.hidden_size",
    "dataset": "data.sets",
    "dim": "model.hidden_size",
    "dtype": "train.precision",
    "global_batch_size": "train.lanes",
    "grad_clip": "optimizer.clip",
    "gradient_checkpointing": "bptt.recompute",
    "head_dim": "model.kv_channels",
    "intermediate_size": "model.ffn_hidden_size",
    "iterations": "train.steps",
    "kv_heads": "model.num_query_groups",
    "learning_rate": "optimizer.lr",
    "max_grad_norm": "optimizer.clip",
    "max_steps": "train.steps",
    "micro_batch_size": "train.lanes_per_microbatch",
    "n_heads": "model.num_attention_heads",
    "n_layers": "model.num_layers",
    "num_hidden_layers": "model.num_layers",
    "num_key_value_heads": "model.num_query_groups",
    "output_dir": "run_dir",
    "pp": "parallel.pipeline",
    "rms_norm_eps": "model.norm_epsilon",
    "rope_theta": "model.rope_base",
    "save_interval": "checkpoint.interval",
    "seq_length": "model.segment_length",
    "sequence_length": "model.segment_length",
    "tie_word_embeddings": "model.tie_embeddings",
    "tp": "parallel.tensor",
    "train_data": "data.sets",
}
"""What other trainers and Hugging Face call a setting, by the last part of the key."""

_SUGGESTIONS = 3


class UnknownKey(KeyError):
    """No such setting; the message says what may have been meant."""

    def __str__(self) -> str:
        return self.args[0]


@dataclass(frozen=True)
class Setting:
    """A setting, as `infini config --help-keys` shows it."""

    key: str
    """Dotted; `*` stands for the number of a list's item."""
    kind: Any
    default: Any
    """`dataclasses.MISSING` where one must be given."""
    meaning: str


def settings(kind: type = Config, prefix: str = "") -> Iterator[Setting]:
    """Every single setting, in the order of the schema."""
    types, meanings = _fields(kind), field_meanings(kind)
    for item in dataclasses.fields(kind):
        key, declared = f"{prefix}{item.name}", types[item.name]
        if dataclasses.is_dataclass(declared):
            yield from settings(declared, f"{key}.")
        elif section := item_section(declared):
            yield from settings(section, f"{key}.*.")
        else:
            default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            missing = isinstance(default, str) and default == "???"
            yield Setting(key, declared, dataclasses.MISSING if missing else default, meanings.get(item.name, ""))


@functools.cache
def field_meanings(kind: type) -> dict[str, str]:
    """The texts that stand under the fields of a dataclass, by field."""
    body = ast.parse(inspect.getsource(kind)).body[0].body
    found = {}
    for field, text in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[field.target.id] = " ".join(text.value.value.split())
    return found


def type_at(key: str, root: type = Config) -> Any:
    """Declared type of a setting or section.

    Raises:
        UnknownKey: there is none.
    """
    kind: Any = root
    parts = key.split(".") if key else []
    for depth, part in enumerate(parts):
        if part.isascii() and part.isdigit() and (item := list_item(kind)) is not None:
            kind = item
            continue
        fields = _fields(kind) if dataclasses.is_dataclass(kind) else {}
        if part not in fields:
            raise UnknownKey(_unknown(key, ".".join(parts[:depth]), list(fields), root))
        kind = fields[part]
    return kind


def item_section(kind: Any) -> type | None:
    """The section that a list's items are, else None."""
    item = list_item(kind)
    return item if dataclasses.is_dataclass(item) else None


def suggestions(key: str, root: type = Config) -> list[str]:
    """Keys that somebody who wrote `key` may have meant, the likeliest first."""
    every = [setting.key.replace("*", "0") for setting in settings(root)]
    section, _, name = key.lower().rpartition(".")
    near = [k for k in every if k.startswith(f"{section}.")] if section else every
    direct = [k.rpartition(".")[2] for k in near if k.rpartition(".")[0] == section]
    found = [SYNONYMS[name]] if name in SYNONYMS else []
    found += [k for k in near if k not in found and _has_words(k, name)]
    found += [f"{section}.{m}" if section else m for m in difflib.get_close_matches(name, direct, n=_SUGGESTIONS)]
    # The right name in the wrong section, such as train.lr for optimizer.lr.
    found += [k for k in every if k.rpartition(".")[2] == name]
    found = found or [k for k in every if _has_words(k, name)] or difflib.get_close_matches(key, every, n=_SUGGESTIONS)
    return list(dict.fromkeys(found))[:_SUGGESTIONS]


@functools.cache
def _fields(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _unknown(key: str, section: str, valid: list[str], root: type) -> str:
    if not valid:
        return f"unknown key {shown(key)}: {section} is a single setting, not a section"
    if close := suggestions(key, root):
        return f"unknown key {shown(key)}; did you mean {' or '.join(close)}?"
    return f"unknown key {shown(key)}; valid in {section or 'the top level'}: {', '.join(valid)}"


def _has_words(key: str, name: str) -> bool:
    """Whether every word of `name` is one of the last part of `key`, in singular or plural."""
    words = {word.rstrip("s") for word in key.rpartition(".")[2].split("_")}
    return all(word.rstrip("s") in words for word in name.split("_"))
