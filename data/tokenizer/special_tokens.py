"""The tokens with which a Hugging Face tokenizer begins and ends a text, found where `transformers` finds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.files import FileError, decode_json, shown
from data.tokenizer.library import library

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (TOKENIZER_JSON, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, CONFIG, GENERATION_CONFIG)
"""Of a Hugging Face folder, what decides about its tokenizer here."""

_KNOWN_END = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""To look for in a folder that does not name its own."""


def end_token(backend: Any, files: Mapping[str, bytes], where: str) -> int:
    """The id of the token that ends a document.

    The order is that of transformers: `special_tokens_map.json` where the tokenizer's own configuration lists no
    `added_tokens_decoder` (those without are older), then `tokenizer_config.json`. Where neither names one,
    transformers has none; here it is the model's then, from the file that generation goes by, and last one of
    well-known name.

    Args:
        files: contents by name, see `TOKENIZER_FILES`.
        where: the folder, for messages.

    Raises:
        ValueError: none is declared, several are, or one that the tokenizer does not have.
    """
    settings = _settings(files, TOKENIZER_CONFIG, where)
    places = [(TOKENIZER_CONFIG, settings)]
    if "added_tokens_decoder" not in settings:
        places.insert(0, (SPECIAL_TOKENS_MAP, _settings(files, SPECIAL_TOKENS_MAP, where)))
    for name, found in places:
        declared = found.get("eos_token")
        if isinstance(declared, dict):
            declared = declared.get("content")
        if declared is None:
            continue
        token = backend.token_to_id(declared) if isinstance(declared, str) else None
        if token is None:
            raise FileError(f"{where}/{name}: the end token {shown(declared)} is no token of {TOKENIZER_JSON}")
        return token
    for name in (GENERATION_CONFIG, CONFIG):
        declared = _settings(files, name, where).get("eos_token_id")
        if isinstance(declared, list):
            if len(declared) > 1:
                raise FileError(
                    f"{where}/{TOKENIZER_CONFIG} names no eos_token, and {name} several, {shown(declared)}: add the "
                    "one that ends a document to the former, as eos_token"
                )
            declared = declared[0] if declared else None
        if declared is None:
            continue
        if type(declared) is not int or declared < 0 or backend.id_to_token(declared) is None:
            raise FileError(f"{where}/{name}: eos_token_id {shown(declared)} is no token of {TOKENIZER_JSON}")
        return declared
    for candidate in _KNOWN_END:
        token = backend.token_to_id(candidate)
        if token is not None:
            return token
    raise FileError(f'the tokenizer in {where} declares no end token; add "eos_token" to {TOKENIZER_CONFIG} there')


def begin_tokens(backend: Any, eos_id: int, where: str) -> tuple[int, ...]:
    """The tokens that the tokenizer's post-processor puts before a text (`add_bos_token` has no say there).

    The end token after a text is what we write, too.

    Raises:
        ValueError: it puts something else behind or into a text.
    """
    with library(where):
        probes = ("a", "b 1\n", *map(backend.id_to_token, range(8)))
        found = [(backend.encode(t), backend.encode(t, add_special_tokens=False).ids) for t in probes if t]
        # What the tokenizer has no tokens for does not show where the text stands.
        found = [(encoding, plain) for encoding, plain in found if plain and 0 in encoding.special_tokens_mask]
    begins = set()
    for encoding, plain in found:
        first = encoding.special_tokens_mask.index(0)
        last = first + len(plain)
        if encoding.ids[first:last] != plain or encoding.ids[last:] not in ([], [eos_id]):
            raise FileError(
                f"the tokenizer in {where} makes {shown(encoding.ids)} of a text with the tokens {shown(plain)}: its "
                f"post_processor may put tokens before a text, and nothing but the end token, {eos_id}, behind it"
            )
        begins.add(tuple(encoding.ids[:first]))
    if len(begins) > 1:
        raise FileError(f"the tokenizer in {where} begins texts in several ways: {shown(sorted(begins))}")
    return begins.pop() if begins else ()


def _settings(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    return decode_json(files[name], dict[str, Any], f"{where}/{name}") if name in files else {}
