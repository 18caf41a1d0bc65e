"""How wide neurites are in an image, in voxels: their brightness across the cable, at half of its height.

The width is measured in the plane of the slices and along z, apart from each other, so that no voxel size is needed.
In the plane the ruler lies across the cable. Along z it lies where the cable does not run along z.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Box, Shape, VoxelSize, tile_volume
from hpc_neuro.core.morphology import Tree
from hpc_neuro.data.intensity import ReadBox

Floats = NDArray[np.float64]
WidthQuartiles = tuple[tuple[float | None, float], tuple[float | None, float], tuple[float | None, float]]
"""[voxel] Lower quartile, median and upper quartile of widths, each along z (None: unknown) and in the plane."""

_PLACES = 1000
"""Places at which the width is measured, at most."""
_LEAST_CABLE = 20.0
"""[voxel] Cable that is measured, at least; with less the width stays unknown."""
_LEAST_SHARE = 0.5
"""Share of the places at which the width can be measured, at least."""
_STRETCH = 4
"""[voxel] Along so much cable the brightness is averaged, against noise."""
_MOST_STEPS = 16
"""[node] Such a stretch of a tree with dense nodes, at most."""
_REACH = 24.0
"""[voxel] Half of the ruler's length."""
_STEP = 0.25
"""[voxel] Between samples along the ruler."""
_OFF_CENTER = 2.0
"""[voxel] The ridge may lie so far off the cable."""
_BACKGROUND = 0.2
"""Quantile of the brightness along the ruler that is the background."""
_MOST_SLOPE = 0.5
"""Component along z of the direction of cable whose width along z is measured, at most."""
_LEVELS = 101
"""Quantiles that stand for the widths of a volume."""
_SQUARE = 1.5
"""A voxel has one side in the plane if the two differ by less than this factor."""
_READ_BLOCK: Shape = (64, 256, 256)
"""[voxel] Places are measured block by block of this size."""


@dataclass(frozen=True)
class NeuriteWidths:
    """Widths at places along the cable of an image, in voxels. Either list may be empty: unknown."""

    depth: Floats
    """[N] along z."""
    plane: Floats
    """[M] in the plane."""

    @property
    def median(self) -> tuple[float | None, float | None]:
        """[voxel] The median along z and in the plane; None where it is unknown."""
        depth, plane = (float(np.median(widths)) if len(widths) else None for widths in (self.depth, self.plane))
        return depth, plane


def has_square_voxels(size: VoxelSize) -> bool:
    """Whether voxels (um, z y x) are about square in the plane, so that one width in the plane describes neurites."""
    return max(size[1:]) < _SQUARE * min(size[1:])


def summarize_widths(volumes: Sequence[NeuriteWidths]) -> WidthQuartiles | None:
    """[voxel] The lower quartile, the median and the upper quartile of the widths in several volumes, each along z and
    in the plane. All volumes weigh the same. None along z where no volume has such a width; None where none has any."""
    quartiles = []
    for lists in ([v.depth for v in volumes], [v.plane for v in volumes]):
        levels = [np.quantile(widths, np.linspace(0, 1, _LEVELS)) for widths in lists if len(widths)]
        rows = np.quantile(np.concatenate(levels), (0.25, 0.5, 0.75)).round(3).tolist() if levels else None
        quartiles.append(rows)

    depth, plane = quartiles
    if plane is None:
        return None
    low, middle, high = zip(depth or (None, None, None), plane, strict=True)
    return low, middle, high


def list_widths(quartiles: WidthQuartiles | None) -> list[list[float | None]] | None:
    """Widths as lists, for files."""
    return None if quartiles is None else [list(row) for row in quartiles]


def measure_widths(tree: Tree, read: ReadBox, shape: Shape) -> NeuriteWidths:
    """Measure along a tree (voxels) in an image that is bright on dark and is read by box.

    Widths along z of an image of one slice are unknown.
    """
    places, directions = _choose_places(tree)
    if not len(places):
        return NeuriteWidths(np.zeros(0), np.zeros(0))

    # In the plane, the ruler lies across the direction; cable along z is measured along x.
    across = np.stack([np.zeros(len(directions)), -directions[:, 2], directions[:, 1]], axis=1)
    length = np.linalg.norm(across, axis=1, keepdims=True)
    across = np.where(length > 1e-3, across / np.maximum(length, 1e-9), [[0.0, 0.0, 1.0]])
    plane = _measure(places, across, read, shape)

    is_level = np.abs(directions[:, 0]) < _MOST_SLOPE
    level = places[is_level] if shape[0] > 1 else places[:0]
    depth = _measure(level, np.tile([[1.0, 0.0, 0.0]], (len(level), 1)), read, shape)
    return NeuriteWidths(depth, plane)


def _choose_places(tree: Tree) -> tuple[Floats, Floats]:
    """[N, S, 3] stretches of cable, evenly spread over a tree, and [N, 3] their directions."""
    cable = morphology.resample_tree(tree, 1.0)
    length = morphology.length(cable)
    if length < _LEAST_CABLE:
        return np.zeros((0, 1, 3)), np.zeros((0, 3))

    # Nodes of the tree itself may lie closer than one voxel.
    steps = round(min(_STRETCH * len(cable) / length, _MOST_STEPS))
    stretch = [np.arange(len(cable))]
    for _ in range(steps):
        stretch.append(np.where(stretch[-1] >= 0, cable.parents[stretch[-1]], -1))

    nodes = np.stack(stretch, axis=1)
    nodes = nodes[(nodes >= 0).all(axis=1)]
    nodes = nodes[np.linspace(0, len(nodes) - 1, min(len(nodes), _PLACES)).astype(np.int64)]
    places = cable.points[nodes]
    directions = places[:, 0] - places[:, -1]
    norm = np.linalg.norm(directions, axis=1)

    # Nodes at one place have no direction.
    has_direction = norm > 1e-6
    return places[has_direction], directions[has_direction] / norm[has_direction, None]


def _measure(places: Floats, rulers: Floats, read: ReadBox, shape: Shape) -> Floats:
    """[M] widths along the rulers [N, 3] at the places [N, S, 3] where they can be measured; [0] where too few can."""
    offsets = np.arange(-_REACH, _REACH + _STEP / 2, _STEP)
    widths = np.full(len(places), np.nan)
    middles = np.clip(np.rint(places.mean(axis=1)), 0, np.asarray(shape) - 1)
    for block in tile_volume(shape, _READ_BLOCK):
        rows = np.flatnonzero(np.all((middles >= block.write.start) & (middles < block.write.stop), axis=1))
        if len(rows):
            samples = places[rows, :, None] + offsets[:, None] * rulers[rows, None, None]
            widths[rows] = _measure_half_width(_sample(samples, read, shape))

    is_measured = np.isfinite(widths)
    is_enough = np.count_nonzero(is_measured) >= _LEAST_SHARE * len(places)
    return widths[is_measured] if is_enough else np.zeros(0)


def _sample(points: Floats, read: ReadBox, shape: Shape) -> Floats:
    """[N, K] brightness along each ruler, the mean over its stretch, from points [N, S, K, 3]; NaN outside."""
    last = np.asarray(shape) - 1
    inside = np.clip(points, 0, last)
    low = np.floor(inside.min(axis=(0, 1, 2))).astype(int)
    high = np.ceil(inside.max(axis=(0, 1, 2))).astype(int) + 1
    image = read(Box((low[0], low[1], low[2]), (high[0], high[1], high[2]))).astype(np.float32)
    values = map_coordinates(image, np.moveaxis(inside - low, -1, 0), order=1, mode="nearest")

    # Half a voxel beyond its last center the image ends.
    is_outside = np.any((points < -0.5) | (points > last + 0.5), axis=-1)
    return np.asarray(np.where(is_outside, np.nan, values).mean(axis=1), dtype=np.float64)


def _measure_half_width(profiles: Floats) -> Floats:
    """[N] width of each profile [N, K] at half of its height; NaN where it does not fall to that on both sides."""
    count = profiles.shape[1]
    middle, reach = count // 2, round(_OFF_CENTER / _STEP)
    near = np.nan_to_num(profiles[:, middle - reach : middle + reach + 1], nan=-np.inf)
    peak = near.argmax(axis=1) + middle - reach
    height = near.max(axis=1)
    filled = np.where(np.isnan(profiles).all(axis=1, keepdims=True), 0.0, profiles)
    level = (height + np.nanquantile(filled, _BACKGROUND, axis=1)) / 2

    # The nearest samples on both sides that are below the level; NaN is not.
    numbers = np.arange(count)
    is_below = profiles < level[:, None]
    right = np.where(is_below & (numbers > peak[:, None]), numbers, count).min(axis=1)
    left = np.where(is_below & (numbers < peak[:, None]), numbers, -1).max(axis=1)

    rows = np.flatnonzero(np.isfinite(height) & (height > level) & (right < count) & (left >= 0))
    after, before = right[rows], left[rows]
    end = after - _find_share(profiles[rows, after], profiles[rows, after - 1], level[rows])
    start = before + _find_share(profiles[rows, before], profiles[rows, before + 1], level[rows])
    widths = np.full(len(profiles), np.nan)
    widths[rows] = (end - start) * _STEP
    return widths


def _find_share(below: Floats, above: Floats, level: Floats) -> Floats:
    """[N] how far the level lies between a sample below it and the next one above it, in [0, 1]."""
    share: Floats = (level - below) / np.maximum(above - below, 1e-12)
    return np.clip(share, 0, 1)
