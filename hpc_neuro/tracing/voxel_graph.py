"""What is traced: the strands of all blocks as one sparse graph, and the probability around them, read on demand."""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.schema import InputError

Read = Callable[[Box], NDArray[np.generic]]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
_CELL: Shape = (32, 64, 64)  # [voxel] what is read at once where single voxels are asked for: a usual chunk
_CELLS = 256  # of the probability that are kept


class Cells:
    """A volume of any size, read cell by cell; the last `keep` cells are kept as they are stored."""

    def __init__(self, read: Read, shape: Shape, keep: int) -> None:
        self._read, self._shape, self._keep = read, shape, keep
        self._cells: OrderedDict[Shape, NDArray[np.generic]] = OrderedDict()

    def box(self, box: Box) -> NDArray[np.generic]:
        """[Z, Y, X] what is in a box inside the volume, of one voxel at least."""
        zs, ys, xs = (range(a // c, -(-b // c)) for a, b, c in zip(box.start, box.stop, _CELL, strict=True))
        cells = list(itertools.product(zs, ys, xs))
        found = np.empty(box.shape, dtype=self.cell(cells[0]).dtype)
        for cell in cells:
            whole = _box_of(cell)
            here = whole.clip(box)
            found[here.relative_to(box.start).slices] = self.cell(cell)[here.relative_to(whole.start).slices]
        return found

    def cell(self, cell: Shape) -> NDArray[np.generic]:
        """The voxels of one cell; fewer at the volume's end."""
        if cell in self._cells:
            self._cells.move_to_end(cell)
        else:
            found = self._read(_box_of(cell).clip(Box.whole(self._shape)))
            self._cells[cell] = np.array(found)  # not a view that holds more than the cell
            if len(self._cells) > self._keep:
                self._cells.popitem(last=False)
        return self._cells[cell]


def _box_of(cell: Shape) -> Box:
    return Box.at((cell[0] * _CELL[0], cell[1] * _CELL[1], cell[2] * _CELL[2]), _CELL)


class Look:
    """The probability at single voxels of a volume of any size."""

    def __init__(self, read: Read, shape: Shape, floor: float) -> None:
        self._cells, self._shape, self._floor = Cells(read, shape, _CELLS), shape, floor
        z, y, x = (-(-n // c) for n, c in zip(shape, _CELL, strict=True))
        self._grid: Shape = (z, y, x)

    def __call__(self, voxels: Floats) -> NDArray[np.float32]:
        """[M] probability at the voxels nearest to [M, 3] voxel positions; 0 below `floor` and outside the volume."""
        found = self.plain(voxels)
        return np.where(found >= self._floor, found, np.float32(0))

    def plain(self, voxels: Floats) -> NDArray[np.float32]:
        """[M] the same, but as it is where it is below `floor`."""
        places = np.rint(voxels).astype(np.int64)
        inside = np.flatnonzero(np.all((places >= 0) & (places < self._shape), axis=1))
        found = np.zeros(len(places), dtype=np.float32)
        if not len(inside):
            return found
        cells, within = np.divmod(places[inside], _CELL)
        keys = np.ravel_multi_index(tuple(cells.T), self._grid)
        order = np.argsort(keys, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(keys[order])) + 1)
        raw = []
        for group in groups:
            z, y, x = cells[group[0]].tolist()
            raw.append(self._cells.cell((z, y, x))[tuple(within[group].T)])
        found[inside[order]] = as_probability(np.concatenate(raw), Box.whole(self._shape))
        return found

    def inside(self, box: Box) -> Bools:
        """[Z, Y, X] where the probability in a box of the volume reaches `floor`."""
        return np.asarray(as_probability(self._cells.box(box), box) >= self._floor)


@dataclass(frozen=True)
class Foreground:
    """N voxels in raster order, strands of the foreground, and their 26-neighbourhood."""

    shape: Shape
    spacing: Floats  # [3] length of a voxel along z, y, x
    at: Look  # the probability anywhere
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

    @functools.cached_property
    def thickness(self) -> Floats:
        """[N] radius: the border runs half a voxel before the background voxel, but the nearest of many is nearer than
        most."""
        return np.maximum(self.distance - 0.25, 0.5)

    def graph(self, weight: Floats) -> csr_array:
        """[N, N] upper half of the symmetric graph with a weight per pair; give `directed=False` to csgraph."""
        n = len(self.voxels)
        return csr_array((weight, (self.pairs[:, 0], self.pairs[:, 1])), shape=(n, n))


@dataclass(frozen=True)
class BlockSkeleton:
    """N voxels of a block that centerlines may run through, in C components (see block_skeleton.py)."""

    voxels: NDArray[np.int32]  # [N, 3]
    probability: NDArray[np.float32]  # [N]
    distance: NDArray[np.float32]  # [N] to the nearest voxel below the threshold; 0.5 where it is below itself
    component: NDArray[np.int32]  # [N]
    count: Ints  # [C] voxels of the whole component that belong to this block
    strong: Bools  # [C] whether any of them reaches the threshold


def foreground(
    parts: Sequence[BlockSkeleton], read: Read, shape: Shape, spacing: Floats, floor: float, min_voxels: int
) -> Foreground | None:
    """The strands of all blocks, in components that reach the threshold and hold `min_voxels`; None without any."""
    if not parts:
        return None
    firsts = np.cumsum([0, *(len(part.count) for part in parts)])
    part_of = np.concatenate([part.component + first for part, first in zip(parts, firsts, strict=False)])
    everything = np.concatenate([part.voxels for part in parts])
    keys, once, again = np.unique(_keys(everything, shape), return_index=True, return_inverse=True)
    voxels, n = everything[once], len(keys)
    pairs, step = find_neighbor_pairs(voxels, shape, spacing)
    half = csr_array((np.ones(len(pairs), dtype=np.int8), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    components, label = connected_components(half, directed=False)
    whole = np.zeros(firsts[-1], dtype=np.int64)  # the component of each block's component
    whole[part_of] = label[again]
    count = np.bincount(whole, weights=np.concatenate([part.count for part in parts]), minlength=components)
    strong = np.bincount(whole[np.concatenate([part.strong for part in parts])], minlength=components) > 0
    good = strong & (count >= min_voxels)
    keep = good[label]
    if not keep.any():
        return None
    index = (np.cumsum(keep) - 1).astype(np.int32)
    inside = keep[pairs[:, 0]]  # both ends of a pair are in one piece
    return Foreground(
        shape,
        spacing,
        Look(read, shape, floor),
        voxels[keep],
        np.concatenate([part.probability for part in parts])[once][keep],
        np.concatenate([part.distance for part in parts])[once][keep].astype(np.float64),
        index[pairs[inside]],
        step[inside],
        (np.cumsum(good) - 1)[label[keep]].astype(np.int32),
        int(good.sum()),
    )


def cost(distance: NDArray[np.floating], probability: NDArray[np.floating]) -> Floats:
    """[N] price of one unit of length at each voxel.

    The inverse square of the border distance keeps the path in the middle of thick and thin branches alike (a price
    normalised by the thickest place, as TEASAR has, does not act in thin ones); probability acts where the border is
    blurred or two branches touch.
    """
    value: Floats = 1.0 / (distance.astype(np.float64) * probability.astype(np.float64)) ** 2
    return value


def accumulated(step: Floats, parent: Ints) -> Floats:
    """[N] sum of `step` from each node up to its root (its own parent, with step 0), by pointer doubling."""
    total, up = step.copy(), parent
    while True:
        total += total[up]
        above = up[up]
        if np.array_equal(above, up):
            return total
        up = above


def farthest(up: Ints) -> Ints:
    """[N] where the way that goes from each node to `up` [N] ends (at its own `up`), by pointer doubling."""
    while not np.array_equal(above := up[up], up):
        up = above
    return up


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


def find_neighbor_pairs(voxels: NDArray[np.int32], shape: Shape, spacing: Floats) -> tuple[NDArray[np.int32], Floats]:
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
