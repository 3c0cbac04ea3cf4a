"""The JSON files of a Hugging Face folder, each declared once: what is believed of them before anything is built.

Only what this project reads is declared; other keys may be there. The bounds are far beyond any model, and small enough
that whatever is made of the numbers afterwards ends.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from data.files import FileError, Place, StorePath, convert, inside, read_bytes, read_json

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
INDEX = "model.safetensors.index.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"

SETTINGS_LIMIT = 16 << 20
"""Bytes of a file of settings. Those of tokenizers with thousands of added tokens have some hundred kilobytes."""

T = TypeVar("T")

Layers = Annotated[int, msgspec.Meta(ge=1, le=4096)]
Heads = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
Width = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
Tokens = Annotated[int, msgspec.Meta(ge=1, le=1 << 48)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e15)]
Theta = Annotated[float, msgspec.Meta(gt=1, le=1e15)]
TokenId = Annotated[int, msgspec.Meta(ge=-(1 << 31), le=1 << 31)]
"""Folders with -1 for 'no such token' exist."""
TokenIds = TokenId | Annotated[list[TokenId], msgspec.Meta(max_length=4096)] | None
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Template = Annotated[str, msgspec.Meta(max_length=1 << 20)]


class Rope(msgspec.Struct):
    """`rope_parameters` (transformers 5) or `rope_scaling` (before)."""

    rope_type: Text | None = None
    type: Text | None = None
    rope_theta: Theta | None = None
    partial_rotary_factor: float | None = None
    factor: Positive | None = None
    original_max_position_embeddings: Tokens | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: Annotated[float, msgspec.Meta(ge=0, le=1e15)] | None = None
    mscale_all_dim: Annotated[float, msgspec.Meta(ge=0, le=1e15)] | None = None
    truncate: bool | None = None


class ModelSettings(msgspec.Struct):
    """`config.json`. A setting that is missing is null here; what it means then is the model's class to say."""

    model_type: Text | None = None
    num_hidden_layers: Layers | None = None
    hidden_size: Width | None = None
    intermediate_size: Width | None = None
    num_attention_heads: Heads | None = None
    num_key_value_heads: Heads | None = None
    head_dim: Heads | None = None
    vocab_size: Width | None = None
    max_position_embeddings: Tokens | None = None
    rms_norm_eps: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    initializer_range: Annotated[float, msgspec.Meta(ge=0, le=1e3)] | None = None
    hidden_act: Text | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    rope_theta: Theta | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: Tokens | None = None
    use_sliding_window: bool | None = None
    sliding_window: Tokens | None = None
    max_window_layers: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)] | None = None
    layer_types: Annotated[list[Text], msgspec.Meta(max_length=4096)] | None = None
    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None
    pad_token_id: TokenIds = None
    quantization_config: dict[str, Any] | None = None
    configuration_files: Any = None
    transformers_weights: Any = None
    auto_map: Any = None

    # A model that this project exported (see `model.huggingface.describe`).
    qkv_bias: bool | None = None
    qk_norm: bool | None = None
    segment_length: Annotated[int, msgspec.Meta(ge=1, le=1 << 30)] | None = None
    local_context: Text | None = None
    tokenizer_sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")] | None = None
    source_sliding_window: Tokens | None = None
    source_sliding_layers: Annotated[list[int], msgspec.Meta(max_length=4096)] | None = None
    memory_rule: Text | None = None
    memory_write_gate: Text | None = None
    memory_write_gate_bias: float = 0.0
    memory_short_convolution: bool | None = None
    memory_convolution_width: Annotated[int, msgspec.Meta(ge=2, le=16)] = 4
    memory_num_householder: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    memory_mix_gate: Text | None = None
    memory_gate_floor: float = 0.0
    memory_beta_init: float = 0.0
    memory_skip_empty: bool = True
    memory_epsilon: float = 0.0


class WeightIndex(msgspec.Struct):
    """`model.safetensors.index.json`: the file of every tensor."""

    weight_map: Annotated[dict[str, Text], msgspec.Meta(min_length=1, max_length=1 << 20)]


class AddedToken(msgspec.Struct, forbid_unknown_fields=True):
    """A token with how it is found in a text."""

    content: Text
    type_: Text | None = msgspec.field(name="__type", default=None)
    id: TokenId | None = None
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False
    special: bool = False


Token = Text | AddedToken
NamedToken = Token | None
ExtraTokens = list[Token] | dict[str, Token] | None


class NamedTemplate(msgspec.Struct, forbid_unknown_fields=True):
    """One of several chat templates."""

    name: Text
    template: Template


class SpecialTokens(msgspec.Struct):
    """`special_tokens_map.json`."""

    bos_token: NamedToken = None
    eos_token: NamedToken = None
    unk_token: NamedToken = None
    sep_token: NamedToken = None
    pad_token: NamedToken = None
    cls_token: NamedToken = None
    mask_token: NamedToken = None
    additional_special_tokens: ExtraTokens = None
    extra_special_tokens: ExtraTokens = None


class TokenizerSettings(SpecialTokens):
    """`tokenizer_config.json`, as far as it is carried: names of tokens, how text is cut, templates. No code.

    What is not declared here does not leave an import or an export.
    """

    tokenizer_class: Text | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    added_tokens_decoder: dict[str, AddedToken] | None = None
    chat_template: Template | list[NamedTemplate] | dict[str, Template] | None = None
    clean_up_tokenization_spaces: bool | None = None
    errors: Text | None = None
    legacy: bool | None = None
    model_input_names: list[Text] | None = None
    model_max_length: int | float | None = None
    padding_side: Text | None = None
    spaces_between_special_tokens: bool | None = None
    split_special_tokens: bool | None = None
    truncation_side: Text | None = None
    use_default_system_prompt: bool | None = None


class GenerationSettings(msgspec.Struct):
    """`generation_config.json`, as far as it is carried: numbers that decide how a text is continued."""

    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None
    pad_token_id: TokenIds = None
    decoder_start_token_id: TokenIds = None
    forced_bos_token_id: TokenIds = None
    forced_eos_token_id: TokenIds = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    repetition_penalty: float | None = None
    length_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    num_beams: int | None = None
    num_return_sequences: int | None = None
    early_stopping: bool | None = None
    renormalize_logits: bool | None = None
    remove_invalid_values: bool | None = None
    guidance_scale: float | None = None
    use_cache: bool | None = None
    stop_strings: Text | list[Text] | None = None
    suppress_tokens: list[TokenId] | None = None
    begin_suppress_tokens: list[TokenId] | None = None
    bad_words_ids: list[list[TokenId]] | None = None


def read_settings(path: Path, kind: type[T]) -> tuple[T, dict[str, Any]]:
    """A file of settings, as declared and as it stands there.

    Raises:
        FileError: it is missing or not so; names the file and the key.
        OSError: it cannot be read.
    """
    try:
        raw = read_json(path, dict[str, Any], limit=SETTINGS_LIMIT)
    except FileNotFoundError:
        raise FileError(f"{path} is missing") from None
    return convert(raw, kind, str(path)), raw


def file_of(folder: Place, name: str, where: str) -> Place:
    """A file of a model's folder: inside it, or, where the folder is a snapshot in the hub's cache, one of its blobs.

    Args:
        where: what names the file, for messages.

    Raises:
        FileError: it is elsewhere.
    """
    return inside(folder, name, where, also=_blobs(folder))


def read_file(folder: Place, name: str, limit: int) -> bytes | None:
    """The contents of one of a model's files; None where there is none.

    Raises:
        FileError: it is too large, no regular file, or elsewhere (see `file_of`).
        OSError: it cannot be read.
    """
    path = file_of(folder, name, str(folder))
    try:
        return read_bytes(path, limit)
    except FileNotFoundError:
        return None


def _blobs(folder: Place) -> Path | None:
    """`blobs` of the hub's cache when `folder` is in one of its `snapshots`, whose files are links to it."""
    if isinstance(folder, StorePath):  # which has no links
        return None
    for parent in folder.resolve().parents:
        if parent.name == "snapshots":
            return parent.parent / "blobs"
    return None
