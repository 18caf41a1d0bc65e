"""Typed configs: frozen dataclasses read from YAML plus `key=value`, refused with every fault at once."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, dataclass_transform

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

T = TypeVar("T")
_CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ConfigError(ValueError):
    """A config that cannot be used; the message lists every fault by dotted key. Exit code 2."""


class InputError(ValueError):
    """Input data that cannot be used; one sentence of what was found, what was wanted, what to do. Exit code 2."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only, validated dataclass that refuses unknown keys.

    A field's docstring is its one-line help; a unit stands first in brackets: `[um]`, `[voxel]`, `[bytes]`, `[s]`.
    A cross-field check is a `__post_init__` that raises ValueError with a sentence naming the keys.
    """
    return cast(type[T], pydantic_dataclass(frozen=True, kw_only=True, config=_CONFIG)(cls))


def load(cls: type[T], path: Path | None, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> T:
    """Read a `cls` from a YAML file (None: all defaults), with `dotted.key=value` overrides applied last.

    values: dotted key -> value that the program sets; it replaces the file's value, and an override replaces it.
    Raises ConfigError naming all faults at once, each by its dotted key.
    """
    name = str(path) if path else "the command line"
    tree = _read_yaml(path) if path else {}

    faults = [fault for key, value in (values or {}).items() if (fault := _set_key(cls, tree, key, to_plain(value)))]
    faults += [fault for text in overrides if (fault := _override(cls, tree, text))] + _undone(overrides)
    try:
        value = TypeAdapter(cls).validate_python(tree)
    except ValidationError as error:
        faults += [_sentence(cls, item) for item in error.errors()]
    if faults:
        kinds = f" {cls.__name__}"
        raise ConfigError(f"{name} is not a usable{kinds}:\n" + "\n".join(f"  {fault}" for fault in faults))
    return value


def to_plain(value: Any) -> Any:
    """`value` as plain dicts, lists and scalars that YAML and JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def dump(value: Any) -> str:
    """`value` as YAML text that `load` reads back to an equal value."""
    return yaml.safe_dump(to_plain(value), sort_keys=False, width=120)


@dataclasses.dataclass(frozen=True)
class FieldHelp:
    """One line of `--help`: dotted key, type, default and help text (unit first, in brackets)."""

    key: str
    type: str
    default: str
    text: str


def describe(cls: Any, prefix: str = "") -> Iterator[FieldHelp]:
    """Every field of a config and of the configs inside it, depth first; a union lists the fields of each member."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, key = hints[field.name], prefix + field.name
        members = [m for m in _members(hint) if dataclasses.is_dataclass(m)]
        yield FieldHelp(
            key, _type_name(hint), _default_text(field), " ".join((_docs(cls).get(field.name) or "").split())
        )
        is_list = typing.get_origin(hint) in (list, tuple)
        for member in members:
            tag = f"[{_kind(member)}]" if len(members) > 1 else ""
            yield from describe(member, f"{key}{'.N' if is_list else ''}{tag}.")


def _docs(cls: Any) -> dict[str, str | None]:
    return {name: info.description for name, info in cls.__pydantic_fields__.items()}


def _kind(cls: Any) -> str:
    default = next((f.default for f in dataclasses.fields(cls) if f.name == "kind"), None)
    return str(getattr(default, "default", default))


def _members(hint: Any) -> list[Any]:
    """The leaf types of a hint: Annotated, Optional, unions, lists and tuples are looked through."""
    origin = typing.get_origin(hint)
    if origin is None:
        return [hint]
    if origin is typing.Annotated:
        return _members(typing.get_args(hint)[0])
    if origin in (list, tuple, typing.Union, types.UnionType):
        return [leaf for arg in typing.get_args(hint) if arg is not Ellipsis for leaf in _members(arg)]
    return [hint]


def _type_name(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _type_name(args[0])
    if origin is typing.Literal:
        return " | ".join(str(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(a) for a in args)
    if origin in (list, tuple):
        return "[" + ", ".join("..." if a is Ellipsis else _type_name(a) for a in args) + "]"
    if dataclasses.is_dataclass(hint):
        return _kind(hint) if any(f.name == "kind" for f in dataclasses.fields(hint)) else "section"
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _default_text(field: dataclasses.Field[Any]) -> str:
    default = _default(field)
    if default is dataclasses.MISSING:
        return "(required)"
    if dataclasses.is_dataclass(default):
        return ""
    if isinstance(default, (list, tuple)) and any(dataclasses.is_dataclass(v) for v in default):
        return "[" + ", ".join(_kind(type(v)) for v in default) + "]"
    return str(yaml.safe_dump(to_plain(default), default_flow_style=True, width=1000)).replace("\n...", "").strip()


def _default(field: dataclasses.Field[Any]) -> Any:
    """A dataclass field's default value, or MISSING; pydantic hides factories inside its FieldInfo."""
    factory = field.default_factory
    value: Any = field.default if factory is dataclasses.MISSING else factory()
    if hasattr(value, "get_default"):
        value = dataclasses.MISSING if value.is_required() else value.get_default(call_default_factory=True)
    return value


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one section: YAML would keep the last and drop the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"`{key.value}` stands twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _OnceLoader)
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; give the path of a YAML file, or leave it out to use the defaults"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__} where `key: value` lines are wanted")
    return tree or {}


def _override(cls: Any, tree: dict[str, Any], text: str) -> str | None:
    """Put `dotted.key=value` into `tree`. Returns a fault."""
    dotted, equals, raw = text.partition("=")
    if not equals or not dotted:
        return f"{text!r} is not `key=value`"
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        if raw[:1] in ("[", "{"):
            return f'{dotted}: {raw} is no YAML; quote what holds brackets or colons itself, as in a=["b=[1,2]"]'
        value = raw
    return _set_key(cls, tree, dotted, value)


def _set_key(cls: Any, tree: dict[str, Any], dotted: str, value: Any) -> str | None:
    """Put a value into `tree` under a dotted key, after filling in the defaults of the sections above it.

    Returns a fault, or None.
    """
    *parents, last = dotted.split(".")
    node: Any = tree
    owner: Any = cls  # the config class whose defaults fill what the file leaves out; None below a union or a dict
    for key in parents:
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                return f"{dotted}: the list has {len(node)} entries, 0 to {len(node) - 1}"
            node, owner = node[int(key)], None
        elif isinstance(node, dict):
            if node.get(key) is None:
                node[key] = _default_tree(owner, key)
            node, owner = node[key], _field_class(owner, key)
        if not isinstance(node, (dict, list)):
            return f"{dotted}: {key} is {node!r}, which holds no keys"
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            return f"{dotted}: the list has {len(node)} entries, 0 to {len(node) - 1}"
        node[int(last)] = value
        return None
    if last == "kind" and node.get("kind") != value:
        node.clear()  # the other kind has fields of its own
    node[last] = value
    return None


def _undone(overrides: Sequence[str]) -> list[str]:
    """Overrides that a later one wipes out, and those below what an earlier one switched off."""
    faults, seen = [], dict[str, str]()
    for text in overrides:
        key, _, value = text.partition("=")
        section = key.removesuffix("kind") if key.endswith(".kind") else f"{key}."
        if value not in ("null", "~", ""):
            faults += [
                f"{key}={value} would undo {k}={v}; give it first" for k, v in seen.items() if k.startswith(section)
            ]
        faults += [
            f"{key}={value} is below {k}={v}, which leaves nothing to set; drop one of them"
            for k, v in seen.items()
            if v in ("null", "~", "") and key.startswith(f"{k}.")
        ]
        seen[key] = value
    return faults


def _field_class(owner: Any, key: str) -> Any:
    """The config class of a field, when there is exactly one."""
    if owner is None or key not in {f.name for f in dataclasses.fields(owner)}:
        return None
    found = [m for m in _members(typing.get_type_hints(owner)[key]) if dataclasses.is_dataclass(m)]
    return found[0] if len(found) == 1 else None


def _default_tree(owner: Any, key: str) -> Any:
    """A field's default as plain data, so that an override below it changes one key and keeps the others."""
    for field in dataclasses.fields(owner) if owner else ():
        if field.name == key:
            default = _default(field)
            return {} if default is dataclasses.MISSING or default is None else to_plain(default)
    return {}


def _sentence(cls: Any, item: Any) -> str:
    """One pydantic fault as `dotted.key: what is wrong`; for an unknown key, the one that may have been meant."""
    path = ".".join(str(p) for p in item["loc"] if not str(p).startswith(("function-", "tagged-")))
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "union_tag_invalid":
        message = f"{item['ctx']['tag']!r} is not one of {item['ctx']['expected_tags']}"
    elif item["type"] == "unexpected_keyword_argument":
        message += _meant(cls, path)
    elif item["type"] not in ("missing", "value_error"):
        message += f", found {item['input']!r}"
    return f"{path}: {message}" if path else message


def _meant(cls: Any, path: str) -> str:
    """`; did you mean KEY?` for the nearest key, or for one of the same last name in another section; else nothing."""
    keys = [re.sub(r"\[[^]]*\]", "", f.key) for f in describe(cls)]
    last = path.rpartition(".")[2]
    near = [k for k in keys if k.endswith(f".{last}")] or difflib.get_close_matches(path, keys, n=1, cutoff=0.75)
    return f"; did you mean {' or '.join(dict.fromkeys(near))}?" if 0 < len(set(near)) < 4 else ""
