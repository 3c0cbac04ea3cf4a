"""Read, override and write a run's configuration: schema <- YAML file <- `key=value`, the last word wins.

Every value is read by the type that its setting declares (`pipeline.config.values`) and assigned on its own to the
OmegaConf structured schema, so one message can name all mistakes of a file and the command line together, each with its
key and what would be valid.

`${other.key}` copies another setting. Of OmegaConf's resolvers there is one, `${oc.env:NAME}`, for the few variables in
`ENVIRONMENT` that say where a machine keeps files. What is stored is the value: a checkpoint's configuration says what
was, and means the same elsewhere. A configuration that was stored, perhaps by a stranger, never reads the environment.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from data.files import FileError, Place, place, read_text, shown, write_whole
from pipeline.config import yaml as config_yaml
from pipeline.config.keys import UnknownKey, item_section, type_at
from pipeline.config.schema import Config
from pipeline.config.values import MAX_ITEMS, MAX_TEXT, WrongValue, convert, is_interpolation, is_text
from pipeline.config.yaml import Node, YamlError

ENVIRONMENT = ("HOME", "PROJECT", "SCRATCH", "TMPDIR", "USER", "WORK")
"""Variables that a configuration may read: where files are, no secrets (the values are printed and stored)."""

_INTERPOLATION = re.compile(r"\$\{([^${}]*)\}")
_VARIABLE = re.compile(r"oc\.env:([A-Za-z_][A-Za-z0-9_]*)(?:,([^{}]*))?")
_KEY = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z0-9_]+)*")
_MAX_CHAIN = 16
"""Settings that copy one another."""


class ConfigError(ValueError):
    """A configuration that cannot run; the message lists every problem found."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__(
            problems[0]
            if len(problems) == 1
            else "\n".join([f"{len(problems)} problems:", *(f"  - {p}" for p in problems)])
        )


@dataclass(frozen=True)
class _Source:
    """Where settings come from."""

    name: str
    own: bool
    """The user's, now: it may read the environment."""

    def at(self, node: Node) -> str:
        return f"{self.name}, line {node.line}" if node.line and self is not _COMMAND_LINE else self.name


_COMMAND_LINE = _Source("command line", own=True)


def load_config(path: Place | str | None, overrides: list[str], *, own: bool = True) -> Config:
    """The configuration of a run.

    Args:
        path: YAML file, or None for the defaults.
        overrides: `key=value` strings such as `model.memory.rule=linear`; list items are addressed by number
            (`data.sets.0.path=...`), `${other.key}` copies another setting.
        own: the file is what the user starts a run from; False for one that a run has stored.

    Raises:
        ConfigError: unknown keys, values of the wrong type, missing values, interpolations that name nothing.
        OSError, FileError: the file cannot be read.
    """
    return _load([] if path is None else [(_Source(str(path), own), _read(place(path)))], overrides)


def stored_config(settings: Any, overrides: list[str], where: str) -> Config:
    """The configuration that a checkpoint was written with.

    Args:
        settings: as its JSON has them.
        overrides: as for `load_config`.
        where: the checkpoint, for messages.

    Raises:
        ConfigError: as `load_config`.
    """
    try:
        root = config_yaml.from_json(settings)
    except YamlError as error:
        raise ConfigError([f"{where}: {error}"]) from None
    return _load([(_Source(where, own=False), root)], overrides)


def save_config(config: Config, path: Place | str) -> None:
    """Write the resolved configuration as YAML, whole: `load_config(path, [])` gives it back.

    Raises:
        OSError: the file cannot be written.
    """
    write_whole(path, config_yaml.dump(asdict(config)))


def _load(sources: list[tuple[_Source, Node]], overrides: list[str]) -> Config:
    problems: list[str] = []
    settings = [(source, "", root) for source, root in sources]
    for override in overrides:
        try:
            settings.append((_COMMAND_LINE, *_parse_override(override)))
        except ValueError as error:
            problems.append(f"{_COMMAND_LINE.name}: {error}")
    schema = OmegaConf.structured(Config)
    origins: dict[str, str] = {}
    for source, key, node in settings:
        for leaf, value in _leaves(key, node, source, problems):
            _assign(schema, leaf, value, source, problems)
            origins[leaf] = source.at(value) if isinstance(value, Node) else source.name
    if not problems:
        _resolve(schema, origins, problems)
    if problems:
        raise ConfigError(problems)
    try:
        return OmegaConf.to_object(schema)
    except MissingMandatoryValue as error:
        section = _dotted(error).rpartition(".")[0].rpartition(".")[0]
        where = f"{origins[section]}: " if section in origins else ""
        raise ConfigError([f"{where}{_dotted(error)} must be given"]) from error


def _read(path: Place) -> Node:
    try:
        root = config_yaml.parse(read_text(path, config_yaml.LIMIT_BYTES))
    except FileNotFoundError:
        nearby = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; there are {', '.join(nearby)}" if nearby else ""
        raise FileNotFoundError(f"configuration file {path} does not exist{hint}") from None
    except FileError as error:
        raise ConfigError([str(error)]) from None
    except YamlError as error:
        raise ConfigError([f"{path} is no configuration: {error}"]) from None
    if not isinstance(root.value, dict):
        raise ConfigError([f"{path} must hold settings (`key: value`), not {root}"])
    return root


def _parse_override(override: str) -> tuple[str, Node]:
    """Key and value; the value is taken by the setting's type, so that a text needs no quotes."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{shown(override)} is not of the form key=value, such as train.steps=100")
    try:
        kind = type_at(key)
    except UnknownKey:
        return key, Node(text)  # said where the settings of all sources are looked up
    quoted = len(text) > 1 and text[0] in "\"'" and text[-1] == text[0]
    bracketed = text.lstrip()[:1] in ("[", "{")
    if not (quoted or bracketed and not is_text(kind)):
        return key, Node(text if is_text(kind) else text.strip())
    try:
        return key, config_yaml.parse_flow(text)
    except YamlError as error:
        if quoted:
            return key, Node(text)
        raise ValueError(f"the value of {key} is not valid YAML: {shown(text)} ({error})") from None


def _leaves(key: str, node: Node, source: _Source, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """The single settings in `node` as (full key, node or items of a list); unknown keys go to `problems`."""
    try:
        kind = type_at(key)
    except UnknownKey as unknown:
        problems.append(f"{source.at(node)}: {unknown}")
        return
    if dataclasses.is_dataclass(kind):
        if not isinstance(node.value, dict):
            names = ", ".join(field.name for field in dataclasses.fields(kind))
            what = f"{key} is a section with" if key else "a configuration has"
            problems.append(f"{source.at(node)}: {what} the settings {names}; got {node}")
            return
        for name, item in node.value.items():
            yield from _leaves(f"{key}.{name}" if key else name, item, source, problems)
    elif (section := item_section(kind)) and isinstance(node.value, list):
        if len(node.value) > MAX_ITEMS:
            problems.append(f"{source.at(node)}: {key} has {len(node.value):,} items; valid are at most {MAX_ITEMS:,}")
            return
        # A list of sections replaces the whole list: first as many empty items, then their settings.
        yield key, [section() for _ in node.value]
        for number, item in enumerate(node.value):
            yield from _leaves(f"{key}.{number}", item, source, problems)
    else:
        yield key, node


def _assign(schema: Any, key: str, value: Any, source: _Source, problems: list[str]) -> None:
    kind, where = type_at(key), source.name
    try:
        if isinstance(value, Node):
            where = source.at(value)
            value = convert(_with_environment(value, source), kind)
        OmegaConf.update(schema, key, value)
    except WrongValue as error:
        problems.append(f"{where}: {key} = {value} {error}")
    except OmegaConfBaseException as error:
        missing = _missing_item(schema, key)
        problems.append(f"{where}: {key} {f'does not exist: {missing}' if missing else _first_line(error)}")


def _with_environment(node: Node, source: _Source) -> Node:
    """`node` with the variables of the environment in it, and its interpolations seen to be ones.

    Raises:
        WrongValue: it reads what it may not.
    """
    if isinstance(node.value, list):
        return dataclasses.replace(node, value=[_with_environment(item, source) for item in node.value])
    if not is_interpolation(node):
        return node

    def read(match: re.Match) -> str:
        variable = _VARIABLE.fullmatch(match[1])
        if variable is None:
            if not _KEY.fullmatch(match[1]):
                raise WrongValue(
                    f"is not read: valid are ${{other.key}}, such as ${{name}}, and ${{oc.env:NAME}} with one of "
                    f"{', '.join(ENVIRONMENT)}"
                )
            return match[0]
        if not source.own:
            raise WrongValue("reads the environment, which a stored configuration may not")
        if variable[1] not in ENVIRONMENT:
            raise WrongValue(
                f"reads {shown(variable[1])} from the environment, which would be printed and stored; valid are "
                f'{", ".join(ENVIRONMENT)}. The shell gives any other: key="$NAME" on the command line'
            )
        found = os.environ.get(variable[1], variable[2])
        if found is None or "${" in found:
            raise WrongValue(f"reads the variable {variable[1]}, which {'is not set' if found is None else 'has ${'}")
        return found

    text = _INTERPOLATION.sub(read, node.value)
    if text.count("${") != len(_INTERPOLATION.findall(text)):
        raise WrongValue("is not read: `${` must begin the name of another setting, such as ${name}")
    return dataclasses.replace(node, value=text)


def _resolve(schema: Any, origins: dict[str, str], problems: list[str]) -> None:
    """Put values in the place of interpolations."""
    copies = _Copies(OmegaConf.to_container(schema, resolve=False))
    for key, text in list(_texts(copies.content, "")):
        if "${" in text:
            try:
                OmegaConf.update(schema, key, convert(copies.read(text, (key,)), type_at(key)))
            except WrongValue as error:
                setting = next((k for k in (key, key.rpartition(".")[0]) if k in origins), None)
                where = f"{origins[setting]}: " if setting else ""
                problems.append(f"{where}{key} = {shown(text)[1:-1]} {error}")


def _texts(content: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, dict | list):
        for name, item in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _texts(item, f"{key}.{name}" if key else str(name))


class _Copies:
    """What interpolations stand for, each setting looked up once: their number can double with every step."""

    def __init__(self, content: dict[str, Any]):
        self.content = content
        self._known: dict[str, Node] = {}

    def read(self, text: str, chain: tuple[str, ...]) -> Node:
        """The value of `text`, which stands under the last key of `chain`.

        Raises:
            WrongValue: it copies what does not exist, or itself, or too much.
        """
        if len(chain) > _MAX_CHAIN or chain[-1] in chain[:-1]:
            raise WrongValue(f"copies settings in a circle, or over too many: {' -> '.join(chain)}")
        if whole := _INTERPOLATION.fullmatch(text):
            return self._setting(whole[1], chain)
        pieces, end = [], 0
        for match in _INTERPOLATION.finditer(text):
            copied = self._setting(match[1], chain)
            if not isinstance(copied.value, str):
                raise WrongValue(f"copies {match[1]}, which is no single value")
            pieces += [text[end : match.start()], copied.value]
            end = match.end()
            if sum(map(len, pieces)) > MAX_TEXT:
                raise WrongValue(f"becomes a text of more than {MAX_TEXT:,} characters")
        return Node("".join([*pieces, text[end:]]), plain=False)

    def _setting(self, key: str, chain: tuple[str, ...]) -> Node:
        if key not in self._known:
            self._known[key] = self._look_up(key, chain)
        return self._known[key]

    def _look_up(self, key: str, chain: tuple[str, ...]) -> Node:
        try:
            kind = type_at(key)
        except UnknownKey as unknown:
            raise WrongValue(f"copies an {unknown}") from None
        value: Any = self.content
        for part in key.split("."):
            if not isinstance(value, dict | list) or isinstance(value, list) and int(part) >= len(value):
                raise WrongValue(f"copies {key}, which does not exist")
            value = value[part] if isinstance(value, dict) else value[int(part)]
        if dataclasses.is_dataclass(kind) or item_section(kind):
            raise WrongValue(f"copies {key}, which is no single setting")
        if isinstance(value, list) and any("${" in item for item in value if isinstance(item, str)):
            raise WrongValue(f"copies {key}, whose items copy others themselves")
        if isinstance(value, str) and "${" in value:
            value = convert(self.read(value, (*chain, key)), kind)
        return config_yaml.from_json(value)


def _missing_item(schema: Any, key: str) -> str:
    """Says how long the list is when `key` names an item past its end, else ''."""
    parts = key.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            items = OmegaConf.select(schema, ".".join(parts[:i]))
            if items is None or int(part) >= len(items):
                return f"{'.'.join(parts[:i])} has {len(items or [])} item(s), counted from 0"
    return ""


def _dotted(error: OmegaConfBaseException) -> str:
    return (error.full_key or "").replace("[", ".").replace("]", "")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
