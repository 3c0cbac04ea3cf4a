"""YAML without its guesses: what stands in the file, as text, for whoever knows which type a setting has.

YAML 1.1 reads `2026_11_24` as a number, `12:30:00` as 45,000 and `on` as true, whatever the setting is. Here a scalar
keeps its source text and whether it was quoted; `pipeline.config.values` makes a value of it by the setting's declared
type. Of YAML's means only mappings, lists and scalars are read: no tags (objects), no anchors and aliases (a few lines
of which can stand for gigabytes), no key twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from data.files import shown

LIMIT_BYTES = 1 << 18
"""Of a configuration file: 5,000 prepared sets. The shipped ones have 3,000 bytes."""
MAX_DEPTH = 16
"""Lists and mappings inside one another; a setting lies at most 5 deep."""


class YamlError(ValueError):
    """Text that is not read; the message begins with the line where there is more than one."""


@dataclass(frozen=True)
class Node:
    """A scalar's text, a list or a mapping."""

    value: str | list[Node] | dict[str, Node]
    plain: bool = True
    """A scalar without quotes: it may be a number, a truth value or null as well as a text."""
    line: int = 0
    """In its file, from 1; 0 when there is none."""

    def __str__(self) -> str:
        if isinstance(self.value, str):
            return shown(self.value)[1:-1] if self.plain else shown(self.value)
        if isinstance(self.value, list):
            items = ", ".join(map(str, self.value[:8])) + (", ..." if len(self.value) > 8 else "")
            return f"[{items}]"
        items = ", ".join(f"{shown(key)[1:-1]}: {item}" for key, item in list(self.value.items())[:8])
        return f"{{{items}{', ...' if len(self.value) > 8 else ''}}}"


def parse(text: str) -> Node:
    """A configuration file's contents; an empty one is an empty mapping.

    Raises:
        YamlError: it is not YAML, or more than what is read of it.
    """
    return _parse(text, yaml.SafeLoader) or Node({})


def parse_flow(text: str) -> Node:
    """A list, mapping or quoted text on a command line, where `*` begins no alias and ` #` no comment.

    Raises:
        YamlError: as for `parse`.
    """
    return _parse(text, _FlowLoader) or Node("")


def from_json(value: Any, depth: int = 0) -> Node:
    """A value that JSON or another setting has: its texts count as quoted, they are nothing but texts.

    Raises:
        YamlError: it is nested too deeply, or JSON has no such value.
    """
    if depth > MAX_DEPTH:
        raise YamlError(f"more than {MAX_DEPTH} lists and mappings inside one another")
    if isinstance(value, dict):
        return Node({str(key): from_json(item, depth + 1) for key, item in value.items()})
    if isinstance(value, list):
        return Node([from_json(item, depth + 1) for item in value])
    if isinstance(value, str):
        return Node(value, plain=False)
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return Node(words[value])
    if isinstance(value, int | float):
        return Node(shown(value))
    raise YamlError(f"a {type(value).__name__} is no setting")


def dump(content: dict[str, Any]) -> str:
    """`content` as YAML that every reader takes for the same: each text stands in quotes."""
    return yaml.dump(
        content, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=1 << 20
    )


class _FlowLoader(yaml.SafeLoader):
    def fetch_alias(self) -> None:
        self.fetch_plain()

    def scan_to_next_token(self) -> None:
        super_scan = super().scan_to_next_token
        while self.peek() in " \n":
            self.forward()
        if self.peek() == "#":
            raise yaml.scanner.ScannerError(
                None, None, "' #' begins a comment, which is lost: put the text in quotes", self.get_mark()
            )
        super_scan()


class _Dumper(yaml.SafeDumper):
    """Quotes values and leaves keys, which are names, as they are."""

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        node = super().represent_mapping(tag, mapping, flow_style)
        for _, value in node.value:
            _quote(value)
        return node

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        node = super().represent_sequence(tag, sequence, flow_style)
        for value in node.value:
            _quote(value)
        return node

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _quote(node: yaml.Node) -> None:
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str":
        node.style = '"'


def _parse(text: str, loader: type[yaml.SafeLoader]) -> Node | None:
    # Events and not nodes: what composes nodes calls itself for every bracket.
    with contextlib.closing(yaml.parse(text, Loader=loader)) as events:
        try:
            document = None
            for event in events:
                if isinstance(event, yaml.DocumentStartEvent):
                    if document is not None:
                        raise YamlError(f"{_at(event.start_mark)}a second document begins: one file holds one")
                    document = _node(next(events), events, 0)
            return document
        except yaml.YAMLError as error:
            raise YamlError(_explain(error)) from None


def _node(event: yaml.Event, events: Iterator[yaml.Event], depth: int) -> Node:
    at, line = _at(event.start_mark), event.start_mark.line + 1
    if isinstance(event, yaml.AliasEvent):
        raise YamlError(at + _alias(f"*{event.anchor}"))
    if event.anchor is not None:
        raise YamlError(f"{at}the anchor {shown('&' + event.anchor)} is not read: ${{other.key}} copies a setting")
    if event.tag is not None:
        raise YamlError(f"{at}the tag {shown(event.tag)} is not read: the setting itself says which type it has")
    if depth > MAX_DEPTH:
        raise YamlError(f"{at}more than {MAX_DEPTH} lists and mappings inside one another")
    if isinstance(event, yaml.ScalarEvent):
        return Node(event.value, event.style is None, line)
    if isinstance(event, yaml.SequenceStartEvent):
        items = []
        while not isinstance(item := next(events), yaml.SequenceEndEvent):
            items.append(_node(item, events, depth + 1))
        return Node(items, line=line)
    mapping: dict[str, Node] = {}
    lines: dict[str, int] = {}
    while not isinstance(name := next(events), yaml.MappingEndEvent):
        key = _node(name, events, depth + 1)
        if not isinstance(key.value, str):
            raise YamlError(f"{_at(name.start_mark)}a list or a mapping stands where a key belongs")
        if key.value in mapping:
            raise YamlError(f"the key {shown(key.value)} stands twice, in line {lines[key.value]} and line {key.line}")
        mapping[key.value] = _node(next(events), events, depth + 1)
        lines[key.value] = key.line
    return Node(mapping, line=line)


def _at(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}: "


def _alias(text: str) -> str:
    return f"{shown(text)} begins like an alias of YAML's: put a text in quotes; ${{other.key}} copies a setting"


def _explain(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if getattr(error, "context", None) == "while scanning an alias":
        return _at(mark) + _alias("*")
    if mark is None:
        return str(error).splitlines()[0]
    what = ", ".join(part for part in (error.context, error.problem) if part)
    return f"{_at(mark)}{what}"
