"""Read a probability volume of any size: by box, at single voxels, and along the edges of a tree."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError

ReadBox = Callable[[Box], NDArray[np.generic]]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_CELL: Shape = (32, 64, 64)
"""[voxel] What is read at once where single voxels are wanted: a usual chunk."""
_KEPT_CELLS = 256
"""Cells of the probability that stay in memory."""
_PATCHES_AT_ONCE = 1000
"""Patches that are read at once, for which memory is bounded."""
_CONFIDENCE_CELL = 64
"""[voxel] Edge of the boxes in which the confidence of a tree is looked up."""


def as_probability(array: NDArray[np.generic], box: Box) -> NDArray[np.float32]:
    """Convert bool, uint8 (255 is 1) or floats in [0, 1] to float32.

    Raises InputError for other dtypes and other values, and names `box`, from which the array was read.
    """
    if array.dtype == np.bool_:
        return array.astype(np.float32)
    if array.dtype == np.uint8:
        return array.astype(np.float32) / np.float32(255)

    # Other integers have no agreed scale.
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"a probability is bool, uint8 or float, found {array.dtype}; convert it first")

    values = array.astype(np.float32)
    lowest, highest = (values.min(), values.max()) if values.size else (0, 0)
    # Written so that NaN fails, too.
    if not (lowest >= 0 and highest <= 1):
        raise InputError(
            f"the probability at {box.start} to {box.stop} ranges from {lowest} to {highest}, expected 0 to 1; "
            "apply the sigmoid, or normalize it"
        )
    return values


class CellCache:
    """A volume of any size, read cell by cell; the `keep` cells used last stay in memory."""

    def __init__(self, read: ReadBox, shape: Shape, keep: int, cell: Shape = _CELL) -> None:
        self._read, self._shape, self._keep, self._cell = read, shape, keep, cell
        self._cells: OrderedDict[Shape, NDArray[np.generic]] = OrderedDict()

    @property
    def grid(self) -> Shape:
        """Cells along z, y, x."""
        z, y, x = (-(-n // c) for n, c in zip(self._shape, self._cell, strict=True))
        return z, y, x

    def read_box(self, box: Box) -> NDArray[np.generic]:
        """[Z, Y, X] the voxels of a box that lies inside the volume and holds one voxel at least."""
        spans = [_split_span(*ends) for ends in zip(box.start, box.stop, self._cell, strict=True)]

        # The dtype is that of the cells, which is unknown before the first one is read.
        values: NDArray[np.generic] | None = None
        for z, y, x in itertools.product(*spans):
            cell = self.read_cell((z.cell, y.cell, x.cell))
            if values is None:
                values = np.empty(box.shape, dtype=cell.dtype)
            values[z.inside_box, y.inside_box, x.inside_box] = cell[z.inside_cell, y.inside_cell, x.inside_cell]

        assert values is not None, f"{box} is empty"
        return values

    def sample(self, voxels: Ints) -> NDArray[np.generic]:
        """[M] the values at [M, 3] voxels inside the volume, of which there is one at least."""
        cells, within = np.divmod(voxels, self._cell)
        order, groups = self._group_by_cell(cells)
        stored = [self.read_cell(index)[tuple(within[group].T)] for index, group in groups]

        values = np.concatenate(stored)
        sampled = np.empty_like(values)
        sampled[order] = values
        return sampled

    def sample_means(self, voxels: Ints, offsets: Ints, weights: Floats) -> Floats:
        """[M, W] weighted means around [M, 3] voxels inside the volume.

        The values at `offsets` [O, 3] from each voxel have `weights` [O, W]; the border voxels stand for those outside.
        """
        last = np.array(self._shape) - 1
        means = np.empty((len(voxels), weights.shape[1]))
        for _, group in self._group_by_cell(voxels // self._cell)[1]:
            # A cell of a dense volume holds many voxels, and each has a patch.
            for part in np.array_split(group, -(-len(group) // _PATCHES_AT_ONCE)):
                around = np.clip(voxels[part][:, None] + offsets, 0, last)
                low, high = around.min(axis=(0, 1)), around.max(axis=(0, 1)) + 1
                (z0, y0, x0), (z1, y1, x1) = low.tolist(), high.tolist()
                box = self.read_box(Box((z0, y0, x0), (z1, y1, x1)))
                values = box[tuple(np.moveaxis(around - low, -1, 0))]
                means[part] = values.astype(np.float64) @ weights
        return means

    def sample_medians(self, voxels: Ints) -> Floats:
        """[M] the median of the cell that holds each of [M, 3] voxels inside the volume."""
        medians = np.empty(len(voxels))
        for index, group in self._group_by_cell(voxels // self._cell)[1]:
            medians[group] = np.median(self.read_cell(index).astype(np.float64))
        return medians

    def _group_by_cell(self, cells: Ints) -> tuple[Ints, list[tuple[Shape, Ints]]]:
        """An order of [M, 3] cells that sorts equal ones together, and for each distinct cell its places in `cells`.

        A cell is looked up once however many voxels it holds.
        """
        keys = np.ravel_multi_index(tuple(cells.T), self.grid)
        order = np.argsort(keys, kind="stable")
        groups = []
        for group in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            z, y, x = cells[group[0]].tolist()
            groups.append(((z, y, x), group))
        return order, groups

    def read_cell(self, index: Shape) -> NDArray[np.generic]:
        """The voxels of one cell, fewer at the end of the volume."""
        if index in self._cells:
            self._cells.move_to_end(index)
            return self._cells[index]

        (z, y, x), (depth, height, width), (planes, rows, columns) = index, self._cell, self._shape
        z, y, x = z * depth, y * height, x * width
        # Built at once: a brain has millions of cells.
        box = Box((z, y, x), (min(z + depth, planes), min(y + height, rows), min(x + width, columns)))
        # A copy: a view would keep alive all that the reader has read.
        values = self._cells[index] = np.array(self._read(box))

        if len(self._cells) > self._keep:
            self._cells.popitem(last=False)
        return values


class _Span(NamedTuple):
    """The part of an interval that lies in one cell, along one axis."""

    cell: int
    inside_cell: slice
    inside_box: slice


def _split_span(start: int, stop: int, cell: int) -> list[_Span]:
    """Cut the voxels start to stop of one axis at the borders of the cells."""
    spans = []

    for index in range(start // cell, -(-stop // cell)):
        low, high = max(start, index * cell), min(stop, (index + 1) * cell)
        inside_cell = slice(low - index * cell, high - index * cell)
        spans.append(_Span(index, inside_cell, slice(low - start, high - start)))
    return spans


class ProbabilitySampler:
    """The probability at single voxels and in boxes of a volume of any size.

    `floor` is the lower threshold of the hysteresis: voxels below it are background.
    """

    def __init__(self, read: ReadBox, shape: Shape, floor: float) -> None:
        self._cells = CellCache(read, shape, _KEPT_CELLS)
        self._shape, self._floor = shape, floor

    def sample(self, positions: Floats) -> NDArray[np.float32]:
        """[M] probability at the voxels nearest to [M, 3] voxel positions; 0 on background and outside the volume."""
        values = self.sample_background(positions)
        return np.where(values >= self._floor, values, np.float32(0))

    def sample_background(self, positions: Floats) -> NDArray[np.float32]:
        """[M] as `sample`, but background keeps its probability."""
        voxels = np.rint(positions).astype(np.int64)
        inside = np.flatnonzero(np.all((voxels >= 0) & (voxels < self._shape), axis=1))
        values = np.zeros(len(voxels), dtype=np.float32)
        if not len(inside):
            return values

        # Checking once for all cells is cheaper than once for each.
        values[inside] = as_probability(self._cells.sample(voxels[inside]), Box.whole(self._shape))
        return values

    def read_foreground(self, box: Box) -> Bools:
        """[Z, Y, X] whether the probability in a box inside the volume reaches `floor`."""
        return np.asarray(as_probability(self._cells.read_box(box), box) >= self._floor)


def measure_confidence(tree: Tree, read: ReadBox, shape: Shape) -> Floats:
    """[N] lowest probability on the edge from each node to its parent, in [0, 1]; at a root, the one at its voxel.

    `tree` is in voxels of a volume of `shape`, which `read` reads by box. An edge is sampled about every half voxel.
    Each sample takes the highest of the 27 voxels around it: a centerline half a voxel off is no reason for doubt, a
    break is.
    """
    if not len(tree):
        return np.zeros(0)
    nodes, voxels = sample_edges(tree, shape)

    # Several samples belong to one node, and plain indexing would keep only the last of them.
    lowest = np.ones(len(tree))
    np.minimum.at(lowest, nodes, read_neighborhood_max(voxels, read, shape))
    return lowest


def sample_edges(tree: Tree, shape: Shape) -> tuple[Ints, Ints]:
    """The samples of `measure_confidence`: [M] nodes and [M, 3] voxels on the edge from each node to its parent."""
    parents = np.maximum(tree.parents, 0)

    # A root has no edge, so its edge shrinks to its own place.
    starts, stops = tree.points, np.where(tree.parents[:, None] >= 0, tree.points[parents], tree.points)
    counts = np.maximum(np.ceil(2 * np.linalg.norm(stops - starts, axis=1)).astype(np.int64), 1) + 1

    nodes = np.repeat(np.arange(len(tree)), counts)
    index_on_edge = np.arange(len(nodes)) - np.repeat(np.cumsum(counts) - counts, counts)
    share = (index_on_edge / (np.repeat(counts, counts) - 1))[:, None]
    voxels = np.rint(starts[nodes] * (1 - share) + stops[nodes] * share).astype(np.int64)

    # Rounding at the border may lead out of the volume.
    return nodes, np.clip(voxels, 0, np.array(shape) - 1)


def read_neighborhood_max(voxels: Ints, read: ReadBox, shape: Shape) -> Floats:
    """[M] highest probability among each of [M, 3] voxels and its 26 neighbors."""
    # Voxels are read box by box, so that memory does not follow the volume.
    cells = voxels // _CONFIDENCE_CELL
    order = np.lexsort(cells.T[::-1])
    breaks = np.flatnonzero(np.any(np.diff(cells[order], axis=0), axis=1)) + 1

    highest = np.empty(len(voxels))
    for group in np.split(order, breaks):
        (z0, y0, x0), (z1, y1, x1) = voxels[group].min(axis=0), voxels[group].max(axis=0) + 1
        box = Box((z0, y0, x0), (z1, y1, x1)).grow((1, 1, 1)).clip(Box.whole(shape))

        array = as_probability(read(box), box)
        highest[group] = _gather_neighborhood_max(array, voxels[group] - box.start)
    return highest


def _gather_neighborhood_max(array: NDArray[np.float32], voxels: Ints) -> Floats:
    """[M] highest value of `array` among each of [M, 3] voxels and its 26 neighbors inside the array."""
    highest, last = np.zeros(len(voxels)), np.array(array.shape) - 1
    for offset in np.ndindex(3, 3, 3):
        z, y, x = np.clip(voxels + np.array(offset) - 1, 0, last).T
        highest = np.maximum(highest, array[z, y, x])
    return highest
