"""The search space: dotted keys of the train config, the values each may take, and when."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Discriminator, Field, Tag

from hpc_neuro.core import yaml_text
from hpc_neuro.core.schema import ConfigError, config

When = dict[str, list[Any]]
"""Name of an earlier dimension -> its values under which a dimension applies."""
Point = dict[str, Any]
"""Name of a dimension -> its value, of a bundle the name of its option. Dimensions that do not apply are absent."""
SEED = "seed"
"""The train key whose values are repetitions of a setting rather than settings."""
_COMBINATIONS = 64
"""Random points that are checked where not all can be."""


@config
class ChoiceDimension:
    """One of several values: `{choice: [a, b]}`."""

    choice: tuple[Any, ...] = Field(min_length=1)
    """The values; anything that YAML can hold."""
    when: When = Field(default_factory=dict)
    """Applies only where each of these earlier dimensions has one of these values."""


@config
class RangeDimension:
    """A number between two: `{range: [low, high]}`."""

    range: tuple[float, float]
    """Lowest and highest value."""
    when: When = Field(default_factory=dict)
    """As of `choice`."""

    def __post_init__(self) -> None:
        _require_order(self.range)


@config
class LogDimension:
    """A positive number whose logarithm lies between those of two: `{log: [low, high]}`."""

    log: tuple[float, float]
    """Lowest and highest value."""
    when: When = Field(default_factory=dict)
    """As of `choice`."""

    def __post_init__(self) -> None:
        _require_order(self.log)
        if self.log[0] <= 0:
            raise ValueError(f"log starts at {self.log[0]:g}; a logarithm needs values above 0")


@config
class IntegerDimension:
    """An integer between two, both included: `{integer: [low, high], step: 2}`."""

    integer: tuple[int, int]
    """Lowest and highest value."""
    step: int = Field(default=1, ge=1)
    """From one value to the next."""
    when: When = Field(default_factory=dict)
    """As of `choice`."""

    def __post_init__(self) -> None:
        _require_order(self.integer)
        low, high = self.integer
        if (high - low) % self.step:
            raise ValueError(f"step {self.step} does not lead from {low} to {high}")


@config
class BundleDimension:
    """Several keys that change together, under a name: `{bundle: {name: {dotted.key: value, ...}, ...}}`."""

    bundle: dict[str, dict[str, Any]] = Field(min_length=1)
    """Option -> the keys that it sets."""
    when: When = Field(default_factory=dict)
    """As of `choice`."""


def _find_kind(value: Any) -> str:
    """The key that says which dimension this is, else the first key, for the error to name."""
    # pydantic calls this for a mapping read from YAML and for an instance alike.
    kinds = ("choice", "range", "log", "integer", "bundle")
    keys = list(value) if isinstance(value, dict) else [kind for kind in kinds if hasattr(value, kind)]
    return next((key for key in keys if key in kinds), str(keys[0]) if keys else "nothing")


Dimension = Annotated[
    Annotated[ChoiceDimension, Tag("choice")]
    | Annotated[RangeDimension, Tag("range")]
    | Annotated[LogDimension, Tag("log")]
    | Annotated[IntegerDimension, Tag("integer")]
    | Annotated[BundleDimension, Tag("bundle")],
    Discriminator(_find_kind),
]
Space = dict[str, Dimension]


def list_values(dimension: Dimension) -> list[Any] | None:
    """All values of a dimension in order, None where they cannot be counted."""
    if isinstance(dimension, ChoiceDimension):
        return list(dimension.choice)
    if isinstance(dimension, BundleDimension):
        return list(dimension.bundle)
    if isinstance(dimension, IntegerDimension):
        return list(range(dimension.integer[0], dimension.integer[1] + 1, dimension.step))

    return None


def is_numeric(dimension: Dimension) -> bool:
    """Whether the values of a dimension lie on a scale of numbers."""
    return isinstance(dimension, (RangeDimension, LogDimension, IntegerDimension))


def is_applicable(dimension: Dimension, point: Point) -> bool:
    """Whether a dimension applies, given the values of the earlier ones."""
    return all(name in point and point[name] in values for name, values in dimension.when.items())


def list_grid_points(space: Space) -> list[Point]:
    """Every point of a space that can be counted; the first dimension changes slowest.

    Raises ConfigError for a dimension whose values cannot be counted.
    """
    # A range has no end of values.
    endless = [name for name, dimension in space.items() if list_values(dimension) is None]
    if endless:
        raise ConfigError(
            f"space.{endless[0]}: a grid needs values that can be counted; write `choice: [...]` or `integer: [...]`, "
            "or take the sampler `random` or `tpe`"
        )

    # Each dimension multiplies the points before it, where it applies.
    points: list[Point] = [{}]
    for name, dimension in space.items():
        points = [extended for point in points for extended in _extend(point, name, dimension)]

    return points


def _extend(point: Point, name: str, dimension: Dimension) -> list[Point]:
    """A point with each value of one more dimension; the point itself where the dimension does not apply."""
    if not is_applicable(dimension, point):
        return [point]
    return [{**point, name: value} for value in list_values(dimension) or []]


def format_keys(space: Space, point: Point) -> list[str]:
    """A point as `dotted.key=value`, in the order of the space."""
    pairs: list[tuple[str, Any]] = []

    for name, dimension in space.items():
        if name not in point:
            continue
        # A bundle stands for the keys of its option.
        value = point[name]
        pairs += dimension.bundle[value].items() if isinstance(dimension, BundleDimension) else [(name, value)]

    return [f"{key}={format_value(value)}" for key, value in pairs]


def format_value(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml_text.dump_line(value)


# ------------------------------------------------------------------------------------------------ checks of a space


def find_structure_faults(space: Space) -> list[str]:
    """Faults of the space itself: conditions on what is no earlier dimension, one key set twice."""
    faults: list[str] = []
    earlier: set[str] = set()
    owners: dict[str, str] = {}

    for name, dimension in space.items():
        # A condition may only name a dimension whose value is already chosen.
        faults += _find_condition_faults(space, name, earlier)
        earlier.add(name)
        for key in sorted(_list_keys(name, dimension)):
            if key in owners:
                faults.append(f"space.{name}: {key} is already set by {owners[key]}")
            owners[key] = name

    return faults


def _find_condition_faults(space: Space, name: str, earlier: set[str]) -> list[str]:
    faults = []

    for other, values in space[name].when.items():
        if other not in earlier:
            faults.append(f"space.{name}.when: {other} is no earlier dimension of the space")
            continue
        # Of a range, every value between its ends is possible.
        possible = list_values(space[other])
        if possible is not None:
            faults += [f"space.{name}.when: {other} is never {v!r}" for v in values if v not in possible]

    return faults


def _list_keys(name: str, dimension: Dimension) -> set[str]:
    """The keys of the train config that a dimension sets."""
    if not isinstance(dimension, BundleDimension):
        return {name}
    return {key for option in dimension.bundle.values() for key in option}


def find_value_faults(space: Space, every_point: bool, load: Callable[[Sequence[str]], Any]) -> list[str]:
    """What `load` (keys -> config, ConfigError) refuses about the values of the space, each fault once.

    every_point: all points of the grid are tried; else each value of each dimension with the first values of the
    others (of a range its ends and its middle), and some random combinations.
    """
    faults: dict[str, str] = {}

    for point in list_grid_points(space) if every_point else iterate_probes(space):
        # The same fault shows at many points: the first one is named as its cause.
        try:
            load(format_keys(space, point))
        except ConfigError as error:
            # The first line names the config, each further line one fault.
            for line in str(error).splitlines()[1:] or [str(error)]:
                fault = line.strip()
                faults.setdefault(fault, _describe_cause(fault, space, point))

    return [f"{fault} (with {cause})" for fault, cause in faults.items()]


def iterate_probes(space: Space) -> Iterator[Point]:
    """Yield points that show each value of each dimension once, then random combinations, always the same ones."""
    for name, dimension in space.items():
        for value in _probe_values(dimension):
            yield _complete_point(space, {**_collect_conditions(space, name), name: value}, lambda values: values[0])

    # Faults of combinations show only when values meet; the seed makes a check repeatable.
    draw = np.random.default_rng(0)
    for _ in range(_COMBINATIONS):
        yield _complete_point(space, {}, lambda values: values[int(draw.integers(len(values)))])


def cover_values(space: Space) -> list[Point]:
    """The fewest points in which each value (of a range its ends and its middle) occurs once, conditions met."""
    # The dimension with most values sets the number of points.
    count = max((len(_probe_values(dimension)) for dimension in space.values()), default=1)
    return [_complete_point(space, {}, lambda values, i=i: values[i % len(values)]) for i in range(count)]  # type: ignore[misc]


def _probe_values(dimension: Dimension) -> list[Any]:
    """The values of a dimension that checks try; of a range its ends and its middle."""
    if isinstance(dimension, RangeDimension):
        low, high = dimension.range
        return [low, (low + high) / 2, high]

    if isinstance(dimension, LogDimension):
        low, high = dimension.log
        return [low, math.sqrt(low * high), high]

    # Of a long list, its ends and its middle stand for it.
    values = list_values(dimension) or []
    return values if len(values) <= _COMBINATIONS else [values[0], values[len(values) // 2], values[-1]]


def _collect_conditions(space: Space, name: str) -> Point:
    """The values that must be chosen so that `name` applies."""
    conditions: Point = {}
    # A condition may have conditions of its own.
    for other, values in space[name].when.items():
        if other in space:
            conditions |= _collect_conditions(space, other) | {other: values[0]}
    return conditions


def _complete_point(space: Space, fixed: Point, pick: Callable[[list[Any]], Any]) -> Point:
    """A point with `fixed` values, the others picked from those that are probed."""
    point: Point = {}
    for name, dimension in space.items():
        if is_applicable(dimension, point):
            point[name] = fixed[name] if name in fixed else pick(_probe_values(dimension))
    return point


def _describe_cause(fault: str, space: Space, point: Point) -> str:
    """The values that a fault is about: those of its key, else the whole point."""
    # A fault begins with the dotted key that it is about.
    key = fault.partition(":")[0]
    names = [name for name in point if key == name or key.startswith(f"{name}.") or name.startswith(f"{key}.")]
    names += [name for name, value in point.items() if _is_set_by_bundle(key, space[name], value)]
    values: Mapping[str, Any] = {name: point[name] for name in names} or point
    return ", ".join(f"{name}={format_value(value)}" for name, value in values.items()) or "no values"


def _is_set_by_bundle(key: str, dimension: Dimension, option: Any) -> bool:
    if not isinstance(dimension, BundleDimension):
        return False
    return any(key == name or key.startswith(f"{name}.") for name in dimension.bundle[option])


def _require_order(bounds: tuple[float, float]) -> None:
    low, high = bounds
    if not low < high:
        raise ValueError(f"[{low:g}, {high:g}] must go from a lower to a higher value")
