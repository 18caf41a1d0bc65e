"""Typed configs: frozen dataclasses, read from YAML and `key=value` arguments; every fault is reported at once."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from hpc_neuro.core import yaml_text
from hpc_neuro.core.bounded_read import read_bounded
from hpc_neuro.core.yaml_text import YamlError

T = TypeVar("T")
_PYDANTIC_CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True)
_NULLS = ("null", "~", "")
"""Texts that YAML reads as null."""
_MAX_YAML_BYTES = 16 << 20
"""[bytes] Size of a YAML file that is read."""
_COLLAPSED_ADDRESS = re.compile(r"(s3|gs|https?):/(?!/)")
"""Beginning of an address whose double slash was lost because it was taken for a local path."""
_SHORT_VALUE = 200
"""Characters of a value in a fault."""


class ConfigError(ValueError):
    """A config that cannot be used. The message lists every fault by its dotted key. Exit code 2."""


class InputError(ValueError):
    """Input data that cannot be used. The message says what was found, what was expected, what to do. Exit code 2."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only, validated dataclass that refuses unknown keys.

    The docstring of a field is its help text; a unit comes first, in brackets: `[um]`, `[voxel]`, `[bytes]`, `[s]`.
    A check across fields is a `__post_init__` that raises ValueError with a sentence that names the keys.
    """
    return cast(type[T], pydantic_dataclass(frozen=True, kw_only=True, config=_PYDANTIC_CONFIG)(cls))


# --- Reading and writing ---


def load(cls: type[T], path: Path | None, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> T:
    """Read a `cls` from a YAML file (None: all defaults), with `dotted.key=value` overrides applied last.

    values: dotted key -> value that the program sets; it replaces the file's value, and an override replaces it.
    Raises ConfigError that lists all faults, each by its dotted key.
    """
    # Faults are collected, not raised one by one: a user corrects all of them in one edit.
    source = str(path) if path else "the command line"
    tree = _read_section(path) if path else {}

    faults = [_set_key(cls, tree, key, to_plain(value)) for key, value in (values or {}).items()]
    faults += [_apply_override(cls, tree, text) for text in overrides]
    faults += _find_conflicts(overrides)

    # The rest is validated even after a faulty override, for the same reason.
    try:
        value = TypeAdapter(cls).validate_python(_settle_numbers(cls, tree))
    except ValidationError as error:
        faults += [_describe_fault(cls, item) for item in error.errors()]

    else:
        faults += [
            f"{key}: {path} lies in a remote store, from which only image volumes are read; give a local path"
            for key, path in _list_paths(value)
            if _COLLAPSED_ADDRESS.match(path)
        ]
        faults += [f"{key}: {number} is no finite number, which is wanted" for key, number in _list_non_finite(value)]
        faults += [fault for key, path in _list_paths(value) if (fault := _find_path_fault(tree, key, path))]
        # Names of results are written into text files.
        out = str(getattr(value, "out", ""))
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in out):
            faults.append(f"out: {out!a} holds characters that no text can hold; give another folder")

    # A list that is too short has one fault for each entry that it lacks.
    messages = list(dict.fromkeys(fault for fault in faults if fault is not None))
    if messages:
        lines = "\n".join(f"  {message}" for message in messages)
        raise ConfigError(f"{source} is not a usable {cls.__name__}:\n{lines}")
    return value


def _list_paths(value: Any) -> Iterator[tuple[str, str]]:
    """The dotted key and the text of each path in a config."""
    return ((key, str(leaf)) for key, leaf in _list_leaves(value) if isinstance(leaf, Path))


def _find_path_fault(tree: Any, key: str, path: str) -> str | None:
    """What is wrong with the text of a path: an empty one would be the folder in which the program was started."""
    for part in key.split("."):
        is_list = isinstance(tree, list) and part.isdecimal() and int(part) < len(tree)
        tree = tree[int(part)] if is_list else tree.get(part) if isinstance(tree, dict) else None
    if isinstance(tree, str) and not tree.strip():
        return f"{key} is empty; give a path, or leave the key out"
    return f"{key}: {path!a} holds a character that no path can hold" if "\0" in path else None


def _list_non_finite(value: Any) -> Iterator[tuple[str, float]]:
    """The dotted key of each number in a config that is NaN or infinite."""
    return ((key, leaf) for key, leaf in _list_leaves(value) if isinstance(leaf, float) and not math.isfinite(leaf))


def _list_leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of each entry of a config, also within lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _list_leaves(getattr(value, field.name), f"{prefix}.{field.name}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _list_leaves(item, f"{prefix}.{number}")
    else:
        yield prefix, value


def to_plain(value: Any) -> Any:
    """`value` as plain dicts, lists and scalars that YAML and JSON can hold."""
    # A class of a config is a dataclass too; only instances have values.
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def dump(value: Any) -> str:
    """`value` as YAML text that `load` reads back to an equal value."""
    return yaml_text.dump(to_plain(value))


def read_yaml(path: Path, keep_text: bool = False) -> Any:
    """The value in a YAML file, as `yaml_text.parse` reads it. Raises ConfigError with one sentence."""
    try:
        return yaml_text.parse(read_bounded(path, _MAX_YAML_BYTES).decode("utf-8-sig"), keep_text)
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; give the path of a YAML file, or leave it out to use the defaults"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} cannot be read as YAML: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None


def _read_section(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, {} for an empty file. Raises ConfigError."""
    tree = read_yaml(path, keep_text=True)
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; expected lines of `key: value`")
    return tree or {}


def _settle_numbers(hint: Any, value: Any) -> Any:
    """A parsed value with numbers as they are written where `hint` wants a text, and plain everywhere else.

    An id 010 must not become 10, nor a module 12.10 become 12.1. `z,y,x` without brackets are the numbers of a list.
    """
    leaves = _leaf_types(hint)
    if isinstance(value, dict):
        hints = _section_hints(leaves, value)
        items = next((typing.get_args(leaf)[1] for leaf in leaves if typing.get_origin(leaf) in (dict, Mapping)), Any)
        return {key: _settle_numbers(hints.get(key, items), item) for key, item in value.items()}
    if isinstance(value, list):
        # Lists are flat in `leaves`.
        return [_settle_numbers(hint, item) for item in value]

    if isinstance(value, str) and "," in value and _is_list_of_numbers(hint):
        return [_settle_numbers(hint, item) for item in value.split(",")]

    # bool is a number in Python, and `1_0` is text that Python reads as 10; in a config neither is a number.
    if leaves and all(leaf in (int, float, type(None)) for leaf in leaves):
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, str) and "_" in value:
            return _NoNumber(value)

    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_text = any(leaf in (str, Path) for leaf in leaves) and not any(leaf in (int, float, Any) for leaf in leaves)
    return yaml_text.as_written(value) if is_number and is_text else yaml_text.strip_text(value)


class _NoNumber:
    """A text where a number is wanted; pydantic refuses it, and shows it as it was given."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return repr(self.text)


def _is_list_of_numbers(hint: Any) -> bool:
    """Whether a hint wants a flat list of numbers, or none."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _is_list_of_numbers(args[0])
    if origin in (typing.Union, types.UnionType):
        return all(arg is type(None) or _is_list_of_numbers(arg) for arg in args)
    return origin in (list, tuple) and all(arg in (int, float, Ellipsis) for arg in args)


def _section_hints(leaves: Sequence[Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """Field types of the config that a mapping describes; {} where several configs are possible."""
    sections = [leaf for leaf in leaves if dataclasses.is_dataclass(leaf)]
    if len(sections) > 1:
        sections = [section for section in sections if _kind_of(section) == value.get("kind")]
    return typing.get_type_hints(sections[0]) if len(sections) == 1 else {}


# --- Overrides ---


def _apply_override(cls: Any, tree: dict[str, Any], text: str) -> str | None:
    """Put `dotted.key=value` into `tree`. Returns a fault, or None."""
    dotted, equals, raw = text.partition("=")
    if not equals or not dotted:
        return f"{text!r} is not `key=value`"

    try:
        value = yaml_text.parse(raw, keep_text=True)
    except YamlError:
        if raw[:1] in ("[", "{"):
            return f'{dotted}: {raw} is not YAML; quote an item that holds brackets or colons, as in a=["b=[1,2]"]'
        # Text that is not YAML, such as `a: b`, is taken as it stands.
        value = raw

    return _set_key(cls, tree, dotted, value)


def _set_key(cls: Any, tree: dict[str, Any], dotted: str, value: Any) -> str | None:
    """Put a value into `tree` under a dotted key, after filling in the defaults of the sections above it.

    Returns a fault, or None.
    """
    *parents, last = dotted.split(".")
    node: Any = tree
    # The config class that `node` belongs to; None below a union, a list or a dict, whose defaults are not known.
    owner: Any = cls

    for key in parents:
        _begin_entry(node, key)
        if isinstance(node, list):
            if not _is_index(key, node):
                return _index_fault(dotted, node)
            node, owner = node[int(key)], None
        elif isinstance(node, dict):
            # A section that the file leaves out starts from its defaults, so that one key of it can be set.
            if node.get(key) is None:
                node[key] = _default_tree(owner, key)
            node, owner = node[key], _field_class(owner, key)
        if not isinstance(node, (dict, list)):
            return f"{dotted}: {key} is {node!r}, which has no keys"

    if isinstance(node, list):
        if not _is_index(last, node):
            return _index_fault(dotted, node)
        node[int(last)] = value
        return None

    # Another kind has other fields, so it starts from its own defaults.
    if last == "kind" and node.get("kind") != value:
        node.clear()
    node[last] = value
    return None


def _begin_entry(node: Any, key: str) -> None:
    """Add an empty section to a list that ends before it: `inputs.0.image=FILE` begins the first entry."""
    if isinstance(node, list) and key == str(len(node)):
        node.append({})


def _is_index(key: str, items: Sequence[Any]) -> bool:
    return key.isdecimal() and int(key) < len(items)


def _index_fault(dotted: str, items: Sequence[Any]) -> str:
    return f"{dotted}: the list has {len(items)} entries, numbered from 0" if items else f"{dotted}: the list is empty"


def _find_conflicts(overrides: Sequence[str]) -> list[str]:
    """Faults of overrides that a later one would undo, and of overrides below a key that an earlier one set to null."""
    faults = []
    earlier = dict[str, str]()

    for text in overrides:
        key, _, value = text.partition("=")
        # `a.kind=b` resets every key of `a`, and `a=b` replaces them.
        section = key.removesuffix("kind") if key.endswith(".kind") else f"{key}."

        if value not in _NULLS:
            for other, other_value in earlier.items():
                if other.startswith(section):
                    faults.append(f"{key}={value} would undo {other}={other_value}; give it first")

        for other, other_value in earlier.items():
            if other_value in _NULLS and key.startswith(f"{other}."):
                faults.append(
                    f"{key}={value} is below {other}={other_value}, which leaves nothing to set; drop one of them"
                )
        earlier[key] = value

    return faults


def _field_class(owner: Any, key: str) -> Any:
    """The config class of a field when its type has exactly one, else None."""
    if owner is None or key not in {field.name for field in dataclasses.fields(owner)}:
        return None
    classes = [leaf for leaf in _leaf_types(typing.get_type_hints(owner)[key]) if dataclasses.is_dataclass(leaf)]
    return classes[0] if len(classes) == 1 else None


def _default_tree(owner: Any, key: str) -> Any:
    """A field's default as plain data, so that an override below it changes one key and keeps the others."""
    for field in dataclasses.fields(owner) if owner else ():
        if field.name == key:
            default = _default_value(field)
            return {} if default is dataclasses.MISSING or default is None else to_plain(default)
    return {}


# --- Faults ---


def _describe_fault(cls: Any, item: Any) -> str:
    """One of pydantic's errors as `dotted.key: what is wrong`; an unknown key comes with a suggestion."""
    # pydantic names validators and union members in the path; people know only the keys.
    path = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("function-", "tagged-")))
    message = str(item["msg"]).removeprefix("Value error, ")

    if item["type"] == "union_tag_invalid":
        message = f"{item['ctx']['tag']!r} is not one of {item['ctx']['expected_tags']}"
    elif item["type"] == "unexpected_keyword_argument":
        message += _suggest_key(cls, path)
    elif (tuple_fault := _describe_tuple_fault(cls, item)) is not None:
        return tuple_fault
    elif item["type"] == "missing":
        message += _explain_key(cls, path)
    elif item["type"] != "value_error":
        shown = repr(item["input"])
        message += f", found {shown if len(shown) <= _SHORT_VALUE else shown[:_SHORT_VALUE] + '...'}"

    return f"{path}: {message}" if path else message


def _describe_tuple_fault(cls: Any, item: Any) -> str | None:
    """The fault of a list with too few or too many entries, or of no list, with the key's help; None for another."""
    place = [str(part) for part in item["loc"]]
    if item["type"] == "missing" and place[-1].isdecimal():
        place.pop()
    elif item["type"] not in ("tuple_type", "too_long"):
        return None

    path = ".".join(place)
    name = ".".join("N" if part.isdecimal() else part for part in place)
    field = next((field for field in describe(cls) if re.sub(r"\[[^]]*\]", "", field.key) == name), None)
    wanted = re.match(r"\[((?:int|float|str)(?:, (?:int|float|str))*)\]", field.type) if field else None
    if field is None or wanted is None:
        return None

    value = item["input"]
    shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    noun = "texts" if "str" in wanted[1] else "numbers"
    count, meaning = wanted[1].count(",") + 1, field.text.partition(";")[0]
    return f"{path}: {count} {noun} are expected, found {shown[:_SHORT_VALUE]}; {path} is {meaning}"


def _explain_key(cls: Any, path: str) -> str:
    """` (WHAT THE KEY IS)`, the first sentence of its help; "" for a key without one."""
    # Kinds in brackets are for `--help` only; N stands for the index of an entry.
    key = re.sub(r"\.\d+(?=\.|$)", ".N", path)
    texts = [field.text for field in describe(cls) if re.sub(r"\[[^]]*\]", "", field.key) == key and field.text]
    return f" ({texts[0].partition('. ')[0].rstrip('.')})" if texts else ""


def _suggest_key(cls: Any, path: str) -> str:
    """`; did you mean KEY?` for keys of the same last name in other sections, else for the nearest key, else ""."""
    # Kinds in brackets are for `--help` only; a key does not contain them.
    keys = [re.sub(r"\[[^]]*\]", "", field.key) for field in describe(cls)]
    last = path.rpartition(".")[2]

    nearest = [key for key in keys if key.endswith(f".{last}")]
    nearest = nearest or difflib.get_close_matches(path, keys, n=1, cutoff=0.75)
    nearest = list(dict.fromkeys(nearest))
    return f"; did you mean {' or '.join(nearest)}?" if 0 < len(nearest) < 4 else ""


# --- Help ---


@dataclasses.dataclass(frozen=True)
class FieldHelp:
    """One key of `--help`."""

    key: str
    """Dotted; `N` stands for an index, `[KIND]` for a member of a union."""
    type: str
    default: str
    text: str
    """Unit first, in brackets."""


def describe(cls: Any, prefix: str = "") -> Iterator[FieldHelp]:
    """Every field of a config and of the configs inside it, depth first; a union lists the fields of each member."""
    hints = typing.get_type_hints(cls)
    docstrings = {name: info.description or "" for name, info in cls.__pydantic_fields__.items()}

    for field in dataclasses.fields(cls):
        hint, key = hints[field.name], prefix + field.name
        text = " ".join(docstrings.get(field.name, "").split())
        yield FieldHelp(key, _type_name(hint), _default_text(field), text)

        # Sections, and the members of unions and lists, are described below their own key.
        members = [leaf for leaf in _leaf_types(hint) if dataclasses.is_dataclass(leaf)]
        index = ".N" if typing.get_origin(hint) in (list, tuple) else ""
        for member in members:
            tag = f"[{_kind_of(member)}]" if len(members) > 1 else ""
            yield from describe(member, f"{key}{index}{tag}.")


def _kind_of(cls: Any) -> str:
    """The value of the field `kind` that tells the members of a union apart."""
    default = next((field.default for field in dataclasses.fields(cls) if field.name == "kind"), None)
    return str(getattr(default, "default", default))


def _leaf_types(hint: Any) -> list[Any]:
    """The types inside a hint, with Annotated, Optional, unions, lists and tuples taken apart."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _leaf_types(typing.get_args(hint)[0])
    if origin in (list, tuple, typing.Union, types.UnionType):
        return [leaf for arg in typing.get_args(hint) if arg is not Ellipsis for leaf in _leaf_types(arg)]
    return [hint]


def _type_name(hint: Any) -> str:
    """A type as people read it: `int | none`, `[float, float, float]`, `round | square`, `section`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _type_name(args[0])
    if origin is typing.Literal:
        return " | ".join(str(arg) for arg in args)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(arg) for arg in args)
    if origin in (list, tuple):
        return "[" + ", ".join("..." if arg is Ellipsis else _type_name(arg) for arg in args) + "]"

    if dataclasses.is_dataclass(hint):
        has_kind = any(field.name == "kind" for field in dataclasses.fields(hint))
        return _kind_of(hint) if has_kind else "section"
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _default_text(field: dataclasses.Field[Any]) -> str:
    """A field's default in YAML; "" for a section, whose fields show their own."""
    default = _default_value(field)
    if default is dataclasses.MISSING:
        return "(required)"
    if dataclasses.is_dataclass(default):
        return ""
    if isinstance(default, (list, tuple)) and any(dataclasses.is_dataclass(item) for item in default):
        return "[" + ", ".join(_kind_of(type(item)) for item in default) + "]"

    # YAML, so that a default can be copied into a file or a key.
    return yaml_text.dump_line(to_plain(default))


def _default_value(field: dataclasses.Field[Any]) -> Any:
    """A dataclass field's default, or MISSING."""
    factory = field.default_factory
    value: Any = field.default if factory is dataclasses.MISSING else factory()

    # pydantic wraps defaults and factories in its FieldInfo.
    if hasattr(value, "get_default"):
        value = dataclasses.MISSING if value.is_required() else value.get_default(call_default_factory=True)
    return value
