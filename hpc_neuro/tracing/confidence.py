"""How sure each node of a tree is, from the probability it was traced in."""

from __future__ import annotations

import numpy as np

from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.morphology import Tree
from hpc_neuro.tracing.voxel_graph import Floats, Ints, Read, as_probability

_CELL = 64  # [voxel] nodes are looked up box by box of this size, so that memory does not follow the volume


def measure_confidence(tree: Tree, read: Read, shape: Shape) -> Floats:
    """[N] lowest probability on the edge from each node to its parent, in [0, 1]; a root's is that at its place.

    `tree` is in voxels of a volume of `shape`, which `read` reads by box. An edge is sampled about every half voxel,
    each sample taking the brightest of the 27 voxels round it: a centre line half a voxel off is no doubt, a break is.
    """
    node, voxels = sample_edges(tree, shape)
    found = np.ones(len(tree))
    np.minimum.at(found, node, read_neighborhood_max(voxels, read, shape))
    return found


def sample_edges(tree: Tree, shape: Shape) -> tuple[Ints, Ints]:
    """Where `measure_confidence` looks: [M] nodes, [M, 3] voxels on the edge from each to its parent."""
    parent = np.maximum(tree.parents, 0)
    start, stop = tree.points, np.where(tree.parents[:, None] >= 0, tree.points[parent], tree.points)
    counts = np.maximum(np.ceil(2 * np.linalg.norm(stop - start, axis=1)).astype(np.int64), 1) + 1
    node = np.repeat(np.arange(len(tree)), counts)
    place = np.arange(len(node)) - np.repeat(np.cumsum(counts) - counts, counts)
    share = (place / (np.repeat(counts, counts) - 1))[:, None]
    voxels = np.rint(start[node] * (1 - share) + stop[node] * share).astype(np.int64)
    return node, np.clip(voxels, 0, np.array(shape) - 1)


def read_neighborhood_max(voxels: Ints, read: Read, shape: Shape) -> Floats:
    """[M] largest probability of each voxel and its 26 neighbours."""
    cell = voxels // _CELL
    order = np.lexsort(cell.T[::-1])
    values = np.empty(len(voxels))
    breaks = np.flatnonzero(np.any(np.diff(cell[order], axis=0), axis=1)) + 1
    for group in np.split(order, breaks):
        mine = voxels[group]
        (z0, y0, x0), (z1, y1, x1) = mine.min(axis=0), mine.max(axis=0) + 1
        box = Box((z0, y0, x0), (z1, y1, x1)).grow((1, 1, 1)).clip(Box.whole(shape))
        array = as_probability(read(box), box)
        places, last = mine - box.start, np.array(box.shape) - 1
        best = np.zeros(len(mine))
        for offset in np.ndindex(3, 3, 3):
            z, y, x = np.clip(places + np.array(offset) - 1, 0, last).T
            best = np.maximum(best, array[z, y, x])
        values[group] = best
    return values
