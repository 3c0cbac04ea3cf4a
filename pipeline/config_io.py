"""Read, override and write a run's configuration: schema <- YAML file <- `key=value`, the last word wins.

Every value is assigned on its own to the OmegaConf structured schema, so one message can name all mistakes of a file
and the command line together, each with its key and what would be valid.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException, ValidationError

from pipeline.config import Config


class ConfigError(ValueError):
    """A configuration that cannot run; the message lists every problem found."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__(
            problems[0]
            if len(problems) == 1
            else "\n".join([f"{len(problems)} problems:", *(f"  - {p}" for p in problems)])
        )


def load_config(path: str | os.PathLike | dict[str, Any] | None, overrides: list[str]) -> Config:
    """The configuration of a run.

    Args:
        path: YAML file, None for the defaults, or the settings themselves as a checkpoint has them.
        overrides: `key=value` strings such as `model.memory.rule=linear`; the value is YAML, list items are
            addressed by number (`data.sets.0.path=...`), `${other.key}` copies another setting.

    Raises:
        ConfigError: unknown keys, values of the wrong type, missing values, unresolvable interpolations.
        OSError: the file cannot be read.
    """
    problems: list[str] = []
    schema = OmegaConf.structured(Config)
    sources = []
    if isinstance(path, dict):
        sources.append(("checkpoint", "", path))
    elif path is not None:
        sources.append((str(path), "", _read_yaml(Path(path))))
    for override in overrides:
        try:
            sources.append(("command line", *_parse_override(override)))
        except ValueError as error:
            problems.append(str(error))
    for source, key, value in sources:
        for leaf, leaf_value in _leaves(Config, key, value, source, problems):
            _assign(schema, leaf, leaf_value, source, problems)
    if problems:
        raise ConfigError(problems)
    try:
        return OmegaConf.to_object(schema)
    except MissingMandatoryValue as error:
        raise ConfigError([f"{_dotted(error)} must be given"]) from error
    except OmegaConfBaseException as error:
        where = f"{_dotted(error)}: " if error.full_key else ""
        raise ConfigError([where + _first_line(error)]) from error


def save_config(config: Config, path: str | os.PathLike) -> None:
    """Write the resolved configuration as YAML, whole: `load_config(path, [])` gives it back.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        nearby = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; there are {', '.join(nearby)}" if nearby else ""
        raise FileNotFoundError(f"configuration file {path} does not exist{hint}")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError([f"{path} is not valid YAML: {error}"]) from error
    if not isinstance(content, dict):
        raise ConfigError([f"{path} must hold settings (`key: value`), not a {type(content).__name__}"])
    return content


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"command line: {override!r} is not of the form key=value, such as train.steps=100")
    if "${" in value:  # braces of an interpolation are not YAML's
        return key, value
    try:
        return key, OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)["value"]
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"command line: the value of {key} is not valid YAML: {value!r} ({problem})") from error


def _leaves(root: type, key: str, value: Any, source: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """The single settings in `value` as (full key, value); unknown keys go to `problems`."""
    try:
        kind = _type_at(root, key)
    except KeyError as unknown:
        problems.append(f"{source}: {unknown.args[0]}")
        return
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            names = ", ".join(_field_types(kind))
            problems.append(f"{source}: {key} is a section with the settings {names}; got {value!r}")
            return
        for name, item in value.items():
            yield from _leaves(root, f"{key}.{name}" if key else str(name), item, source, problems)
    elif (item_kind := _item_section(kind)) and isinstance(value, list):
        # A list of sections replaces the whole list: first as many empty items, then their settings.
        yield key, [item_kind() for _ in value]
        for number, item in enumerate(value):
            yield from _leaves(root, f"{key}.{number}", item, source, problems)
    else:
        yield key, value


def _assign(schema: Any, key: str, value: Any, source: str, problems: list[str]) -> None:
    try:
        OmegaConf.update(schema, key, value)
    except OmegaConfBaseException as error:
        if missing := _missing_item(schema, key):
            problems.append(f"{source}: {key} does not exist: {missing}")
        else:
            reason = (
                "has the wrong type" if isinstance(error, ValidationError) else f"cannot be read ({_first_line(error)})"
            )
            problems.append(f"{source}: {key} = {value!r} {reason}; valid is {_type_name(_type_at(Config, key))}")


def _missing_item(schema: Any, key: str) -> str:
    """Says how long the list is when `key` names an item past its end, else ''."""
    parts = key.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            items = OmegaConf.select(schema, ".".join(parts[:i]))
            if items is None or int(part) >= len(items):
                return f"{'.'.join(parts[:i])} has {len(items or [])} item(s), counted from 0"
    return ""


def _type_at(root: type, key: str) -> Any:
    """Declared type of the setting `key`; KeyError with a message for people when there is none."""
    kind: Any = root
    parts = key.split(".") if key else []
    for depth, part in enumerate(parts):
        if part.isdigit() and (item := _item_type(kind)) is not None:
            kind = item
            continue
        fields = _field_types(kind) if dataclasses.is_dataclass(kind) else {}
        if part not in fields:
            raise KeyError(_unknown_key(root, key, ".".join(parts[:depth]), part, list(fields)))
        kind = fields[part]
    return kind


def _unknown_key(root: type, key: str, section: str, name: str, valid: list[str]) -> str:
    if not valid:
        return f"unknown key {key!r}: {section} is a single setting, not a section"
    prefix = f"{section}." if section else ""
    close = [prefix + match for match in difflib.get_close_matches(name, valid, n=3)]
    # The right name in the wrong section, such as train.lr for optimizer.lr.
    every = list(_all_keys(root))
    close += [k for k in every if k.split(".")[-1] == key.split(".")[-1] and k not in close]
    close = close or difflib.get_close_matches(key, every, n=3)
    if close:
        return f"unknown key {key!r}; did you mean {' or '.join(close)}?"
    return f"unknown key {key!r}; valid in {section or 'the top level'}: {', '.join(valid)}"


def _all_keys(kind: type, prefix: str = "") -> Iterator[str]:
    for name, field_kind in _field_types(kind).items():
        if dataclasses.is_dataclass(field_kind):
            yield from _all_keys(field_kind, f"{prefix}{name}.")
        elif section := _item_section(field_kind):
            yield from _all_keys(section, f"{prefix}{name}.0.")
        else:
            yield prefix + name


def _field_types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _item_type(kind: Any) -> Any:
    """Type of a list's items (`list[int] | None` counts as a list), else None."""
    for candidate in (kind, *get_args(kind)):
        if getattr(candidate, "__origin__", None) is list:
            return get_args(candidate)[0]
    return None


def _item_section(kind: Any) -> type | None:
    item = _item_type(kind)
    return item if dataclasses.is_dataclass(item) else None


def _type_name(kind: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if kind in names:
        return names[kind]
    if getattr(kind, "__origin__", None) is list:
        item = get_args(kind)[0]
        many = {int: "integers", float: "numbers", str: "texts", bool: "true or false"}
        return f"a list of {many.get(item, 'sections')}"
    return " or ".join(_type_name(argument) for argument in get_args(kind))


def _dotted(error: OmegaConfBaseException) -> str:
    return (error.full_key or "").replace("[", ".").replace("]", "")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
