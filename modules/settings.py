"""Reads settings, in rising precedence: defaults, YAML file, `section.key=value` on the command line.

An unknown key is an error with a suggestion, the error for a value of the wrong type says what was expected, and the
origin of every value is kept, so that a run can say where each of its settings came from.
"""

import dataclasses
import difflib
import math
import os
import re
import typing
from pathlib import Path

import yaml

from modules.config import Config
from modules.errors import ConfigError
from modules.ranges import CHOICES
from modules.rules import check_rules

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
TAG = "tag:yaml.org,2002:"  # prefix of the tag by which YAML gives the type of a scalar
PLACES = ("run.dir", "run.cache_dir", "training.out")  # output paths, whose ~ is expanded here
ODD_NUMBER = re.compile(r"[-+]?0[0-9_]+|[^:]+(:[^:]+)+")  # what YAML reads to base 8 or 60
NO_TEXT = {TAG + name for name in ("int", "float", "bool", "timestamp")}


def load_config(path: str | Path, overrides: list[str] = (), schema: type = Config) -> tuple:
    """The resolved configuration of a YAML file and `section.key=value` overrides, and the origin of every value.

    Returns:
        (config, origins): config of type `schema`; origins maps "section.key" to "default", the file's path or "command line".

    Raises:
        ConfigError: unknown key (with a suggestion), wrong type, value out of range, or settings that contradict.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: the config file cannot be read ({error.strerror}); name an existing .yaml"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the config file is not UTF-8 text ({error}); save it as UTF-8") from error
    try:
        tree = _read_yaml(text, _texts(schema)) or {}
    except _GivenTwice as error:
        raise ConfigError(f"{path}: {error}; join the two") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as `learning:`, found {type(tree).__name__}")
    values: dict[str, dict] = {}
    origins: dict[str, str] = {}
    for section, content in tree.items():
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: section `{section}` must hold key: value lines, found {content!r}")
        for key, value in content.items():
            _put(schema, values, origins, f"{section}.{key}", value, str(path))
    for override in overrides:
        name, separator, raw = override.partition("=")
        if not separator:
            raise ConfigError(f"command line: {override!r} is not section.key=value")
        try:
            value = _read_yaml(raw, _texts(schema), name.strip()) if raw else ""
        except _GivenTwice as error:
            raise ConfigError(f"command line: {override!r}: {error}; name it once") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"command line: {override!r}: the value is not valid YAML") from error
        _put(schema, values, origins, name.strip(), value, "command line")
    if not values.get("run", {}).get("name"):
        _put(schema, values, origins, "run.name", path.stem, str(path))
    config = schema(**{s.name: s.type(**values.get(s.name, {})) for s in dataclasses.fields(schema)})
    for name in flatten(config):
        origins.setdefault(name, "default")
    check_rules(config)
    return config, origins


def with_settings(config: Config, settings: dict[str, object]) -> Config:
    """A copy of `config` with "section.key" settings replaced and every rule checked again."""
    values = {s.name: dataclasses.asdict(getattr(config, s.name)) for s in dataclasses.fields(Config)}
    for name, value in settings.items():
        _put(type(config), values, {}, name, value, "here")
    changed = Config(**{s.name: s.type(**values[s.name]) for s in dataclasses.fields(Config)})
    check_rules(changed)
    return changed


def flatten(config: Config) -> dict[str, object]:
    """{"section.key": value} for every setting, in the order of the schema."""
    return {
        f"{section.name}.{key.name}": getattr(getattr(config, section.name), key.name)
        for section in dataclasses.fields(config)
        for key in dataclasses.fields(section.type)
    }


def to_yaml(config: Config, origins: dict[str, str]) -> str:
    """The resolved configuration as YAML, with the origin of every value as a comment."""
    lines = []
    for section in dataclasses.fields(config):
        lines.append(f"{section.name}:")
        for key in dataclasses.fields(section.type):
            value = getattr(getattr(config, section.name), key.name)
            lines.append(f"  {key.name}: {as_yaml(value)}  # {origins.get(f'{section.name}.{key.name}', 'default')}")
    return "\n".join(lines) + "\n"


def as_yaml(value: object) -> str:
    """The value of one setting as one line of YAML, as it can be written after `section.key=`."""
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()


class _GivenTwice(yaml.YAMLError):
    """A key that is given twice in a mapping; YAML would silently use the second value."""


class _Loader(yaml.SafeLoader):
    """yaml.SafeLoader that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        first: dict[object, int] = {}
        scalars = (key_node for key_node, _ in node.value if isinstance(key_node, yaml.ScalarNode))
        for key_node in (scalar for scalar in scalars if scalar.tag != TAG + "merge"):
            key, line = self.construct_object(key_node), key_node.start_mark.line + 1  # a value, so that .5 is 0.5
            if key in first:
                word = "; to YAML on, yes and true are one: quote the words" if isinstance(key, bool) else ""
                raise _GivenTwice(f"`{key}` is given twice, on lines {first[key]} and {line}{word}")
            first[key] = line
        return super().construct_mapping(node, deep)


def _read_yaml(text: str, texts: set[str], name: str = "") -> object:
    """The value of a whole YAML file, or of the setting `name`; values of the settings in `texts` stay as written.

    YAML would read 0123 as 83, 12:30 as 750 and yes as true, which are all valid names for a run. Numbers are not read to
    base 8 or 60 either: seed 010 is 10, not 8.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        pairs = [(name, node)] if name else [
            (f"{section.value}.{key.value}", value) for section, content in _pairs(node) for key, value in _pairs(content)
        ]  # fmt: skip
        for setting, value in pairs:
            if value is None or value.tag not in NO_TEXT:
                continue
            if setting in texts or (value.tag in (TAG + "int", TAG + "float") and ODD_NUMBER.fullmatch(value.value)):
                value.tag = TAG + "str"
        return None if node is None else loader.construct_document(node)
    except (ValueError, LookupError, AttributeError) as error:  # raised by PyYAML on an invalid date or number
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def _pairs(node: yaml.Node | None) -> list[tuple]:
    return node.value if isinstance(node, yaml.MappingNode) else []


def _texts(schema: type) -> set[str]:
    """Every "section.key" of type str, except those that may be `on` or `off`, which are read as YAML does."""
    names = {
        f"{s.name}.{k.name}" for s in dataclasses.fields(schema) for k in dataclasses.fields(s.type) if k.type is str
    }
    return {name for name in names if "on" not in CHOICES.get(name, ())}


def _put(schema: type, values: dict, origins: dict, name: str, value: object, origin: str) -> None:
    section_name, _, key = name.partition(".")
    sections = {s.name: s.type for s in dataclasses.fields(schema)}
    if section_name not in sections:
        hint = _did_you_mean(section_name, list(sections)) or _full_names(name, schema)
        raise ConfigError(f"{origin}: unknown section `{section_name}`{hint}")
    fields = {f.name: f for f in dataclasses.fields(sections[section_name])}
    if key not in fields:
        known = [f"{section_name}.{k}" for k in fields]
        hint = _full_names(key, schema) or _did_you_mean(name, known) or _did_you_mean(key, _all_keys(schema))
        raise ConfigError(f"{origin}: unknown setting `{name}`{hint}")
    if isinstance(value, bool) and "on" in CHOICES.get(name, ()):  # YAML reads on and off as a truth value
        value = "on" if value else "off"
    value = _coerce(value, fields[key].type, name, origin)
    values.setdefault(section_name, {})[key] = os.path.expanduser(value) if name in PLACES else value
    origins[name] = origin


def _all_keys(schema: type) -> dict[str, str]:
    return {k.name: f"{s.name}.{k.name}" for s in dataclasses.fields(schema) for k in dataclasses.fields(s.type)}


def _full_names(key: str, schema: type) -> str:
    """A suggestion for a key given without its section or with a wrong one: every setting of that name."""
    found = [
        f"`{s.name}.{key}`" for s in dataclasses.fields(schema) if key in {k.name for k in dataclasses.fields(s.type)}
    ]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _did_you_mean(word: str, known: list[str] | dict[str, str]) -> str:
    """A suggestion for a mistyped word; `known` lists words or maps them to their full names."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    if not close:
        return ""
    return f"; did you mean `{known[close[0]] if isinstance(known, dict) else close[0]}`?"


def _coerce(value: object, kind, name: str, origin: str) -> object:
    """`value` converted to the annotated type `kind`; "1e-3", a string to PyYAML, is accepted as a float."""
    try:
        return _coerced(value, kind)
    except (TypeError, ValueError):
        raise ConfigError(f"{origin}: `{name}` is {value!r}; expected {_expected(kind)}") from None


def _expected(kind) -> str:
    """An annotated type in words."""
    if kind is dict:
        return "pairs of choice and weight with a space after each colon, such as {a: 1.0, b: 2.0}"
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if inner[-1] is Ellipsis:
            return f"a list in brackets, each entry {WORDS[inner[0]]}: [..., ...]"
        return f"a list of {len(inner)} in brackets, each {WORDS[inner[0]]}: [{', '.join(['...'] * len(inner))}]"
    return WORDS[kind]


def _coerced(value: object, kind) -> object:
    origin = typing.get_origin(kind)
    if origin is tuple:
        inner = typing.get_args(kind)
        if not isinstance(value, list | tuple):
            raise TypeError
        if inner[-1] is Ellipsis:
            return tuple(_coerced(v, inner[0]) for v in value)
        if len(value) != len(inner):
            raise ValueError
        return tuple(_coerced(v, k) for v, k in zip(value, inner, strict=True))
    if kind is dict:
        if not isinstance(value, dict):
            raise TypeError
        return {k: _coerced(v, float) for k, v in value.items()}
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError
        return value
    if kind is float:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
        return number
    if kind is int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise TypeError
        return int(value)
    if kind is str:
        if value is None:
            return ""
        if isinstance(value, dict | list) or "\0" in str(value):
            raise TypeError
        return str(value)
    raise TypeError
