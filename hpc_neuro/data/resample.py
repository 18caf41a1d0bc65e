"""Another grid of voxels over the same image, read by box: coarser voxels are means, finer ones are interpolated.

Both grids begin at the corner of the first voxel, so that voxel i of the new grid covers [i * f, (i + 1) * f) voxels of
the old one, where f is the factor:

    old grid    |   0   |   1   |   2   |   3   |   4   |   5   |
    new, f = 2  |       0       |       1       |       2       |
    new, f = 1/2| 0 | 1 | 2 | 3 | 4 | 5 | ...

Along an axis with f > 1 a new voxel is the mean over the part that it covers, with f < 1 it is linear between the
centers of old voxels. The weights of a voxel depend on its place in the volume alone, so that a volume may be read in
boxes of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Box, Point, Shape, VoxelSize, fine_voxel
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data.intensity import ReadBox

_MOST_VOXELS = 1 << 24
"""[voxel] Read of the other grid at once; larger boxes are read in parts."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Resampling:
    """The grid of an image, and another one over the same space."""

    shape: Shape
    """[voxel] Of the image."""
    voxel_size: VoxelSize
    """[um] Of the image."""
    factor: Point
    """[voxel of the image] Sides of a voxel of the other grid, z y x."""

    @property
    def new_shape(self) -> Shape:
        """[voxel] Of the other grid; the last voxel of an axis may reach over the end of the image."""
        # A quotient may exceed a whole number by its rounding alone.
        z, y, x = (max(math.ceil(n / f - 1e-6), 1) for n, f in zip(self.shape, self.factor, strict=True))
        return z, y, x

    @property
    def new_voxel_size(self) -> VoxelSize:
        """[um] Of the other grid."""
        z, y, x = (side * f for side, f in zip(self.voxel_size, self.factor, strict=True))
        return z, y, x

    def read_new(self, read: ReadBox) -> Callable[[Box], Floats]:
        """Reads boxes of the other grid as float32, from boxes of the image."""
        return lambda box: _resample(read, self.shape, box, self.factor)

    def read_back(self, read: ReadBox) -> Callable[[Box], Floats]:
        """Reads boxes of the image's grid as float32, from boxes of the other grid."""
        z, y, x = self.factor
        return lambda box: _resample(read, self.new_shape, box, (1 / z, 1 / y, 1 / x))

    def find_image_box(self, box: Box) -> Box:
        """The voxels of the image that a box of the other grid is made of by `read_new`."""
        return _find_source(self.shape, box, self.factor)

    def find_new_box(self, box: Box) -> Box:
        """The voxels of the other grid that a box of the image's grid is made of by `read_back`."""
        z, y, x = self.factor
        return _find_source(self.new_shape, box, (1 / z, 1 / y, 1 / x))

    def find_new_voxels(self, voxels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[N, 3] the first and the last voxels of the other grid of which `read_back` makes voxels [N, 3] of the
        image."""
        spans = [
            _find_taps(voxels[:, axis], size, 1 / f)
            for axis, (size, f) in enumerate(zip(self.new_shape, self.factor, strict=True))
        ]
        first, last = (np.stack(ends, axis=1) for ends in zip(*spans, strict=True))
        return first, last

    def move_to_new(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """[N, 3] places of the image, z y x voxels -> the same in voxels of the other grid."""
        places: NDArray[np.float64] = (np.asarray(points, dtype=np.float64) + 0.5) / np.asarray(self.factor) - 0.5
        return places

    def move_back(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """[N, 3] places in voxels of the other grid -> the same in voxels of the image."""
        places: NDArray[np.float64] = (np.asarray(points, dtype=np.float64) + 0.5) * np.asarray(self.factor) - 0.5
        return places

    def move_point_back(self, point: Point) -> Point:
        """One place in voxels of the other grid -> the same in voxels of the image."""
        z, y, x = self.move_back(np.asarray([point]))[0].tolist()
        return z, y, x

    def move_root(self, root: Point) -> Point:
        """A root on the other grid; one at the border of the image may lie before or behind the grid's centers."""
        place = self.move_to_new(np.asarray([root]))[0]
        z, y, x = np.clip(place, 0, np.asarray(self.new_shape) - 1).tolist()
        return z, y, x

    def move_tree_to_new(self, tree: Tree) -> Tree:
        """A tree in voxels of the image, radii in its fine voxels -> the same on the other grid."""
        return replace(tree, points=self.move_to_new(tree.points), radii=tree.radii / self.radius_scale)

    def move_tree_back(self, tree: Tree) -> Tree:
        """A tree in voxels of the other grid, radii in its fine voxels -> the same in voxels of the image."""
        return replace(tree, points=self.move_back(tree.points), radii=tree.radii * self.radius_scale)

    @property
    def radius_scale(self) -> float:
        """Fine voxels of the image in one of the other grid."""
        return fine_voxel(self.new_voxel_size) / fine_voxel(self.voxel_size)


def _resample(read: ReadBox, shape: Shape, box: Box, factor: Point) -> Floats:
    """[Z, Y, X] float32 a box of the new grid, of an image of `shape` that is read by box."""
    source = _find_source(shape, box, factor)
    if source.size > _MOST_VOXELS and box.size > 1:
        # Halves along the longest axis of what is read keep the memory bounded.
        axis = int(np.argmax([n if m > 1 else 0 for n, m in zip(source.shape, box.shape, strict=True)]))
        parts = [_resample(read, shape, half, factor) for half in _halve(box, axis)]
        return np.concatenate(parts, axis=axis)

    values = np.asarray(read(source), dtype=np.float32)
    # The axes that shrink come first, when they spare the others most.
    for axis in sorted(range(3), key=lambda a: -factor[a]):
        if factor[axis] != 1:
            span = box.start[axis], box.stop[axis]
            values = _resample_axis(values, axis, source.start[axis], span, shape[axis], factor[axis])
    return np.ascontiguousarray(values)


def _halve(box: Box, axis: int) -> tuple[Box, Box]:
    middle = list(box.start)
    middle[axis] = (box.start[axis] + box.stop[axis]) // 2
    end = list(box.stop)
    end[axis] = middle[axis]
    return Box(box.start, (end[0], end[1], end[2])), Box((middle[0], middle[1], middle[2]), box.stop)


def _find_source(shape: Shape, box: Box, factor: Point) -> Box:
    """The voxels of the old grid that a box of the new one depends on."""
    starts, stops = [], []
    for axis in range(3):
        first, last = _find_taps(np.array([box.start[axis], box.stop[axis] - 1]), shape[axis], factor[axis])
        starts.append(int(first[0]))
        stops.append(int(last[1]) + 1)
    return Box((starts[0], starts[1], starts[2]), (stops[0], stops[1], stops[2]))


def _find_taps(numbers: NDArray[np.int64], size: int, factor: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[n] the first and the last old voxels along one axis of which new voxels are made."""
    if factor == 1:
        return numbers, numbers
    taps, _ = _weigh_taps(numbers, size, factor)
    return taps.min(axis=1), taps.max(axis=1)


def _resample_axis(values: Floats, axis: int, start: int, span: tuple[int, int], size: int, factor: float) -> Floats:
    """Resample one axis of [Z, Y, X], whose first voxel is number `start` of `size`; `span`: of new voxels."""
    taps, weights = _weigh_taps(np.arange(*span), size, factor)
    form = [-1 if a == axis else 1 for a in range(3)]
    total = np.take(values, taps[:, 0] - start, axis) * weights[:, 0].reshape(form)
    for number in range(1, taps.shape[1]):
        total += np.take(values, taps[:, number] - start, axis) * weights[:, number].reshape(form)
    return total


def _weigh_taps(new: NDArray[np.int64], size: int, factor: float) -> tuple[NDArray[np.int64], Floats]:
    """[n, K] the old voxels of which each new voxel of one axis is made, and their weights, which add up to 1."""
    numbers = new.astype(np.float64)
    if factor < 1:
        # Beyond the first and the last center the value stays.
        places = np.clip((numbers + 0.5) * factor - 0.5, 0, size - 1)
        low = np.floor(places).astype(np.int64)
        weights = np.stack([1 - (places - low), places - low], axis=1).astype(np.float32)
        return np.stack([low, np.minimum(low + 1, size - 1)], axis=1), weights

    start, stop = numbers * factor, np.minimum((numbers + 1) * factor, size)
    taps = np.floor(start).astype(np.int64)[:, None] + np.arange(math.ceil(factor) + 1)
    shares = np.clip(np.minimum(stop[:, None], taps + 1) - np.maximum(start[:, None], taps), 0, None)
    # A factor that is a whole number but for its rounding leaves slivers of the next voxel.
    shares[shares < 1e-9] = 0
    weights = (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)
    return np.clip(taps, 0, size - 1), weights
