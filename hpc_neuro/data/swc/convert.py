"""Trees between voxels and micrometers, and onto images that lie flipped, shifted or scaled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.swc.header import Unit, unit_in_um
from hpc_neuro.data.swc.writer import write

_NO_SCALE = (1.0, 1.0, 1.0)
_NO_SHIFT = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Transform:
    """What to do to a tree's coordinates, z y x, in this order: flip, scale, shift."""

    flip: str = ""
    """Axes to mirror, any of z y x; needs the image's `shape`."""
    shape: Shape | None = None
    """Voxels of the image along z y x."""
    scale: tuple[float, float, float] = _NO_SCALE
    shift: tuple[float, float, float] = _NO_SHIFT

    def __str__(self) -> str:
        parts = [f"flip {self.flip} within {self.shape}"] if self.flip else []
        if self.scale != _NO_SCALE:
            parts.append(f"scale {self.scale}")
        if self.shift != _NO_SHIFT:
            parts.append(f"shift {self.shift}")

        return ", ".join(parts) + " (z y x)" if parts else "none"


def transform(tree: Tree, by: Transform) -> Tree:
    """The tree after flip, scale and shift; radii take the middle one of the three scales.

    A flip maps voxel centers onto voxel centers: v becomes n - 1 - v. Raises InputError for a flip without a shape.
    """
    # Twice along one axis would be no flip at all.
    if len(set(by.flip)) < len(by.flip):
        raise InputError(f"flip={by.flip} names an axis twice; name each axis once")

    # Flips come first: `shape` is that of the image before it is scaled.
    points = tree.points.copy()
    for letter in by.flip:
        axis = "zyx".find(letter)
        if axis < 0 or by.shape is None:
            raise InputError(
                f"flip={by.flip} needs axes out of z y x and the image's shape=Z,Y,X; found shape {by.shape}"
            )
        points[:, axis] = by.shape[axis] - 1 - points[:, axis]

    # A negative scale would mirror without a shape, and move the tree out of the image.
    if min(by.scale) <= 0:
        raise InputError(f"scale={by.scale} must be above 0 along every axis; mirror with flip=")
    tree = morphology.scale_tree(replace(tree, points=points), by.scale)

    return replace(tree, points=tree.points + np.asarray(by.shift))


def convert(
    tree: Tree,
    target: Path | str,
    *,
    to: Unit,
    voxel_size: VoxelSize | None,
    stated: Unit | None = None,
    comments: Sequence[str] = (),
) -> Tree:
    """Write a tree in the other unit: voxels to micrometers (`to="um"`) or back, and return it as written.

    `stated` is the unit its file states, if any; a tree in another length, such as nm, is scaled by what that length is
    in um, and needs no voxel size for `to="um"`. Raises InputError when `stated` is `to` already, or without the voxel
    size that is needed.
    """
    # Converting twice would scale twice, and nothing in the result would show it.
    if stated == to:
        raise InputError(f"the tree is in {to} already, by its header; nothing to convert for {target}")

    # Lengths first become um. A file that states nothing is in the other unit.
    um = unit_in_um(stated or ("voxel" if to == "um" else "um"))
    factor = np.full(3, um or 1.0)
    if um is None or to == "voxel":
        if voxel_size is None or min(voxel_size) <= 0:
            raise InputError(f"{target} needs the voxel size in um, above 0 along each axis; give voxel_size=Z,Y,X")
        factor = factor * voxel_size if um is None else factor / voxel_size

    converted = morphology.scale_tree(tree, (float(factor[0]), float(factor[1]), float(factor[2])))
    write(target, converted, unit=to, voxel_size=voxel_size, comments=comments)

    return converted
