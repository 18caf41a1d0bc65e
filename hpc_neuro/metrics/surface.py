"""Surfaces of masks and the exact distances between them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from hpc_neuro.core.geometry import Box, Shape, VoxelSize, tile_volume

Mask = NDArray[np.bool_]
Points = NDArray[np.int32]
Distances = NDArray[np.float64]

_REACH = 12  # voxels along y and x that the search close by looks at
_MARGIN = (1, _REACH, _REACH)  # background around the masks, so that no neighbour asked for lies outside
_SPARSE = 0.05  # below this share of foreground, surface voxels are found one by one
_RINGS_PER_CHECK = 3  # rings of columns between two looks at which points are settled
_FEW, _WORTH = 0.01, 0.1  # of more than a few points left, fewer than this share has anything in reach: give up
_FAR = 254  # a column's distance along z is held in one byte; this value means "as far, farther, or nothing"
_EVERY = 16  # every so many points are measured first when only a percentile is wanted
_ROUNDING = 1e-9  # relative margin that keeps a tie from being cut by rounding


def surface(mask: Mask) -> Mask:
    """Voxels of `mask` [Z, Y, X] with one of their six neighbours outside it; beyond the array is outside.

    The same voxels as `mask & ~binary_erosion(mask)` with a cross, as MONAI and medpy take them.
    """
    inner = np.array(mask, order="C")
    flat, source = inner.ravel(), np.ascontiguousarray(mask).ravel()
    for step in (mask.shape[1] * mask.shape[2], mask.shape[2], 1):  # wraps round at the faces, which go anyway
        flat[step:] &= source[:-step]
        flat[:-step] &= source[step:]
    for axis in range(3):
        np.moveaxis(inner, axis, 0)[[0, -1]] = False
    return np.logical_xor(mask, inner, out=inner)


def extent(mask: Mask) -> Box:
    """The smallest box that holds the True voxels; of zero size when there are none."""
    depth, flat = mask.max(axis=0), mask.reshape(len(mask), -1).max(axis=1)
    hits = [np.flatnonzero(flat), np.flatnonzero(depth.max(axis=1)), np.flatnonzero(depth.max(axis=0))]
    if not len(hits[0]):
        return Box((0, 0, 0), (0, 0, 0))
    z, y, x = ((int(h[0]), int(h[-1]) + 1) for h in hits)
    return Box((z[0], y[0], x[0]), (z[1], y[1], x[1]))


class SurfacePair:
    """The surfaces of two masks [Z, Y, X] in their common extent, for exact distances in um at any voxel size.

    Raises ValueError when a mask is empty. Most surface voxels of a useful segmentation have the other surface close
    by: those are found by looking around them, and only the rest is asked of a KD-tree. No distance map is made.
    """

    def __init__(self, a: Mask, b: Mask, voxel_size: VoxelSize) -> None:
        box_a, box_b = extent(a), extent(b)
        if not box_a.size or not box_b.size:
            raise ValueError("an empty mask has no surface; the caller's rule for empty masks comes first")
        box = tuple(
            slice(min(p.start, q.start), max(p.stop, q.stop)) for p, q in zip(box_a.slices, box_b.slices, strict=True)
        )
        self._surfaces = [_Surface(m[box], voxel_size) for m in (a, b)]

    def distances(self) -> tuple[Distances, Distances]:
        """From each surface voxel of `a` to the nearest of `b`, and the other way."""
        a, b = self._surfaces
        return _directed(a, b), _directed(b, a)

    def percentiles(self, percent: float) -> tuple[float, float]:
        """The percentile (linear interpolation) of each of the two, without measuring most voxels exactly."""
        a, b = self._surfaces
        return _percentile(a, b, percent), _percentile(b, a, percent)


def point_distances(a: Points, b: Points, voxel_size: VoxelSize) -> tuple[Distances, Distances]:
    """The distances of surfaces given as voxel indices [N, 3], as `surface_points` gives them."""
    if not len(a) or not len(b):
        raise ValueError("an empty mask has no surface; the caller's rule for empty masks comes first")
    return _nearest(a, b, voxel_size), _nearest(b, a, voxel_size)


def surface_points(read: Callable[[Box], Mask], shape: Shape, block: Shape = (256, 256, 256)) -> Points:
    """Indices [N, 3] of the surface voxels of a mask that is read block by block with one voxel of context."""
    found = [np.zeros((0, 3), dtype=np.int32)]
    for tile in tile_volume(shape, block, halo=(1, 1, 1)):
        mask = read(tile.read)
        if mask.any():
            own = tile.write.relative_to(tile.read.start).slices
            at = np.argwhere(surface(mask)[own]) + np.asarray(tile.write.start)
            found.append(at.astype(np.int32))
    return np.concatenate(found)


class _Surface:
    """The surface voxels of one mask, by flat index in an array with a margin of background."""

    def __init__(self, mask: Mask, voxel_size: VoxelSize) -> None:
        inside = np.pad(mask, [(m, m) for m in _MARGIN])
        self.shape = inside.shape
        self.voxel_size = voxel_size
        flat = inside.ravel()
        if np.count_nonzero(flat) > _SPARSE * flat.size:
            self.at = np.flatnonzero(surface(inside))
        else:
            self.at = np.flatnonzero(flat)
            inner = np.ones(len(self.at), dtype=bool)
            for step in (self.shape[1] * self.shape[2], self.shape[2], 1):
                inner &= flat.take(self.at - step) & flat.take(self.at + step)
            self.at = self.at[~inner]

    def points(self, at: NDArray[np.int64]) -> NDArray[np.int64]:
        """[N, 3] voxel indices of flat indices."""
        return np.stack(np.unravel_index(at, self.shape), axis=1)

    @functools.cached_property
    def column(self) -> NDArray[np.uint8]:
        """Voxels along z from any voxel to the nearest surface voxel of the same column, at most _FAR; flat uint8."""
        grown = np.full(self.shape, _FAR, dtype=np.uint8)
        grown.ravel()[self.at] = 0
        step = np.empty_like(grown[0])
        for order in (range(1, len(grown)), range(len(grown) - 2, -1, -1)):
            for z in order:
                np.add(grown[z - order.step], 1, out=step)  # at most _FAR + 1, which a byte still holds
                np.minimum(grown[z], step, out=grown[z])
        return grown.ravel()

    def nearest(self, points: NDArray[np.int64]) -> Distances:
        """Distance in um from each of `points` [N, 3] to this surface, by KD-tree."""
        return _nearest(points, self.points(self.at), self.voxel_size)


def _directed(one: _Surface, other: _Surface) -> Distances:
    """Distance in um from each surface voxel of `one` to the nearest of `other`."""
    found, far, _ = _close(one.at, other)
    found[far] = other.nearest(one.points(one.at[far]))
    return found


def _percentile(one: _Surface, other: _Surface, percent: float) -> float:
    """The percentile of `_directed`, exactly.

    A sample tells between which two distances the percentile lies. A voxel with any voxel of the other surface nearer
    than the lower one counts as below, wherever its nearest is; one known to be beyond the upper one counts as above.
    A far voxel may learn so from its neighbour in the sample: a distance changes by no more than the way between them.
    """
    n, share = len(one.at), percent / 100
    spread = 4 * np.sqrt(share * (1 - share) * _EVERY / n)  # four standard errors of the rank
    bounds = [max(share - spread, 0.0), min(share + spread, 1.0)]
    chosen = one.at[::_EVERY]
    sample, far, reached = _close(chosen, other)
    sample[far] = np.inf
    if np.quantile(sample, bounds[1], method="higher") > reached:
        sample[far] = other.nearest(one.points(chosen[far]))
    low = float(np.quantile(sample, bounds[0], method="lower")) * (1 - _ROUNDING)
    high = float(np.quantile(sample, bounds[1], method="higher")) * (1 + _ROUNDING)

    found, far, reached = _close(one.at, other, enough=low)
    found[far] = np.inf
    if high > reached:
        known = sample[far // _EVERY]
        step = (one.points(one.at[far]) - one.points(chosen[far // _EVERY])) * np.asarray(one.voxel_size)
        way = np.linalg.norm(step, axis=1)
        found[far[known + way < low]] = 0.0
        unsure = far[(known + way >= low) & (known - way <= high)]
        found[unsure] = other.nearest(one.points(one.at[unsure]))

    rank = share * (n - 1)
    first, last = int(np.floor(rank)), int(np.ceil(rank))
    found.partition((first, last))
    if found[first] < low or found[last] > high:  # the sample misled; outside of these two, values are only bounds
        return float(np.percentile(_directed(one, other), percent))
    return float(found[first] + (found[last] - found[first]) * (rank - first))


def _close(at: NDArray[np.int64], other: _Surface, enough: float = 0.0) -> tuple[Distances, NDArray[np.int64], float]:
    """Distances in um [N] of the voxels at flat indices `at`, where they are small; the indices (into `at`) of those
    for which the search was given up; and the distance in um that all of these exceed.

        z
        |   o     A column distance is how far the nearest surface voxel is up or down its column. A voxel looks at the
        |   :     columns around it, nearest first, and stops when the next one is farther away than the best voxel
        p-->+     found. A result below `enough` is only an upper bound: the search stops there too.
    """
    sz, sy, sx = (float(s) for s in other.voxel_size)
    width = other.shape[2]
    rise = (np.arange(_FAR + 1) * sz) ** 2  # um^2 of a column distance
    rise[_FAR] = np.inf
    beyond = (_FAR * sz) ** 2  # a voxel that a column distance cannot hold is at least this far

    result = np.empty(len(at))
    pending = np.arange(len(at))
    best = np.full(len(at), np.inf)  # um^2, of the pending voxels, as `at`
    rings = _rings(sy, sx)
    limit = 0.0
    lowest = -_REACH * (width + 1)  # a shifted view takes no sum of indices; the margin is this wide
    at = at + lowest
    for number, (lateral, offsets) in enumerate(rings):
        steps = (offsets @ (width, 1) - lowest).tolist()
        nearest = other.column[steps[0] :].take(at)
        for step in steps[1:]:
            np.minimum(nearest, other.column[step:].take(at), out=nearest)
        np.minimum(best, (rise + lateral).take(nearest), out=best)
        if number % _RINGS_PER_CHECK and number < len(rings) - 1:
            continue
        limit = min(rings[number + 1][0] if number + 1 < len(rings) else lateral, beyond)
        unsettled = (best > limit) & (best >= enough * enough)
        result[pending[~unsettled]] = np.sqrt(best[~unsettled])
        left = np.count_nonzero(unsettled)
        pending, best, at = pending[unsettled], best[unsettled], at[unsettled]
        hopeless = left > _FEW * len(result) and np.count_nonzero(best <= rings[-1][0]) < _WORTH * left
        if hopeless or not left:
            break
    return result, pending, float(np.sqrt(limit))


def _rings(sy: float, sx: float) -> list[tuple[float, NDArray[np.int64]]]:
    """Columns within reach by distance: (squared distance in um^2, [n, 2] offsets dy, dx), nearest ring first."""
    steps = np.arange(-_REACH, _REACH + 1)
    dy, dx = (g.ravel() for g in np.meshgrid(steps, steps, indexing="ij"))
    square = (dy * sy) ** 2 + (dx * sx) ** 2
    inside = square <= (_REACH * min(sy, sx)) ** 2  # farther out, columns beyond the reach would be nearer
    values, ring = np.unique(square[inside], return_inverse=True)
    offsets = np.stack([dy, dx], axis=1)[inside]
    return [(float(value), offsets[ring == i]) for i, value in enumerate(values)]


def _nearest(points: NDArray[np.integer], others: NDArray[np.integer], voxel_size: VoxelSize) -> Distances:
    """Distance in um from each point to the nearest of `others`, by KD-tree on all cores this process may use."""
    if not len(points):
        return np.zeros(0)
    scale = np.asarray(voxel_size)
    tree = cKDTree(others * scale, balanced_tree=False, compact_nodes=False)
    found, _ = tree.query(points * scale, workers=len(os.sched_getaffinity(0)))
    return np.asarray(found, dtype=np.float64)
