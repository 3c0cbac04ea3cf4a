"""The `tokenizers` library behind a fence: a tokenizer.json of somebody else's neither crashes a run nor swallows it.

The library raises bare `Exception` for a definition that it cannot read, and panics (a `BaseException`) for some that
it reads and cannot use. Here both become a ValueError that names the folder. Before the library sees a definition, the
places where a few bytes of it could make gigabytes of text are looked at.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from data.files import FileError, decode_json, shown
from data.tokenizer.info import MOST_TOKEN_IDS

TOKENIZER_LIMIT = 128 << 20
"""Bytes of the largest tokenizer.json: 3 times that of 262,144 tokens with their merges."""
MOST_GROWTH = 1024
"""Characters that one may become: Unicode's forms make 18 of one, SentencePiece's tables have 33 bytes for it."""
_MOST_AFFIX = 64
_UNICODE_FORMS = ("NFKD", "NFKC", "NFD", "BertNormalizer")
_FORM_GROWTH = 18
_MOST_HOLES = 65_536
"""Ids without a token, besides as many as there are tokens: every one costs a row of the embedding."""


@contextmanager
def library(where: str) -> Iterator[None]:
    """What the library raises, as a ValueError about the tokenizer of `where`."""
    try:
        yield
    except FileError:
        raise
    except BaseException as error:
        # A panic's type is made by the extension and can be told by its name alone.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise FileError(f"the tokenizer in {where} is damaged: {shown(str(error), 200)}") from error


def open_backend(definition: bytes, where: str) -> Any:
    """The library's tokenizer of a `tokenizer.json`.

    Args:
        where: the folder that holds it, for messages.

    Raises:
        ValueError: it is too large, damaged, makes too much of a character, or its ids leave too many holes.
    """
    from tokenizers import Tokenizer as Backend

    # Texts are encoded one at a time: a pool of threads would stand idle in every rank, and not survive a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if len(definition) > TOKENIZER_LIMIT:
        raise FileError(f"the tokenizer.json in {where} has more than {TOKENIZER_LIMIT:,} bytes")
    parsed = decode_json(definition, dict[str, Any], f"the tokenizer.json in {where}")
    for part in ("normalizer", "decoder"):
        with library(where):
            growth = growth_of(parsed.get(part))
        if growth > MOST_GROWTH:
            raise FileError(
                f"the tokenizer in {where}: its {part} may make {growth:,} characters of one; at most {MOST_GROWTH:,}"
            )
    model = parsed.get("model")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        affix = model.get(name) if isinstance(model, dict) else None
        if isinstance(affix, str) and len(affix) > _MOST_AFFIX:
            raise FileError(
                f"the tokenizer in {where}: its {name} has {len(affix):,} characters; at most {_MOST_AFFIX}"
            )
    with library(where):
        backend = Backend.from_str(definition.decode("utf-8"))
        backend.no_truncation()
        backend.no_padding()
        ids = backend.get_vocab(with_added_tokens=True).values()
    if not ids:
        raise FileError(f"the tokenizer in {where} has no tokens")
    size = 1 + max(ids)
    if size > MOST_TOKEN_IDS or size > 2 * len(ids) + _MOST_HOLES:
        raise FileError(
            f"the tokenizer in {where} has {len(ids):,} tokens with ids up to {size - 1:,}; valid are ids up to "
            f"{min(MOST_TOKEN_IDS, 2 * len(ids) + _MOST_HOLES) - 1:,}"
        )
    return backend


def growth_of(part: Any) -> int:
    """How many characters a normalizer or decoder may make of one, from its definition; never less than it does.

    What one step of a sequence makes the next may multiply, so steps count as a product; Unicode's forms count once,
    since one leaves nothing to the next.
    """
    growth, forms = 1, 1
    for step in _steps(part):
        kind = step.get("type")
        if kind in _UNICODE_FORMS:
            forms = _FORM_GROWTH
        growth = min(growth * max(1, _GROWTH.get(kind, lambda step: 1)(step)), 1 << 62)
    return growth * forms


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(part, dict):
        return
    if part.get("type") != "Sequence":
        yield part
        return
    for name in ("normalizers", "decoders"):
        steps = part.get(name)
        for step in steps if isinstance(steps, list) else ():
            yield from _steps(step)


def _replace(part: dict[str, Any]) -> int:
    content, pattern = part.get("content"), part.get("pattern")
    if not isinstance(content, str) or not isinstance(pattern, dict):
        return 1  # the library will not read it
    text = pattern.get("String")
    if isinstance(text, str) and text:
        return -(-len(content) // len(text))
    if isinstance(text, str) or _matches_nothing(pattern.get("Regex")):
        return 1 + len(content)
    return len(content)


def _matches_nothing(regex: Any) -> bool:
    """Whether a regular expression matches between characters: then its replacement comes on top of them."""
    from tokenizers import Regex, normalizers

    if not isinstance(regex, str):
        return False
    probe = "aZ 0.\n\u00e9\u4e2d_"
    marked = normalizers.Replace(Regex(regex), "\ue000").normalize_str(probe)
    return marked.count("\ue000") > len(probe) - sum(character in marked for character in probe)


def _precompiled(part: dict[str, Any]) -> int:
    """SentencePiece's table: the size of a trie, the trie, and all replacements, each ended by a zero."""
    try:
        table = base64.b64decode(part.get("precompiled_charsmap") or b"")
    except (TypeError, ValueError, binascii.Error):
        return 1  # the library will not read it
    replacements = table[4 + int.from_bytes(table[:4], "little") :]
    return max(map(len, replacements.split(b"\0")), default=1)


_GROWTH: dict[Any, Callable[[dict[str, Any]], int]] = {
    "Replace": _replace,
    "Precompiled": _precompiled,
    "Prepend": lambda part: 1 + len(str(part.get("prepend", ""))),
}
