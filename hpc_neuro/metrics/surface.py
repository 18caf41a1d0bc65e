"""Surfaces of masks and the exact distances between them.

Most surface voxels of a useful segmentation lie close to the other surface. A search through the neighboring columns
finds their distances, and only the rest goes to a KD-tree. No distance map is made.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from hpc_neuro.core.geometry import Box, Shape, VoxelSize, tile_volume

Mask = NDArray[np.bool_]
Points = NDArray[np.int32]
Distances = NDArray[np.float64]

_REACH = 12
"""[voxel] How far along y and x the nearby search looks."""
_MARGIN = (1, _REACH, _REACH)
"""[voxel] Background around the masks, so that every neighbor of a surface voxel is inside the array."""
_SPARSE = 0.05
"""Share of foreground below which surface voxels are tested one by one."""
_RINGS_PER_CHECK = 3
"""Rings of columns between two checks of which voxels are settled."""
_FEW, _WORTHWHILE = 0.01, 0.1
"""The nearby search stops when more than the first share of all voxels is left and less than the second share of those
has a surface in reach."""
_FAR = 254
"""[voxel] Largest column distance that one byte holds; it stands for "this far, farther, or no surface"."""
_SAMPLE_STEP = 16
"""Every n-th surface voxel is measured first when only a percentile is wanted."""
_ROUNDING = 1e-9
"""Relative margin around a bound, so that rounding does not separate equal distances."""


def find_surface(mask: Mask) -> Mask:
    """Voxels of `mask` [Z, Y, X] with one of their six neighbors outside it; beyond the array is outside.

    The same voxels as `mask & ~binary_erosion(mask)` with a cross, as in MONAI and medpy.
    """
    inner = np.array(mask, order="C")
    flat, source = inner.ravel(), np.ascontiguousarray(mask).ravel()

    # A shift of the flat array wraps around at the faces of the volume, which are cleared afterwards anyway.
    for step in (mask.shape[1] * mask.shape[2], mask.shape[2], 1):
        flat[step:] &= source[:-step]
        flat[:-step] &= source[step:]

    for axis in range(3):
        np.moveaxis(inner, axis, 0)[[0, -1]] = False

    return np.logical_xor(mask, inner, out=inner)


def find_extent(mask: Mask) -> Box:
    """The smallest box that holds the True voxels; of zero size when there are none."""
    # Two reductions serve all three axes: the second axis and the third come from the projection along the first.
    depth, flat = mask.max(axis=0), mask.reshape(len(mask), -1).max(axis=1)
    hits = [np.flatnonzero(flat), np.flatnonzero(depth.max(axis=1)), np.flatnonzero(depth.max(axis=0))]
    if not len(hits[0]):
        return Box((0, 0, 0), (0, 0, 0))

    z, y, x = ((int(h[0]), int(h[-1]) + 1) for h in hits)

    return Box((z[0], y[0], x[0]), (z[1], y[1], x[1]))


def find_surface_points(read: Callable[[Box], Mask], shape: Shape, block: Shape = (256, 256, 256)) -> Points:
    """Indices [N, 3] of the surface voxels of a mask that is read block by block with one voxel of context."""
    # Begin with an empty array, which is the result where the mask is empty.
    points = [np.zeros((0, 3), dtype=np.int32)]
    for tile in tile_volume(shape, block, halo=(1, 1, 1)):
        mask = read(tile.read)
        if mask.any():
            own = tile.write.relative_to(tile.read.start).slices
            indices = np.argwhere(find_surface(mask)[own]) + np.asarray(tile.write.start)
            points.append(indices.astype(np.int32))

    return np.concatenate(points)


class SurfacePair:
    """The surfaces of two masks [Z, Y, X] in their common extent, for exact distances in um at any voxel size.

    Raises ValueError when a mask is empty.
    """

    def __init__(self, a: Mask, b: Mask, voxel_size: VoxelSize) -> None:
        # What distance an empty mask has is a rule of the metric and not geometry.
        box_a, box_b = find_extent(a), find_extent(b)
        if not box_a.size or not box_b.size:
            raise ValueError("an empty mask has no surface; apply the rule for empty masks before measuring")

        # Distances do not depend on what lies around the two masks.
        common = tuple(
            slice(min(p.start, q.start), max(p.stop, q.stop)) for p, q in zip(box_a.slices, box_b.slices, strict=True)
        )
        self._a = _Surface(a[common], voxel_size)
        self._b = _Surface(b[common], voxel_size)

    def measure_distances(self) -> tuple[Distances, Distances]:
        """From each surface voxel of `a` to the nearest of `b`, and from each of `b` to the nearest of `a`."""
        return _measure_directed(self._a, self._b), _measure_directed(self._b, self._a)

    def measure_percentiles(self, percent: float) -> tuple[float, float]:
        """The percentile (linear interpolation) of each of the two, without measuring most voxels exactly."""
        return _measure_percentile(self._a, self._b, percent), _measure_percentile(self._b, self._a, percent)


def measure_point_distances(a: Points, b: Points, voxel_size: VoxelSize) -> tuple[Distances, Distances]:
    """The distances in um between surfaces given as voxel indices [N, 3], as `find_surface_points` returns them."""
    if not len(a) or not len(b):
        raise ValueError("an empty mask has no surface; apply the rule for empty masks before measuring")
    return _query_nearest(a, b, voxel_size), _query_nearest(b, a, voxel_size)


class _Surface:
    """The surface voxels of one mask, by flat index in an array with a margin of background."""

    def __init__(self, mask: Mask, voxel_size: VoxelSize) -> None:
        padded = np.pad(mask, [(m, m) for m in _MARGIN])
        self.shape = padded.shape
        self.voxel_size = voxel_size
        self.indices = self._find_indices(padded)

    def _find_indices(self, padded: Mask) -> NDArray[np.int64]:
        """Flat indices of the surface voxels: by shifting a dense mask, by testing the voxels of a sparse one."""
        flat = padded.ravel()
        if np.count_nonzero(flat) > _SPARSE * flat.size:
            return np.flatnonzero(find_surface(padded))

        # The margin makes all six neighbors exist, so no index runs into the next row.
        foreground = np.flatnonzero(flat)
        inner = np.ones(len(foreground), dtype=bool)
        for step in (self.shape[1] * self.shape[2], self.shape[2], 1):
            inner &= flat.take(foreground - step) & flat.take(foreground + step)

        return foreground[~inner]

    def to_points(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """[N, 3] voxel indices of flat indices."""
        return np.stack(np.unravel_index(indices, self.shape), axis=1)

    @functools.cached_property
    def column_distances(self) -> NDArray[np.uint8]:
        """[voxel] From every voxel to the nearest surface voxel up or down its column, at most _FAR; flat uint8."""
        distances = np.full(self.shape, _FAR, dtype=np.uint8)
        distances.ravel()[self.indices] = 0

        # One pass down and one pass up the columns; _FAR + 1 still fits a byte.
        step = np.empty_like(distances[0])
        for order in (range(1, len(distances)), range(len(distances) - 2, -1, -1)):
            for z in order:
                np.add(distances[z - order.step], 1, out=step)
                np.minimum(distances[z], step, out=distances[z])

        return distances.ravel()

    def query(self, points: NDArray[np.int64]) -> Distances:
        """Distance in um from each of `points` [N, 3] to this surface, by KD-tree."""
        return _query_nearest(points, self.to_points(self.indices), self.voxel_size)


def _measure_directed(source: _Surface, target: _Surface) -> Distances:
    """Distance in um from each surface voxel of `source` to the nearest of `target`."""
    nearby = _search_nearby(source.indices, target)
    distances = nearby.distances

    # What the nearby search leaves open goes to the KD-tree.
    distances[nearby.unsettled] = target.query(source.to_points(source.indices[nearby.unsettled]))

    return distances


def _measure_percentile(source: _Surface, target: _Surface, percent: float) -> float:
    """The percentile of `_measure_directed`, exactly, without measuring the distances far from it.

    A sample tells between which two distances the percentile lies. Distances between these bounds are exact; all others
    are only known to be below or above, which is enough to find the value at a rank.
    """
    share = percent / 100
    bounds = _estimate_bounds(source, target, share)
    distances = _measure_within_bounds(source, target, bounds)

    # The percentile interpolates between the values at the two ranks around it.
    rank = share * (len(distances) - 1)
    first, last = int(np.floor(rank)), int(np.ceil(rank))
    distances.partition((first, last))

    # Outside the bounds the values are not distances, so a misleading sample costs the full measurement.
    if distances[first] < bounds.low or distances[last] > bounds.high:
        return float(np.percentile(_measure_directed(source, target), percent))

    return float(distances[first] + (distances[last] - distances[first]) * (rank - first))


@dataclass(frozen=True)
class _Bounds:
    """Two distances between which a percentile lies, and the sample of surface voxels that told so."""

    low: float  # um
    high: float  # um
    indices: NDArray[np.int64]  # [S] flat indices of the sampled voxels
    at_least: Distances  # [S] um; lower and upper bound of their distances, equal where they are measured
    at_most: Distances


def _estimate_bounds(source: _Surface, target: _Surface, share: float) -> _Bounds:
    """Measure a sample of surface voxels, and bound the quantile `share` of all by four standard errors of its rank."""
    margin = 4 * np.sqrt(share * (1 - share) * _SAMPLE_STEP / len(source.indices))
    low_share, high_share = max(share - margin, 0.0), min(share + margin, 1.0)

    # Flat indices are in raster order, so every n-th one spreads the sample over the whole surface.
    indices = source.indices[::_SAMPLE_STEP]
    nearby = _search_nearby(indices, target)
    at_most = nearby.distances
    at_most[nearby.unsettled] = np.inf

    # The upper bound needs exact distances only when it lies beyond what the nearby search settles.
    if np.quantile(at_most, high_share, method="higher") > nearby.reach:
        at_most[nearby.unsettled] = target.query(source.to_points(indices[nearby.unsettled]))

    # An unsettled voxel of the sample is only known to be beyond the reach.
    low = float(np.quantile(at_most, low_share, method="lower")) * (1 - _ROUNDING)
    high = float(np.quantile(at_most, high_share, method="higher")) * (1 + _ROUNDING)
    at_least = np.where(np.isfinite(at_most), at_most, nearby.reach)

    return _Bounds(low, high, indices, at_least, at_most)


def _measure_within_bounds(source: _Surface, target: _Surface, bounds: _Bounds) -> Distances:
    """Distances in um that are exact between the bounds; smaller than `low` below them and larger than `high` above."""
    # A voxel with any voxel of the target nearer than `low` is below, wherever its nearest voxel is.
    nearby = _search_nearby(source.indices, target, enough=bounds.low)
    distances, far = nearby.distances, nearby.unsettled
    distances[far] = np.inf
    if bounds.high <= nearby.reach:
        return distances

    # A distance changes by no more than the path between two voxels, so a sampled neighbor settles many far voxels.
    neighbor = far // _SAMPLE_STEP
    offset = source.to_points(source.indices[far]) - source.to_points(bounds.indices[neighbor])
    path = np.linalg.norm(offset * np.asarray(source.voxel_size), axis=1)
    at_least, at_most = bounds.at_least[neighbor] - path, bounds.at_most[neighbor] + path
    distances[far[at_most < bounds.low]] = 0.0

    # Only voxels that may lie between the bounds need their distance.
    undecided = far[(at_most >= bounds.low) & (at_least <= bounds.high)]
    distances[undecided] = target.query(source.to_points(source.indices[undecided]))

    return distances


@dataclass(frozen=True)
class _NearbySearch:
    """What a search through the neighboring columns settles."""

    distances: Distances  # [N] um, undefined where unsettled
    unsettled: NDArray[np.int64]  # indices into the searched voxels
    reach: float  # um; every unsettled voxel is farther away than this


def _search_nearby(indices: NDArray[np.int64], target: _Surface, enough: float = 0.0) -> _NearbySearch:
    """Distances in um from the voxels at flat `indices` [N] to `target`, where they are small.

    z
    |   o     A column distance is how far the nearest surface voxel is up or down its column. A voxel looks at the
    |   :     columns around it, nearest first, and stops when the next one is farther away than the best voxel so
    p-->+     far. A result below `enough` is only an upper bound: the search stops there too.
    """
    size_z, size_y, size_x = (float(s) for s in target.voxel_size)
    width = target.shape[2]
    rings = _list_rings(size_y, size_x)
    rise = (np.arange(_FAR + 1) * size_z) ** 2  # um^2 of a column distance
    rise[_FAR] = np.inf
    column_limit = (_FAR * size_z) ** 2  # um^2; a voxel that a column distance cannot hold is at least this far

    # Squared distances are compared until a voxel is settled; the root is taken once.
    distances = np.empty(len(indices))
    pending = np.arange(len(indices))
    best = np.full(len(indices), np.inf)  # um^2 of the pending voxels
    limit = 0.0

    # A shifted view of the column distances is cheaper than a sum of indices; the margin makes room for the shift.
    lowest = -_REACH * (width + 1)
    shifted = indices + lowest
    for number, (lateral, offsets) in enumerate(rings):
        nearest = _take_smallest(target.column_distances, shifted, (offsets @ (width, 1) - lowest).tolist())
        np.minimum(best, (rise + lateral).take(nearest), out=best)

        is_last = number == len(rings) - 1
        if number % _RINGS_PER_CHECK and not is_last:
            continue

        # A voxel is settled when the next ring, and any column that a byte cannot hold, is farther than its best.
        limit = min(lateral if is_last else rings[number + 1][0], column_limit)
        unsettled = (best > limit) & (best >= enough * enough)
        distances[pending[~unsettled]] = np.sqrt(best[~unsettled])
        pending, best, shifted = pending[unsettled], best[unsettled], shifted[unsettled]
        if not len(pending) or _is_hopeless(best, rings[-1][0], len(indices)):
            break

    return _NearbySearch(distances, pending, float(np.sqrt(limit)))


def _take_smallest(values: NDArray[np.uint8], indices: NDArray[np.int64], shifts: list[int]) -> NDArray[np.uint8]:
    """The smallest of `values` at `indices` + each shift."""
    # The first shift makes the array that the others are compared with in place.
    smallest = values[shifts[0] :].take(indices)
    for shift in shifts[1:]:
        np.minimum(smallest, values[shift:].take(indices), out=smallest)
    return smallest


def _is_hopeless(best: Distances, largest_ring: float, total: int) -> bool:
    """Whether many voxels are left and hardly any has the surface in reach, so that the KD-tree is faster."""
    return bool(len(best) > _FEW * total and np.count_nonzero(best <= largest_ring) < _WORTHWHILE * len(best))


def _list_rings(size_y: float, size_x: float) -> list[tuple[float, NDArray[np.int64]]]:
    """Columns within reach by distance: (squared distance in um^2, [n, 2] offsets dy, dx), nearest ring first."""
    steps = np.arange(-_REACH, _REACH + 1)
    dy, dx = (g.ravel() for g in np.meshgrid(steps, steps, indexing="ij"))
    square = (dy * size_y) ** 2 + (dx * size_x) ** 2

    # A column farther than the reach along the finer axis could have nearer ones that are not listed.
    inside = square <= (_REACH * min(size_y, size_x)) ** 2
    values, ring = np.unique(square[inside], return_inverse=True)
    offsets = np.stack([dy, dx], axis=1)[inside]

    return [(float(value), offsets[ring == i]) for i, value in enumerate(values)]


def _query_nearest(points: NDArray[np.integer], others: NDArray[np.integer], voxel_size: VoxelSize) -> Distances:
    """Distance in um from each point to the nearest of `others`, by KD-tree on all cores this process may use."""
    if not len(points):
        return np.zeros(0)

    # Millions of points are queried once: a tree that is quick to build beats one that is quick to query.
    scale = np.asarray(voxel_size)
    tree = cKDTree(others * scale, balanced_tree=False, compact_nodes=False)
    distances, _ = tree.query(points * scale, workers=len(os.sched_getaffinity(0)))

    return np.asarray(distances, dtype=np.float64)
