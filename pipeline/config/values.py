"""The value of a setting from its text, by the type that its dataclass declares.

| declared | what is taken |
| --- | --- |
| `str` | the text as it stands: `2026_11_24`, `0012`, `1e3`, `on` |
| `int` | decimal digits, `_` between them (`010` is ten); `0x` and hexadecimal digits |
| `float` | decimal, with an exponent or without; `.inf` and `.nan`, which the ranges then refuse |
| `bool` | `true`, `yes`, `on`, `1` and `false`, `no`, `off`, `0` |
| `X | None` | also `null`, `~` and nothing at all |
| `list[X]` | `[...]`; a single text counts as a list of one |
"""

from __future__ import annotations

import dataclasses
import re
import types
import unicodedata
from typing import Any, Union, get_args, get_origin

from pipeline.config.yaml import Node

MAX_TEXT = 4096
"""Characters of a text: the longest path that Linux opens."""
MAX_ITEMS = 4096
"""Of a list."""

_INT = re.compile(r"[+-]?(0x[0-9a-fA-F]+|[0-9]+(_[0-9]+)*)")
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_FLOAT = re.compile(rf"[+-]?(?:{_DIGITS}\.?(?:{_DIGITS})?|\.{_DIGITS})(?:[eE][+-]?[0-9]+)?")
_SPECIAL = re.compile(r"[+-]?\.?(?:inf|nan)", re.IGNORECASE)
_MAX_NUMBER = 64
"""Characters: Python converts long integers in quadratic time."""
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NULL = ("", "~", "null")


class WrongValue(ValueError):
    """A text that is no value of the type; the message says why."""


def convert(node: Node, kind: Any) -> Any:
    """The value that `node` is for a setting of type `kind`, no section.

    An interpolation, a text with `${`, is returned as it stands.

    Raises:
        WrongValue: it is none.
    """
    if is_interpolation(node):
        return node.value
    choices = _choices(kind)
    if _is_null(node):
        if type(None) in choices:
            return None
        raise WrongValue(f"has the wrong type; valid is {type_name(kind)}")
    for choice in choices:
        if item := list_item(choice):
            return _list(node, item, kind)
        if isinstance(node.value, str) and choice in _READERS:
            return _READERS[choice](node, kind)
    raise WrongValue(f"has the wrong type; valid is {type_name(kind)}")


def is_interpolation(node: Node) -> bool:
    """Whether `node` is a text that copies other settings."""
    return isinstance(node.value, str) and "${" in node.value


def list_item(kind: Any) -> Any:
    """Type of a list's items (`list[int] | None` counts as a list), else None."""
    for candidate in _choices(kind):
        if get_origin(candidate) is list:
            return get_args(candidate)[0]
    return None


def is_text(kind: Any) -> bool:
    """Whether a setting of this type is a text, or a text or null."""
    return str in _choices(kind)


def type_name(kind: Any) -> str:
    """A type as people say it."""
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if kind in names:
        return names[kind]
    if get_origin(kind) is list:
        item = get_args(kind)[0]
        many = {int: "integers", float: "numbers", str: "texts", bool: "true or false"}
        return f"a list of {many.get(item, 'sections')}"
    if dataclasses.is_dataclass(kind):
        return "a section"
    return " or ".join(type_name(argument) for argument in get_args(kind))


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _is_null(node: Node) -> bool:
    return node.plain and isinstance(node.value, str) and node.value.lower() in _NULL


def _list(node: Node, item: Any, kind: Any) -> list[Any]:
    if isinstance(node.value, str) and item is str:
        return [_text(node, kind)]
    if not isinstance(node.value, list):
        raise WrongValue(f"has the wrong type; valid is {type_name(kind)}")
    if len(node.value) > MAX_ITEMS:
        raise WrongValue(f"has {len(node.value):,} items; valid are at most {MAX_ITEMS:,}")
    try:
        return [convert(element, item) for element in node.value]
    except WrongValue as error:
        if "wrong type" not in str(error):
            raise
        raise WrongValue(f"has the wrong type; valid is {type_name(kind)}") from None


def _text(node: Node, kind: Any) -> str:
    text = node.value
    if len(text) > MAX_TEXT:
        raise WrongValue(f"is a text of {len(text):,} characters; valid are at most {MAX_TEXT:,}")
    if wrong := next((character for character in text if unicodedata.category(character) in ("Cc", "Cs")), None):
        what = "bytes that are not UTF-8" if unicodedata.category(wrong) == "Cs" else "a control character"
        raise WrongValue(f"holds {what} ({wrong!r}), which no setting may")
    return text


def _int(node: Node, kind: Any) -> int:
    if node.plain and len(node.value) <= _MAX_NUMBER and _INT.fullmatch(node.value):
        digits = node.value.lower()
        return int(digits, 16) if "x" in digits else int(digits)
    raise WrongValue(f"has the wrong type; valid is {type_name(kind)}")


def _float(node: Node, kind: Any) -> float:
    text = node.value
    if node.plain and len(text) <= _MAX_NUMBER:
        if _FLOAT.fullmatch(text):
            return float(text)
        if _SPECIAL.fullmatch(text):
            return float(text.replace(".", ""))
    raise WrongValue(f"has the wrong type; valid is {type_name(kind)}")


def _bool(node: Node, kind: Any) -> bool:
    if node.plain and node.value.lower() in _WORDS:
        return _WORDS[node.value.lower()]
    raise WrongValue(f"has the wrong type; valid is {type_name(kind)}")


_READERS = {str: _text, int: _int, float: _float, bool: _bool}
