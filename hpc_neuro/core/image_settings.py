"""The settings that `trace`, `infer`, `demo` and `prepare` take alike for the images that they read."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import AfterValidator, Field

from hpc_neuro.core.geometry import Point, Shape, VoxelSize
from hpc_neuro.core.schema import InputError

_UM_RANGE = (1e-6, 1e6)
"""[um] Sides of voxels that are taken: from below an atom to a meter."""


def _check_size(size: VoxelSize) -> VoxelSize:
    if not all(_UM_RANGE[0] <= length <= _UM_RANGE[1] for length in size):
        raise ValueError(f"{list(size)} must be three numbers above 0 in um, from {_UM_RANGE[0]:g} to {_UM_RANGE[1]:g}")
    return size


def _check_range(limits: tuple[float, float]) -> tuple[float, float]:
    if not (limits[0] < limits[1] and all(map(math.isfinite, limits))):
        raise ValueError(f"range {list(limits)} must rise; give darkest,brightest as two finite numbers")
    return limits


def require_voxel_size(size: VoxelSize, name: str = "voxel_size") -> None:
    """Raise InputError for sides that no voxel has. name: what states them, for the message."""
    try:
        _check_size(size)
    except ValueError as error:
        raise InputError(f"{name} {error}") from None


GivenVoxelSize = Annotated[VoxelSize, AfterValidator(_check_size)]
"""[um] z, y, x; finite and above 0."""
GivenChannel = Annotated[int, Field(ge=0)]
"""Number of a channel, from 0."""
GivenRange = Annotated[tuple[float, float], AfterValidator(_check_range)]
"""Brightness that becomes 0 and 1: darkest, brightest."""


def require_inside(root: Point, shape: Shape, image: object, source: str = "") -> None:
    """Raise InputError for a root outside an image. A voxel reaches half a voxel around its center.

    root: [voxel] z y x. image: its path, for the message. source: where the root is from, such as ` of FILE`.
    """
    if any(not -0.5 <= coordinate < size for coordinate, size in zip(root, shape, strict=True)):
        place = ", ".join(f"{coordinate:g}" for coordinate in root)
        raise InputError(f"the root {place}{source} lies outside {image}, whose shape is {shape} (z, y, x)")
