"""What a Hugging Face folder says of its tokens, beside the tokenizer itself: taken over as far as it is known.

The end token, the begin token and the chat template stand in up to five files, and transformers has an order for them;
it is followed here, and said where they differ. What goes on from an import to an export (`FILES`) are settings on a
list: names of tokens, templates, numbers. Whatever else is there, code and names of code above all, is left out and
said, because our exports are loaded with `trust_remote_code=True`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from data.files import FileError, Place, place, shown, some, write_whole
from data.tokenizer.library import TOKENIZER_LIMIT, open_backend
from data.tokenizer.special_tokens import TOKENIZER_FILES, begin_tokens, end_token
from data.tokenizer.tokenizer import TOKENIZER_JSON, Tokenizer, load_tokenizer
from pipeline.checkpoint.folder import find_checkpoint
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.huggingface.schema import (
    ADDED_TOKENS,
    CONFIG,
    GENERATION_CONFIG,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    GenerationSettings,
    ModelSettings,
    SpecialTokens,
    TokenId,
    TokenIds,
    TokenizerSettings,
    file_of,
    read_file,
    read_settings,
)

TOKEN_IDS = "token_ids.json"
"""In the folder of an imported tokenizer: what the model's `config.json` said of its tokens."""
CHAT_TEMPLATE = "chat_template.jinja"
CHAT_TEMPLATES = "additional_chat_templates"

TEMPLATE_LIMIT = 1 << 20

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DEFAULT_IDS = {"bos_token_id": 1, "eos_token_id": 2}
"""Of a Llama or a Mistral whose `config.json` says nothing."""
_SAYS_NOTHING = ("transformers_version", "_from_model_config", "_commit_hash", "name_or_path", "backend", "is_local")
_SAYS_NOTHING += ("local_files_only", "output_attentions", "output_hidden_states", "output_scores", "output_logits")
_SAYS_NOTHING += ("return_dict_in_generate",)
"""Left out without a word."""
_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend", "LlamaTokenizer", "CodeLlamaTokenizer", "Qwen2Tokenizer")
_CLASSES += ("GPT2Tokenizer", "GPTNeoXTokenizer", "GemmaTokenizer", "CohereTokenizer")
_PLAIN_CLASS = "PreTrainedTokenizerFast"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_COMPANIONS = (TOKENIZER_CONFIG, GENERATION_CONFIG, TOKEN_IDS, CHAT_TEMPLATE, SPECIAL_TOKENS_MAP, CONFIG)


class Ids(msgspec.Struct):
    """`token_ids.json`."""

    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None
    pad_token_id: TokenIds = None


@dataclass
class SourceTokens:
    """What goes with a tokenizer."""

    tokenizer: Tokenizer | None = None
    """As the folder means it."""
    files: dict[str, bytes] = field(default_factory=dict)
    """What else goes into the folder of an imported tokenizer, by name."""
    notes: list[str] = field(default_factory=list)
    """What differs and what was left out, for people."""
    begin_id: int | None = None
    """The begin token that the folder names, whether or not the tokenizer puts it before a text."""

    @property
    def ids(self) -> dict[str, Any]:
        """What `config.json` says of the tokens; empty when that is not known."""
        return json.loads(self.files.get(TOKEN_IDS, b"{}"))

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end a text of the model's, as transformers generates: those of `generation_config.json`, else
        those of `config.json`."""
        generation = json.loads(self.files.get(GENERATION_CONFIG, b"{}"))
        return _declared(generation, "eos_token_id") or _declared(self.ids, "eos_token_id")


def read_tokens(folder: Place) -> SourceTokens:
    """The tokenizer of a Hugging Face folder, or of an imported model.

    Raises:
        FileError: a file is damaged, or they contradict one another where transformers has no order for them.
        ValueError: there is no tokenizer, or no end token can be told.
        OSError: a file cannot be read.
    """
    files = {name: read_file(folder, name, TOKENIZER_LIMIT) for name in TOKENIZER_FILES}
    files = {name: content for name, content in files.items() if content is not None}
    definition = files.get(TOKENIZER_JSON)
    if definition is None:
        raise ValueError(
            f"{folder} holds no tokenizer.json; `AutoTokenizer.from_pretrained({str(folder)!r})"
            f".save_pretrained({str(folder)!r})` of transformers makes one from a tokenizer.model"
        )
    where = str(folder)
    backend = open_backend(definition, where)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    tokens = SourceTokens()
    model = _read(folder, CONFIG, ModelSettings)
    settings = _special_tokens(folder, tokens.notes)
    _check_added_tokens(folder, settings, vocabulary)
    generation = _read(folder, GENERATION_CONFIG, GenerationSettings)
    ids = _ids(model) if model else _read(folder, TOKEN_IDS, Ids)
    eos_id = end_token(backend, files, where)
    places = ((CONFIG, model or ids), (GENERATION_CONFIG, generation))
    said = {name: _declared(source, "eos_token_id") for name, source in places}
    _say_end_token(folder, settings, (eos_id, backend.id_to_token(eos_id)), said, tokens.notes)
    _begin_token(folder, settings, vocabulary, ids, generation, tokens.notes)
    begin_ids = begin_tokens(backend, eos_id, where)
    tokens.tokenizer = Tokenizer("hf", eos_id, definition, begin_ids, where=where, backend=backend)

    templates = _templates(folder, settings, tokens.notes)
    config_name = folder / TOKENIZER_CONFIG
    declared = settings.pop("tokenizer_class", None) or (model or {}).get("tokenizer_class")
    carried = _known(settings, TokenizerSettings, config_name, tokens.notes)
    carried = {"tokenizer_class": _class(declared, model or {}, config_name, tokens.notes)} | carried
    carried = _in_vocabulary(carried, vocabulary, config_name, tokens.notes)
    tokens.files = {TOKENIZER_CONFIG: as_json(carried)} | templates
    if carried.get("bos_token") is not None:
        tokens.begin_id = vocabulary[_content(carried["bos_token"])]
    if generation is not None:
        known = _known(generation, GenerationSettings, folder / GENERATION_CONFIG, tokens.notes)
        tokens.files[GENERATION_CONFIG] = as_json(known)
    if ids is not None:
        tokens.files[TOKEN_IDS] = as_json(ids)
    return tokens


def source_tokens(folder: Place, tokenizer: Tokenizer, init_from: str | None) -> SourceTokens:
    """What an imported model came with, for a tokenizer of a checkpoint.

    It stands beside the tokenizer, or, where that is a prepared set's, in the folder that the run began with: an
    import, or a run that began with one. Nothing where there is no such thing.

    Args:
        folder: where the tokenizer was loaded from.
        init_from: `train.init_from` of the checkpoint's configuration.
    """
    if tokenizer.kind == "byte":
        return SourceTokens()
    if any((folder / name).exists() for name in _COMPANIONS):
        return read_tokens(folder)
    tokens = SourceTokens()
    seen: set[str] = set()
    while init_from is not None and init_from not in seen:
        seen.add(init_from)
        try:
            reader = CheckpointReader(find_checkpoint(place(init_from)))
        except (ValueError, OSError) as error:
            tokens.notes.append(
                f"train.init_from = {init_from} cannot be read ({error}): the chat template, the end tokens and the "
                "generation settings that its model came with, if any, are left out; --tokenizer names their folder"
            )
            break
        beside = reader.folder.parent.parent / "tokenizer"
        if any((beside / name).exists() for name in _COMPANIONS):
            if load_tokenizer(beside).hash == tokenizer.hash:
                tokens = read_tokens(beside)
                tokens.notes.append(f"what goes with the tokenizer is from {beside}")
            else:
                tokens.notes.append(
                    f"{beside} is another tokenizer than the training data's: its chat template, end tokens and "
                    "generation settings are left out"
                )
            break
        init_from = reader.config.train.init_from
    return tokens


def write_folder(folder: Path, definition: bytes, tokenizer: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """A folder for `read_tokens`, from a tokenizer and settings that came from elsewhere."""
    files = {TOKENIZER_JSON: definition, TOKENIZER_CONFIG: as_json(tokenizer), CONFIG: as_json(model)}
    for name, content in files.items():
        write_whole(folder / name, content)


def as_json(content: Mapping[str, Any]) -> bytes:
    """As transformers writes its files."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _read(folder: Path, name: str, kind: type) -> dict[str, Any] | None:
    """A file of settings, of the declared types; None where there is none."""
    path = file_of(folder, name, str(folder))
    return read_settings(path, kind)[1] if path.exists() else None


def _special_tokens(folder: Path, notes: list[str]) -> dict[str, Any]:
    """`tokenizer_config.json` with the special tokens of `special_tokens_map.json`, which count where the former has no
    `added_tokens_decoder`."""
    settings = _read(folder, TOKENIZER_CONFIG, TokenizerSettings) or {}
    if names := settings.get("fast_tokenizer_files"):
        if names != [TOKENIZER_JSON]:
            raise FileError(
                f"{folder / TOKENIZER_CONFIG}: fast_tokenizer_files = {shown(names)}: transformers would choose among "
                f"them by its version; leave {TOKENIZER_JSON} alone, and the setting out"
            )
        del settings["fast_tokenizer_files"]
    listed = _read(folder, SPECIAL_TOKENS_MAP, SpecialTokens) or {}
    listed = {name: value for name, value in listed.items() if name in (*_NAMED, *_LISTS)}
    wins = "added_tokens_decoder" not in settings
    for name in _NAMED:
        ours, theirs = settings.get(name), listed.get(name)
        if None not in (ours, theirs) and _content(ours) != _content(theirs):
            files = (SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG) if wins else (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP)
            notes.append(
                f"{folder}: {name} is {shown(_content(theirs if wins else ours))} in {files[0]} and "
                f"{shown(_content(ours if wins else theirs))} in {files[1]}: the former counts, as in transformers"
            )
    if not wins:
        return settings
    typed = {name: value | {"__type": "AddedToken"} if name in _NAMED and isinstance(value, dict) else value
             for name, value in listed.items()}  # fmt: skip
    return settings | typed


def _check_added_tokens(folder: Path, settings: Mapping[str, Any], vocabulary: Mapping[str, int]) -> None:
    """Tokens that are added beside the tokenizer must be in it, or transformers' tokenizer is another one."""
    if "added_tokens_decoder" in settings:
        decoder = settings["added_tokens_decoder"] or {}
        place, added = TOKENIZER_CONFIG, [(token["content"], number) for number, token in decoder.items()]
    else:
        place, added = ADDED_TOKENS, list((_read(folder, ADDED_TOKENS, dict[str, TokenId]) or {}).items())
    for content, number in added:
        if str(vocabulary.get(content)) != str(number):
            raise FileError(
                f"{folder / place} says that token {shown(number)} is {shown(content)}; {TOKENIZER_JSON} says "
                f"{'nothing of it' if content not in vocabulary else f'that it is token {vocabulary[content]}'}: save "
                "the tokenizer again with save_pretrained"
            )


def _ids(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a `config.json` says of its tokens, the defaults of its class included."""
    defaults = _DEFAULT_IDS if model.get("model_type") in ("llama", "mistral") else {}
    return {name: model.get(name, defaults.get(name)) for name in _IDS if name in model or name in defaults}


def _declared(source: Mapping[str, Any] | None, name: str) -> list[int]:
    value = (source or {}).get(name)
    return [] if value is None else value if isinstance(value, list) else [value]


def _say_end_token(
    folder: Path,
    settings: dict[str, Any],
    own: tuple[int, str],
    said: Mapping[str, list[int]],
    notes: list[str],
) -> None:
    """Say where the model's files name other end tokens than the tokenizer's `own`, id and text; each goes on as it is.

    A tokenizer that names none gets the one that was found into its `settings`.
    """
    number, content = own
    if settings.get("eos_token") is None:
        settings["eos_token"] = content
        places = [name for name, ids in said.items() if number in ids]
        found = f"of {' and '.join(places)}" if places else "of the vocabulary, because no file names any"
        notes.append(f"{folder}: the tokenizer names no end token; {shown(content)} ({number}) {found} ends documents")
    if others := {name: ids for name, ids in said.items() if ids and set(ids) != {number}}:
        listed = ", ".join(f"{name} says {some(map(str, ids))}" for name, ids in others.items())
        notes.append(
            f"{folder}: the tokenizer's end token is {shown(content)} ({number}); {listed}. Documents end with the "
            "tokenizer's; an export says what each file says now"
        )


def _begin_token(
    folder: Path,
    settings: Mapping[str, Any],
    vocabulary: Mapping[str, int],
    ids: Mapping[str, Any] | None,
    generation: Mapping[str, Any] | None,
    notes: list[str],
) -> None:
    """Say where the tokenizer's begin token and the model's differ; both go on as they are."""
    token = settings.get("bos_token")
    if token is None:
        return
    if _content(token) not in vocabulary:
        raise FileError(f"{folder}: bos_token is {shown(_content(token))}, which {TOKENIZER_JSON} does not have")
    own = vocabulary[_content(token)]
    found = {CONFIG: _declared(ids, "bos_token_id"), GENERATION_CONFIG: _declared(generation, "bos_token_id")}
    if others := {name: x for name, x in found.items() if x and x != [own]}:
        listed = ", ".join(f"{name} says {some(map(str, x))}" for name, x in others.items())
        notes.append(f"{folder}: the tokenizer's begin token is {shown(_content(token))} ({own}); {listed}")


def _templates(folder: Path, settings: dict[str, Any], notes: list[str]) -> dict[str, bytes]:
    """Chat templates in files of their own, before which the one in `settings` does not count."""
    found = {CHAT_TEMPLATE: read_file(folder, CHAT_TEMPLATE, TEMPLATE_LIMIT)}
    extra = folder / CHAT_TEMPLATES
    if extra.is_dir():
        for path in sorted(extra.glob("*.jinja")):
            if not re.fullmatch(r"[\w.-]{1,64}\.jinja", path.name):
                raise FileError(f"{path}: a template's name has letters, digits, dots and dashes")
            name = f"{CHAT_TEMPLATES}/{path.name}"
            found[name] = read_file(folder, name, TEMPLATE_LIMIT)
    templates = {name: content for name, content in found.items() if content is not None}
    for name, content in templates.items():
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FileError(f"{folder / name} is not text in UTF-8: {error.reason} at byte {error.start:,}") from None
    if templates and (other := settings.pop("chat_template", None)) is not None:
        if not isinstance(other, str) or other.encode() != templates.get(CHAT_TEMPLATE):
            notes.append(
                f"{folder}: {some(templates)} and {TOKENIZER_CONFIG} have different chat templates: the former "
                "count, as in transformers"
            )
    return templates


def _known(settings: Mapping[str, Any], kind: type, where: Path, notes: list[str]) -> dict[str, Any]:
    """The settings that `kind` declares; says which others there were."""
    declared = {entry.encode_name for entry in msgspec.structs.fields(kind)}
    # Names of a model's own tokens, such as image_token, are names like any other.
    own = {name for name, value in settings.items() if name.endswith("_token") and isinstance(value, str)}
    own = own if kind is TokenizerSettings else set()
    left_out = [name for name in settings if name not in declared | own and name not in _SAYS_NOTHING]
    if left_out:
        notes.append(
            f"{where}: left out: {some(map(shown, left_out))} ({len(left_out)} setting(s) that are not "
            "known to be harmless)"
        )
    return {name: value for name, value in settings.items() if name in declared | own}


def _class(declared: Any, model: Mapping[str, Any], where: Path, notes: list[str]) -> str:
    """The tokenizer's class: the one that transformers takes for the folder, of those that are known here."""
    kind = model.get("model_type")
    if kind == "mistral":  # whatever the folder says
        return _PLAIN_CLASS
    if declared is None:
        return "Qwen2Tokenizer" if kind in ("qwen2", "qwen3") else _PLAIN_CLASS
    if not isinstance(declared, str) or declared.removesuffix("Fast") not in _CLASSES:
        notes.append(
            f"{where}: tokenizer_class = {shown(declared)} is not known here and left out: {_PLAIN_CLASS}, which goes "
            f"by {TOKENIZER_JSON} alone"
        )
        return _PLAIN_CLASS
    return declared


def _in_vocabulary(
    settings: dict[str, Any], vocabulary: Collection[str], where: Path, notes: list[str]
) -> dict[str, Any]:
    """Without special tokens that are no tokens: transformers would add them, past the model's embedding."""
    strange = [
        name
        for name, value in settings.items()
        if name.endswith("_token") and name not in ("add_bos_token", "add_eos_token")
        if value is not None and _content(value) not in vocabulary
    ]
    kept = {name: value for name, value in settings.items() if name not in strange}
    for name in _LISTS:
        if value := kept.get(name):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            known = {key: token for key, token in items if _content(token) in vocabulary}
            if len(known) < len(value):
                strange.append(f"{len(value) - len(known)} of {name}")
            kept[name] = known if isinstance(value, dict) else list(known.values())
    if strange:
        notes.append(f"{where}: left out: {some(strange)}: {TOKENIZER_JSON} has no such token")
    return kept


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token
