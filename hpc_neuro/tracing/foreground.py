"""Foreground voxels as a sparse graph, so that time and memory follow the neurites and not the volume around them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from hpc_neuro.geometry import Box, Shape, blocks
from hpc_neuro.schema import InputError

Read = Callable[[Box], NDArray[np.generic]]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_BLOCK: Shape = (64, 256, 256)  # 4 million voxels: what is dense at any time


@dataclass(frozen=True)
class Foreground:
    """N voxels in raster order and their 26-neighbourhood."""

    shape: Shape
    spacing: Floats  # [3] length of a voxel along z, y, x
    voxels: NDArray[np.int32]  # [N, 3]
    probability: NDArray[np.float32]  # [N] in (0, 1]
    distance: Floats  # [N] to the nearest background voxel; what lies outside the volume is not background
    pairs: NDArray[np.int32]  # [M, 2] neighbours, each pair once
    step: Floats  # [M] distance between the two of a pair
    component: NDArray[np.int32]  # [N]
    components: int

    @functools.cached_property
    def points(self) -> Floats:
        """[N, 3] positions in the metric's unit."""
        return self.voxels * self.spacing

    @functools.cached_property
    def near(self) -> cKDTree:
        """Search by position."""
        return cKDTree(self.points)

    def at(self, voxels: Floats) -> NDArray[np.float32]:
        """[M] probability at the voxels nearest to [M, 3] voxel positions; 0 where there is no foreground."""
        places = np.rint(voxels).astype(np.int64)
        places = np.clip(places, -1, np.array(self.shape))
        wanted = _keys(places, self.shape)
        index = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[index] == wanted, self.probability[index], np.float32(0))

    @functools.cached_property
    def keys(self) -> Ints:
        """[N] position of each voxel in raster order."""
        return _keys(self.voxels, self.shape)

    def graph(self, weight: Floats) -> csr_array:
        """[N, N] upper half of the symmetric graph with a weight per pair; give `directed=False` to csgraph."""
        n = len(self.voxels)
        return csr_array((weight, (self.pairs[:, 0], self.pairs[:, 1])), shape=(n, n))


def foreground(
    read: Read, shape: Shape, low: float, threshold: float, spacing: Floats, min_voxels: int
) -> Foreground | None:
    """Voxels of at least `low`, in pieces that reach `threshold` and hold `min_voxels`; None when there are none."""
    voxels, probability = _gather(read, shape, low)
    if not len(voxels):
        return None
    pairs, step = neighbours(voxels, shape, spacing)
    n = len(voxels)
    half = csr_array((np.ones(len(pairs), dtype=np.int8), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    count, label = connected_components(half, directed=False)
    strong = np.bincount(label[probability >= threshold], minlength=count) > 0
    good = strong & (np.bincount(label, minlength=count) >= min_voxels)
    keep = good[label]
    if not keep.any():
        return None
    index = (np.cumsum(keep) - 1).astype(np.int32)
    inside = keep[pairs[:, 0]]  # both ends of a pair are in one piece
    found = Foreground(
        shape,
        spacing,
        voxels[keep],
        probability[keep],
        np.zeros(0),
        index[pairs[inside]],
        step[inside],
        (np.cumsum(good) - 1)[label[keep]].astype(np.int32),
        int(good.sum()),
    )
    core = found.probability >= threshold
    distance = np.full(len(found.voxels), 0.5)
    distance[core] = _distance(found.voxels[core], shape, spacing)
    return replace(found, distance=distance)


def _gather(read: Read, shape: Shape, low: float) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Voxels of at least `low` in raster order, read block by block, and their probabilities."""
    voxels, values = [], []
    for block in blocks(shape, _BLOCK):
        array = read(block.write)
        probability = as_probability(array, block.write)
        where = np.nonzero(probability >= low)
        voxels.append((np.stack(where, axis=1) + block.write.start).astype(np.int32))
        values.append(probability[where])
    points, found = np.concatenate(voxels), np.concatenate(values)
    order = np.lexsort((points[:, 2], points[:, 1], points[:, 0]))
    return points[order], found[order]


def as_probability(array: NDArray[np.generic], box: Box) -> NDArray[np.float32]:
    """bool, uint8 (255 is 1) or floats in [0, 1] as float32; InputError for anything else, naming `box`."""
    if array.dtype == np.bool_:
        return array.astype(np.float32)
    if array.dtype == np.uint8:
        return array.astype(np.float32) / np.float32(255)
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"a probability is bool, uint8 or float, found {array.dtype}; convert it first")
    found = array.astype(np.float32)
    lowest, highest = (found.min(), found.max()) if found.size else (0, 0)
    if not (lowest >= 0 and highest <= 1):  # also catches NaN
        raise InputError(
            f"the probability at {box.start} to {box.stop} ranges from {lowest} to {highest}, wanted 0 to 1; "
            "apply the sigmoid, or normalise it"
        )
    return found


def _keys(voxels: NDArray[np.integer], shape: Shape) -> Ints:
    """One integer per voxel in raster order; a border of one voxel keeps neighbours from wrapping to the next line."""
    z, y, x = voxels.astype(np.int64).T
    keys: Ints = ((z + 1) * (shape[1] + 2) + (y + 1)) * (shape[2] + 2) + (x + 1)
    return keys


def neighbours(voxels: NDArray[np.int32], shape: Shape, spacing: Floats) -> tuple[NDArray[np.int32], Floats]:
    """All pairs of 26-neighbours, each once, with their distances.

    The three x neighbours of a line stand next to one another in the sorted keys, so one search finds all three.
    """
    keys = _keys(voxels, shape)
    row, plane = shape[2] + 2, (shape[1] + 2) * (shape[2] + 2)
    padded = np.concatenate([keys, np.full(3, -1)])
    firsts, seconds, steps = [], [], []

    def take(match: NDArray[np.bool_], at: Ints, offset: tuple[int, int, int]) -> None:
        first = np.flatnonzero(match)
        firsts.append(first.astype(np.int32))
        seconds.append(at[first].astype(np.int32))
        steps.append(np.full(len(first), np.linalg.norm(np.array(offset) * spacing)))

    here = np.arange(len(keys))
    take(padded[here + 1] == keys + 1, here + 1, (0, 0, 1))
    for dz, dy in ((0, 1), (1, -1), (1, 0), (1, 1)):
        wanted = keys + dz * plane + dy * row
        at = np.searchsorted(keys, wanted - 1)
        for dx in (-1, 0, 1):
            match = padded[at] == wanted + dx
            take(match, at, (dz, dy, dx))
            at = at + match
    return np.stack([np.concatenate(firsts), np.concatenate(seconds)], axis=1), np.concatenate(steps)


def _distance(voxels: NDArray[np.int32], shape: Shape, spacing: Floats) -> Floats:
    """[N] exact distance of each voxel to the nearest background voxel of the volume.

    That voxel is always a face neighbour of some foreground voxel, so a search among those is exact and sparse.
    """
    keys = _keys(voxels, shape)
    shell = []
    for axis in range(3):
        for side in (-1, 1):
            beside = voxels.copy()
            beside[:, axis] += side
            beside = beside[(beside[:, axis] >= 0) & (beside[:, axis] < shape[axis])]
            wanted = _keys(beside, shape)
            at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            shell.append(beside[keys[at] != wanted])
    outside = np.concatenate(shell)
    if not len(outside):
        return np.full(len(voxels), float(max(shape)))
    _, first = np.unique(_keys(outside, shape), return_index=True)
    return np.asarray(cKDTree(outside[first] * spacing).query(voxels * spacing)[0], dtype=np.float64)
