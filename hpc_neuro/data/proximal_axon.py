"""What the image shows before the root of the tree: a neurite that enters the stack and that the annotator left out.

In several public data sets the traced tree starts where the arbour does, although the axon leading to it is as bright
as the tree. Called background it teaches a model to drop neurites, and counts against every method; here it is found so
that it can be marked as unlabelled.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import cast

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hpc_neuro.core.geometry import Box, Shape, VoxelSize, fine_voxel
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data.intensity import ReadBox
from hpc_neuro.data.rasterize import Drawing, body, prepared

log = logging.getLogger(__name__)

_REACH = 256  # fine voxels around the root that are searched
_LEVEL = 0.3  # share of the tree's own brightness near its root
_NEAR = 25.0  # fine voxels of tree that give this brightness
_APART = 3.0  # fine voxels around the drawn tree that are its own halo
_LEAST = 12.0  # fine voxels; anything shorter is the end of the tree itself
_FLOOD = 0.02  # of the searched voxels; more than that is no neurite but bright tissue


@dataclass(frozen=True)
class Region:
    """Voxels of a volume."""

    box: Box
    inside: NDArray[np.bool_]  # [Z, Y, X] of the box

    def within(self, box: Box) -> NDArray[np.bool_]:
        """[Z, Y, X] of any other box of the volume."""
        found = np.zeros(box.shape, dtype=bool)
        both = self.box.clip(box)
        if both.size:
            found[both.relative_to(box.start).slices] = self.inside[both.relative_to(self.box.start).slices]
        return found


def beyond_root(tree: Tree, stretch: float, read: ReadBox, shape: Shape, size: VoxelSize) -> Region | None:
    """The bright neurite that meets the root of `tree` (voxels; measured radii) from outside the tree; None if none.

    Only for a tree of one root that is not a soma. Reads at most 512 fine voxels a side around the root.
    """
    roots = tree.roots
    if len(roots) != 1 or tree.types[roots[0]] == 1 or len(tree) < 2:
        return None
    unit = fine_voxel(size)
    root = tree.points[roots[0]]
    reach = np.ceil(_REACH * unit / np.asarray(size)).astype(np.int64)
    middle = np.clip(np.rint(root), 0, np.asarray(shape) - 1).astype(np.int64)
    box = Box(cast(Shape, tuple(middle - reach)), cast(Shape, tuple(middle + reach + 1))).clip(Box.whole(shape))
    image = read(box).astype(np.float32)
    own = body(prepared(tree, size, Drawing(ignore_margin=_APART, stretch=stretch)), box)[1]
    near = tree.points[np.linalg.norm((tree.points - root) * np.asarray(size) / unit, axis=1) <= _NEAR]
    places = np.clip(np.rint(near), box.start, np.asarray(box.stop) - 1).astype(np.int64) - np.asarray(box.start)
    dark = float(np.median(image))
    level = dark + _LEVEL * (float(np.median(image[tuple(places.T)])) - dark)
    labels = cc3d.connected_components((image > level) & ~cast(NDArray[np.bool_], own), connectivity=26)
    apart = _apart(box, root, size)
    touching = np.unique(labels[apart <= (tree.radii[roots[0]] + 2 * _APART)])
    found = np.zeros(int(labels.max()) + 1, dtype=bool)
    found[touching[touching > 0]] = True
    inside = found[labels]
    if not inside.any() or float(apart[inside].max()) < _LEAST:
        return None
    if inside.mean() > _FLOOD:
        log.warning(
            "what is bright before the root fills %.1f %% of its surroundings and stays background", 100 * inside.mean()
        )
        return None
    grow = np.maximum(1, np.rint(1.5 * unit / np.asarray(size))).astype(int)
    return Region(box, ndimage.binary_dilation(inside, np.ones(2 * grow + 1)))


def _apart(box: Box, point: NDArray[np.float64], size: VoxelSize) -> NDArray[np.float32]:
    """[Z, Y, X] fine voxels from a point."""
    unit = fine_voxel(size)
    z, y, x = (
        ((np.arange(a, b) - p) * s / unit).astype(np.float32)
        for a, b, p, s in zip(box.start, box.stop, point, size, strict=True)
    )
    apart: NDArray[np.float32] = np.sqrt((z * z)[:, None, None] + ((y * y)[:, None] + x * x))
    return apart
