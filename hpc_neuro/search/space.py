"""The search space: dotted keys of the train config, the values each may take, and when."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import yaml
from pydantic import Discriminator, Field, Tag

from hpc_neuro.core.schema import ConfigError, config

When = dict[str, list[Any]]
Point = dict[str, Any]
"""Name of a dimension -> its value; a `bundle` has the name of its option. Dimensions that do not apply are absent."""
SEED = "seed"
"""The train key whose values are repetitions of a setting rather than settings."""
_COMBINATIONS = 64  # random ones that are checked where not all can be


@config
class Choice:
    """One of several values: `{choice: [a, b]}`."""

    choice: tuple[Any, ...] = Field(min_length=1)
    """The values; anything that YAML can hold."""
    when: When = Field(default_factory=dict)
    """Applies only where each of these earlier dimensions has one of these values."""


@config
class Range:
    """A number between two: `{range: [low, high]}`."""

    range: tuple[float, float]
    """Lowest and highest value."""
    when: When = Field(default_factory=dict)
    """As of `choice`."""

    def __post_init__(self) -> None:
        _ordered(self.range)


@config
class Log:
    """A positive number whose logarithm lies between those of two: `{log: [low, high]}`."""

    log: tuple[float, float]
    """Lowest and highest value."""
    when: When = Field(default_factory=dict)
    """As of `choice`."""

    def __post_init__(self) -> None:
        _ordered(self.log)
        if self.log[0] <= 0:
            raise ValueError(f"log starts at {self.log[0]:g}; a logarithm needs values above 0")


@config
class Integer:
    """A whole number between two, both included: `{integer: [low, high], step: 2}`."""

    integer: tuple[int, int]
    """Lowest and highest value."""
    step: int = Field(default=1, ge=1)
    """From one value to the next."""
    when: When = Field(default_factory=dict)
    """As of `choice`."""

    def __post_init__(self) -> None:
        _ordered(self.integer)
        if (self.integer[1] - self.integer[0]) % self.step:
            raise ValueError(f"step {self.step} does not lead from {self.integer[0]} to {self.integer[1]}")


@config
class Bundle:
    """Several keys that change together, under a name: `{bundle: {name: {dotted.key: value, ...}, ...}}`."""

    bundle: dict[str, dict[str, Any]] = Field(min_length=1)
    """Option -> the keys that it sets."""
    when: When = Field(default_factory=dict)
    """As of `choice`."""


def _kind(value: Any) -> str:
    """The key that says which dimension this is, else the first key found, for the error to name."""
    kinds = ("choice", "range", "log", "integer", "bundle")
    keys = list(value) if isinstance(value, dict) else [k for k in kinds if hasattr(value, k)]
    return next((k for k in keys if k in kinds), str(keys[0]) if keys else "nothing")


Dimension = Annotated[
    Annotated[Choice, Tag("choice")]
    | Annotated[Range, Tag("range")]
    | Annotated[Log, Tag("log")]
    | Annotated[Integer, Tag("integer")]
    | Annotated[Bundle, Tag("bundle")],
    Discriminator(_kind),
]
Space = dict[str, Dimension]


def options(dimension: Dimension) -> list[Any] | None:
    """All values of a dimension in order, None where they cannot be counted."""
    if isinstance(dimension, Choice):
        return list(dimension.choice)
    if isinstance(dimension, Bundle):
        return list(dimension.bundle)
    if isinstance(dimension, Integer):
        return list(range(dimension.integer[0], dimension.integer[1] + 1, dimension.step))
    return None


def applies(dimension: Dimension, point: Point) -> bool:
    """Whether a dimension is there, given the values of the earlier ones."""
    return all(name in point and point[name] in values for name, values in dimension.when.items())


def grid(space: Space) -> list[Point]:
    """Every point of a space that can be counted; the first dimension changes slowest.

    Raises ConfigError for a dimension whose values cannot be counted.
    """
    if endless := [name for name, d in space.items() if options(d) is None]:
        raise ConfigError(
            f"space.{endless[0]}: a grid needs values that can be counted; write `choice: [...]` or `integer: [...]`, "
            "or take the sampler `random` or `tpe`"
        )
    points: list[Point] = [{}]
    for name, dimension in space.items():
        values = options(dimension) or []
        points = [
            q for p in points for q in ([{**p, name: value} for value in values] if applies(dimension, p) else [p])
        ]
    return points


def keys(space: Space, point: Point) -> list[str]:
    """A point as `dotted.key=value`, in the order of the space."""
    pairs: list[tuple[str, Any]] = []
    for name, dimension in space.items():
        if name not in point:
            continue
        value = point[name]
        pairs += dimension.bundle[value].items() if isinstance(dimension, Bundle) else [(name, value)]
    return [f"{key}={text(value)}" for key, value in pairs]


def text(value: Any) -> str:
    """A value as YAML on one line."""
    line = str(yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6))
    return line.removesuffix("\n").removesuffix("\n...")


def structure_faults(space: Space) -> list[str]:
    """What is wrong with the space itself: conditions on what is not there or not earlier, one key set twice."""
    faults, seen, owner = [], set[str](), dict[str, str]()
    for name, dimension in space.items():
        for other, values in dimension.when.items():
            if other not in seen:
                faults.append(f"space.{name}.when: {other} is no earlier dimension of the space")
            elif (held := options(space[other])) is not None:
                faults += [f"space.{name}.when: {other} is never {v!r}" for v in values if v not in held]
        seen.add(name)
        sets = {k for o in dimension.bundle.values() for k in o} if isinstance(dimension, Bundle) else {name}
        for key in sorted(sets):
            if key in owner:
                faults.append(f"space.{name}: {key} is already set by {owner[key]}")
            owner[key] = name
    return faults


def check(space: Space, every_point: bool, load: Callable[[Sequence[str]], Any]) -> list[str]:
    """What `load` (keys -> config, ConfigError) refuses about the values of the space, each fault once.

    every_point: all points of the grid are tried; else each value of each dimension with the first values of the
    others (of a range its ends and its middle), and some random combinations.
    """
    faults: dict[str, str] = {}
    for point in grid(space) if every_point else probes(space):
        try:
            load(keys(space, point))
        except ConfigError as error:
            for fault in str(error).splitlines()[1:] or [str(error)]:
                faults.setdefault(fault.strip(), _blame(fault, space, point))
    return [f"{fault} (with {where})" for fault, where in faults.items()]


def probes(space: Space) -> Iterator[Point]:
    """Points that show each value of each dimension once, then random combinations that are always the same."""
    for name, dimension in space.items():
        for value in _probe_values(dimension):
            yield _complete(space, {**_needed(space, name), name: value}, lambda values: values[0])
    draw = np.random.default_rng(0)
    for _ in range(_COMBINATIONS):
        yield _complete(space, {}, lambda values: values[int(draw.integers(len(values)))])


def covering(space: Space) -> list[Point]:
    """The fewest points in which each value (of a range its ends and its middle) stands once, conditions met."""
    most = max((len(_probe_values(d)) for d in space.values()), default=1)
    return [_complete(space, {}, lambda values, i=i: values[i % len(values)]) for i in range(most)]  # type: ignore[misc]


def _probe_values(dimension: Dimension) -> list[Any]:
    if isinstance(dimension, Range):
        low, high = dimension.range
        return [low, (low + high) / 2, high]
    if isinstance(dimension, Log):
        low, high = dimension.log
        return [low, math.sqrt(low * high), high]
    values = options(dimension) or []
    return values if len(values) <= _COMBINATIONS else [values[0], values[len(values) // 2], values[-1]]


def _needed(space: Space, name: str) -> Point:
    """What must be chosen so that `name` applies."""
    found: Point = {}
    for other, values in space[name].when.items():
        if other in space:
            found |= _needed(space, other) | {other: values[0]}
    return found


def _complete(space: Space, fixed: Point, pick: Callable[[list[Any]], Any]) -> Point:
    """A point with `fixed` values, the others picked from those that are probed."""
    point: Point = {}
    for name, dimension in space.items():
        if applies(dimension, point):
            point[name] = fixed[name] if name in fixed else pick(_probe_values(dimension))
    return point


def _blame(fault: str, space: Space, point: Point) -> str:
    """The values that a fault is about: those of its key, else the whole point."""
    key = fault.strip().partition(":")[0]
    about = [n for n in point if key == n or key.startswith(f"{n}.") or n.startswith(f"{key}.")]
    about += [n for n, v in point.items() if isinstance(space[n], Bundle) and _sets(space[n], v, key)]
    chosen: Mapping[str, Any] = {n: point[n] for n in about} or point
    return ", ".join(f"{n}={text(v)}" for n, v in chosen.items()) or "no values"


def _sets(bundle: Any, option: str, key: str) -> bool:
    return any(key == k or key.startswith(f"{k}.") for k in bundle.bundle[option])


def _ordered(bounds: tuple[float, float]) -> None:
    low, high = bounds
    if not low < high:
        raise ValueError(f"[{low:g}, {high:g}] must go from a lower to a higher value")
