"""What is as bright as a neurite and belongs to no tree: neurites that nobody traced.

A stack often shows many neurons, and the SWC holds one. Labelled as background, the others teach a model to miss
neurites. `prepare off_tree=unlabelled` marks them instead.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data.foreground import HALF, measure_foreground
from hpc_neuro.data.intensity import ReadBox
from hpc_neuro.data.proximal_axon import TREE_HALO
from hpc_neuro.data.rasterize import DrawSettings, draw_body, prepare_tree

_RIM: Shape = (1, 1, 1)
"""[voxel] The dim surface of an untraced neurite around what is bright of it."""


class UntracedNeurites:
    """The foreground of an image (`measure_foreground`) beside a tree, read by box."""

    def __init__(self, tree: Tree, stretch: float, read: ReadBox, shape: Shape, size: VoxelSize) -> None:
        """`tree` in voxels with measured radii. Reads the image twice. Raises InputError for one without contrast."""
        self._shape = shape
        self._foreground = measure_foreground(read, shape)
        self._tree = prepare_tree(tree, size, DrawSettings(ignore_margin=TREE_HALO, stretch=stretch))

    def mask_in(self, box: Box) -> NDArray[np.bool_]:
        """[Z, Y, X] which voxels of a box are untraced neurites."""
        around = box.grow(_RIM).clip(Box.whole(self._shape))
        is_bright = self._foreground.probability(around) >= HALF
        if not is_bright.any():
            return np.zeros(box.shape, dtype=bool)

        wide = ndimage.binary_dilation(is_bright, np.ones([2 * reach + 1 for reach in _RIM], dtype=bool))
        inside, near_tree = draw_body(self._tree, box)
        is_tree = inside | cast(NDArray[np.bool_], near_tree)
        return np.asarray(wide[box.relative_to(around.start).slices] & ~is_tree)
