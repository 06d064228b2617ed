"""YAML into frozen `msgspec` structs, with errors that name file, line and key."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec
import yaml

from sglang_prefillshare.config import yaml_error
from sglang_prefillshare.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)

_AT: Final = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)
_OWN_CHECK: Final = re.compile(r"(\w+) (?:is|has) ")


def read_yaml(path: Path, kind: type[T], *, what: str) -> T:
    """The file as a `kind`; `what` is what people call it. Raises `ConfigError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the {what} {path}: {reason}.") from error
    return parse_yaml(text, kind, source=str(path), what=what)


def parse_yaml(text: str, kind: type[T], *, source: str, what: str) -> T:
    """YAML `text` as a `kind`; `source` names it in errors."""
    tree, lines = load_tree(text, source)
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} is {kind_of(tree)}, wanted the keys of a {what}.")
    return convert(tree, kind, origins={path: f"{source}:{line}" for path, line in lines.items()}, source=source)


def load_tree(text: str, source: str) -> tuple[Any, dict[str, int]]:
    """The value in `text`, and the line of every key in it by its path."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        lines: dict[str, int] = {}
        if root is None:
            return None, lines
        _note_lines(root, "", lines, source)
        return loader.construct_document(root), lines
    except yaml.YAMLError as error:
        raise yaml_error(error, source) from error
    finally:
        loader.dispose()


def convert(tree: dict[str, Any], kind: type[T], *, origins: Mapping[str, str], source: str) -> T:
    """`tree` as a `kind`. `origins` says of a key's path where it was given; `source` is where the rest was."""
    try:
        return msgspec.convert(tree, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), tree, origins, source, kind)) from error


def kind_of(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", bool: "true or false", type(None): "empty"}
    return names.get(type(value), f"{value!r}")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 2e-5 as a number, as YAML 1.2 does and people write learning rates."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _note_lines(node: yaml.Node, path: str, lines: dict[str, int], source: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[f"{path}[{index}]"] = item.start_mark.line + 1
            _note_lines(item, f"{path}[{index}]", lines, source)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            name = str(key.value)
            line = key.start_mark.line + 1
            if name in seen:
                raise ConfigError(f"{source}:{line}: {name} is given twice, first in line {seen[name]}. Keep one.")
            seen[name] = line
            inner = f"{path}.{name}" if path else name
            lines[inner] = line
            _note_lines(value, inner, lines, source)


def _explain(message: str, tree: Any, origins: Mapping[str, str], source: str, kind: type[msgspec.Struct]) -> str:
    """msgspec's message in words that name the place and the key."""
    match = _AT.match(message)
    assert match is not None
    what, path = match["what"], (match["path"] or "$").removeprefix("$").lstrip(".")
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", what)
    missing = re.fullmatch(r"Object missing required field `(.*)`", what)
    name = unknown or missing
    key = ".".join(part for part in (path, name[1] if name else "") if part)
    where = _where(key, origins, source)
    if unknown:
        known = [field for struct in _structs_at(kind, path) for field in struct.__struct_fields__]
        close = difflib.get_close_matches(unknown[1], known, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Known here: {', '.join(known)}."
        return f"{where}: unknown key {key}. {hint}"
    if missing:
        return f"{where}: {key} is missing. Add it."
    if wrong_type := re.fullmatch(r"Expected `(.*)`, got `(.*)`", what):
        return f"{where}: {key} is {_value_at(tree, path)!r}, wanted {_plain(wrong_type[1])}."
    if what.startswith("Invalid enum value"):
        return f"{where}: {key} is {_value_at(tree, path)!r}, wanted {' or '.join(_choices_at(kind, path))}."
    # A check of a struct's own, which begins with the field's name.
    field = _OWN_CHECK.match(what)
    full = ".".join(part for part in (path, field[1] if field else "") if part)
    return f"{_where(full, origins, source)}: {path + ': ' if path else ''}{what}"


def _where(key: str, origins: Mapping[str, str], source: str) -> str:
    """Where a key was given, or else the nearest one around it."""
    while key:
        if key in origins:
            return origins[key]
        key = re.sub(r"(\.[^.\[\]]*|\[[^\]]*\]|^[^.\[\]]*)$", "", key)
    return source


def _plain(wanted: str) -> str:
    names = {"object": "a mapping", "array": "a list", "str": "text", "int": "a whole number", "float": "a number",
             "bool": "true or false", "null": "null"}  # fmt: skip
    return " or ".join(names.get(name.strip(), name.strip()) for name in wanted.split("|"))


def _steps(path: str) -> list[str | int]:
    parts = re.findall(r"[^.\[\]]+|\[[^\]]*\]", path)
    return [int(part[1:-1]) if re.fullmatch(r"\[\d+\]", part) else part for part in parts]


def _value_at(tree: Any, path: str) -> Any:
    for step in _steps(path):
        try:
            tree = tree[step]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def _types_at(kind: Any, path: str) -> list[Any]:
    kinds = [kind]
    for step in _steps(path):
        inner: list[Any] = []
        for known in kinds:
            if isinstance(known, type) and issubclass(known, msgspec.Struct):
                hint = typing.get_type_hints(known).get(str(step))
                inner += [] if hint is None else [hint]
            else:
                inner += typing.get_args(known)[:1] if isinstance(step, int) else typing.get_args(known)[1:]
        kinds = [option for found in inner for option in _options(found)]
    return kinds


def _options(kind: Any) -> list[Any]:
    """The members of a union, else the type itself."""
    if typing.get_origin(kind) in (tuple, dict, list, Literal) or not typing.get_args(kind):
        return [kind]
    return list(typing.get_args(kind))


def _structs_at(kind: type[msgspec.Struct], path: str) -> list[type[msgspec.Struct]]:
    return [found for found in _types_at(kind, path) if isinstance(found, type) and issubclass(found, msgspec.Struct)]


def _choices_at(kind: type[msgspec.Struct], path: str) -> list[str]:
    found = [
        choice for at in _types_at(kind, path) if typing.get_origin(at) is Literal for choice in typing.get_args(at)
    ]
    return [str(choice) for choice in found]
