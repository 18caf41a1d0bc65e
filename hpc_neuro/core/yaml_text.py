"""YAML as version 1.2 reads it, with numbers that remember how they are written; text that both versions read alike.

PyYAML follows YAML 1.1, in which `010` is 8, `12:00:00` is 43200, `1e4` is a text and `on` is true. Here numbers,
booleans and nulls are those of the core schema of YAML 1.2; `010` is 10 as a number and `010` as a name.
"""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar, cast

import yaml

_MAX_DEPTH = 100
"""Levels of nesting."""
_MAX_REPEATS = 100_000
"""Values that aliases repeat, all together."""

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_DECIMAL = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_FLOAT = re.compile(rf"^(?:{_DECIMAL.pattern}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$")
_TAG = "tag:yaml.org,2002:"
_RULES = (
    ("null", _NULL, "~nN"),
    ("bool", _BOOL, "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
)
_MAX_DIGITS = 300
"""Characters of a number; Python refuses to convert some thousands of digits."""


class YamlError(ValueError):
    """Text that is no YAML, or that no file in use is like: nested too deeply, or full of aliases."""


class WrittenInt(int):
    """A whole number whose text is not its plain decimal form, such as `010`, `+5` or `0x10`."""

    text: str


class WrittenFloat(float):
    """A number with the text it is written as, such as `1e4` or `1.50`."""

    text: str


def parse(text: str, keep_text: bool = False) -> Any:
    """The value of a YAML text: dicts with text as keys, lists and scalars; None for an empty text.

    keep_text: numbers remember their text, for `as_written`. Raises YamlError, also for a key that stands twice.
    """
    try:
        value = yaml.load(text, _Loader)
    except RecursionError:
        raise YamlError("nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise YamlError(" ".join(str(error).split())) from None
    return value if keep_text else strip_text(value)


def as_written(value: object) -> str:
    """The text of a scalar as it stands in the file, for names that look like numbers."""
    return value.text if isinstance(value, (WrittenInt, WrittenFloat)) else str(value)


def parse_decimal(text: str) -> float:
    """The finite decimal number that a table or an option states. Raises ValueError for anything else.

    `float` would also take `1_0` for 10, and `nan`.
    """
    value = float(text) if len(text) <= _MAX_DIGITS and _DECIMAL.fullmatch(text.strip()) else math.inf
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]!r} is no number")
    return value


def strip_text(value: Any) -> Any:
    """A parsed value with plain numbers."""
    if isinstance(value, dict):
        return {key: strip_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [strip_text(item) for item in value]
    if isinstance(value, WrittenInt):
        return int(value)
    return float(value) if isinstance(value, WrittenFloat) else value


def dump(value: Any, **style: Any) -> str:
    """Plain data as YAML text that `parse` and readers of YAML 1.1 read back to the same value."""
    return cast(str, yaml.dump(value, Dumper=_Dumper, **{"sort_keys": False, "width": 120, **style}))


def dump_line(value: Any, width: int = 10**6) -> str:
    """Plain data as YAML on one line."""
    # YAML ends a scalar document with dots.
    text = dump(value, default_flow_style=True, width=width)
    return text.removesuffix("\n").removesuffix("\n...")


# --- Reading ---


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema. Refuses a key that stands twice: plain YAML keeps the last one in silence."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _count_values(node, {}, 0)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        mapping: dict[str, Any] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is no plain text", key.start_mark)
            mapping[key.value] = self.construct_object(item, deep=True)
        return mapping

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Checked before `<<` adds the keys of another section, which own keys may replace.
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"`{key.value}` stands twice", key.start_mark)
            seen.add(str(key.value))
        super().flatten_mapping(node)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value
    if len(text) > _MAX_DIGITS or not _INT.match(text):
        raise yaml.constructor.ConstructorError(None, None, f"{text[:40]!r} is no whole number", node.start_mark)
    number = WrittenInt(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    number.text = text
    return int(number) if str(int(number)) == text else number


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = node.value
    if len(text) > _MAX_DIGITS or not _FLOAT.match(text):
        raise yaml.constructor.ConstructorError(None, None, f"{text[:40]!r} is no number", node.start_mark)
    number = WrittenFloat(re.sub(r"\.(inf|nan)", r"\1", text.lower()))
    number.text = text
    return number


_CONSTRUCTORS: dict[str | None, Any] = {
    _TAG + "null": lambda loader, node: None,
    _TAG + "bool": lambda loader, node: node.value.lower() == "true",
    _TAG + "int": _construct_int,
    _TAG + "float": _construct_float,
    _TAG + "str": lambda loader, node: loader.construct_scalar(node),
    _TAG + "seq": lambda loader, node: loader.construct_sequence(node, deep=True),
    _TAG + "map": lambda loader, node: loader.construct_mapping(node),
    # Any other tag is refused.
    None: yaml.SafeLoader.yaml_constructors[None],
}
_Loader.yaml_constructors.update(_CONSTRUCTORS)
for _name, _pattern, _first in (*_RULES, ("merge", re.compile("^<<$"), "<")):
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, [*_first, *([""] if _name == "null" else [])])


def _count_values(node: yaml.Node, counts: dict[int, int], depth: int) -> int:
    """Number of values below a node, with those that aliases repeat. Raises YamlError for a bomb or a cycle."""
    if depth > _MAX_DEPTH:
        raise YamlError(f"nested more than {_MAX_DEPTH} levels deep, or a value that holds itself")
    if id(node) in counts:
        return counts[id(node)]

    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    count = 1 + sum(_count_values(child, counts, depth + 1) for child in children)

    counts[id(node)] = count
    # What a file spells out is as long as the file; only aliases multiply.
    if count > len(counts) + _MAX_REPEATS:
        raise YamlError(f"aliases repeat more than {_MAX_REPEATS} values; write the file without them")
    return count


# --- Writing ---


class _Dumper(yaml.SafeDumper):
    """Puts a text in quotation marks that YAML 1.1 or 1.2 would read as something else."""

    # A value that stands in two places is written twice, without an alias.
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _RULES:
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, list(_first))
