"""Find a neurite that enters the stack and meets the root of the tree, but is not part of the tree.

In several public data sets the traced tree starts where the arbor does, although the axon leading to it is as bright as
the tree. Labelled as background, it teaches a model to drop neurites and counts against every method. `prepare` marks
it as unlabelled instead.
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
from hpc_neuro.data.rasterize import DrawSettings, draw_body, prepare_tree

log = logging.getLogger(__name__)

SEARCH_RADIUS = 256
"""[fine voxel] Half the side of the box around the root that is searched."""

BRIGHTNESS_SHARE = 0.3
"""A neurite is brighter than this share of the tree's own brightness near its root."""

ROOT_NEIGHBORHOOD = 25.0
"""[fine voxel] The nodes within this distance of the root give the tree's own brightness."""

TREE_HALO = 3.0
"""[fine voxel] Bright voxels this near to the drawn tree belong to the tree."""

MIN_LENGTH = 12.0
"""[fine voxel] Anything shorter is the end of the tree itself."""

MAX_SHARE = 0.02
"""A component that fills more of the searched box than this is bright tissue, not a neurite."""


@dataclass(frozen=True)
class VoxelRegion:
    """A set of voxels of a volume."""

    box: Box
    inside: NDArray[np.bool_]  # [Z, Y, X] of the box

    def mask_in(self, box: Box) -> NDArray[np.bool_]:
        """[Z, Y, X] which voxels of any other box of the volume belong to the region."""
        mask = np.zeros(box.shape, dtype=bool)
        overlap = self.box.clip(box)
        if overlap.size:
            mask[overlap.relative_to(box.start).slices] = self.inside[overlap.relative_to(self.box.start).slices]
        return mask


def find_proximal_axon(tree: Tree, stretch: float, read: ReadBox, shape: Shape, size: VoxelSize) -> VoxelRegion | None:
    """The bright neurite that meets the root of `tree` (voxels; measured radii) from outside; None without one.

    Only for a tree of one root that is not a soma. Reads at most 512 fine voxels a side around the root.
    """
    roots = tree.roots

    # Nothing enters at a soma, and with several roots it is unknown which one is the entry.
    if len(roots) != 1 or tree.types[roots[0]] == 1 or len(tree) < 2:
        return None
    root = tree.points[roots[0]]
    box = _search_box(root, shape, size)
    image = read(box).astype(np.float32)

    # Bright components outside the drawn tree and its halo.
    # The margin covers the blurred surface of the tree itself.
    prepared = prepare_tree(tree, size, DrawSettings(ignore_margin=TREE_HALO, stretch=stretch))
    near_tree = cast(NDArray[np.bool_], draw_body(prepared, box)[1])
    is_bright = image > _brightness_threshold(tree, root, image, box, size)
    labels = cc3d.connected_components(is_bright & ~near_tree, connectivity=26)

    # Of these, the ones that touch the root.
    # Touching means: within the root's radius and its halo on both sides.
    distance = _distance_from(root, box, size)
    touching = np.unique(labels[distance <= (tree.radii[roots[0]] + 2 * TREE_HALO)])
    is_kept = np.zeros(int(labels.max()) + 1, dtype=bool)
    is_kept[touching[touching > 0]] = True
    inside = is_kept[labels]

    # The blurred end of the tree is bright, too, but short.
    if not inside.any() or float(distance[inside].max()) < MIN_LENGTH:
        return None
    if inside.mean() > MAX_SHARE:
        log.warning(
            "the bright region before the root fills %.1f %% of its surroundings, too much for a neurite; it stays "
            "background",
            100 * inside.mean(),
        )
        return None

    # The threshold cuts the dim surface of the neurite away; dilation adds it again.
    grow = np.maximum(1, np.rint(1.5 * fine_voxel(size) / np.asarray(size))).astype(int)
    return VoxelRegion(box, ndimage.binary_dilation(inside, np.ones(2 * grow + 1)))


def _search_box(root: NDArray[np.float64], shape: Shape, size: VoxelSize) -> Box:
    reach = np.ceil(SEARCH_RADIUS * fine_voxel(size) / np.asarray(size)).astype(np.int64)

    # A root may lie slightly outside the image.
    center = np.clip(np.rint(root), 0, np.asarray(shape) - 1).astype(np.int64)
    box = Box(cast(Shape, tuple(center - reach)), cast(Shape, tuple(center + reach + 1)))
    return box.clip(Box.whole(shape))


def _brightness_threshold(
    tree: Tree, root: NDArray[np.float64], image: NDArray[np.float32], box: Box, size: VoxelSize
) -> float:
    """The intensity above which a voxel of the box may belong to a neurite."""
    distance = np.linalg.norm((tree.points - root) * np.asarray(size) / fine_voxel(size), axis=1)
    nodes = tree.points[distance <= ROOT_NEIGHBORHOOD]
    voxels = np.clip(np.rint(nodes), box.start, np.asarray(box.stop) - 1).astype(np.int64) - np.asarray(box.start)

    # Neurites fill little of the box, so its median is background.
    background = float(np.median(image))
    tree_brightness = float(np.median(image[tuple(voxels.T)]))
    return background + BRIGHTNESS_SHARE * (tree_brightness - background)


def _distance_from(point: NDArray[np.float64], box: Box, size: VoxelSize) -> NDArray[np.float32]:
    """[Z, Y, X] fine voxels from a point to each voxel of a box."""
    unit = fine_voxel(size)
    z, y, x = (
        ((np.arange(a, b) - p) * s / unit).astype(np.float32)
        for a, b, p, s in zip(box.start, box.stop, point, size, strict=True)
    )
    distance: NDArray[np.float32] = np.sqrt((z * z)[:, None, None] + ((y * y)[:, None] + x * x))
    return distance
