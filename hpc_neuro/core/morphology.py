"""A neuron's tree as a parent array, and pure functions on it.

Coordinates are z y x. A tree carries no unit: whoever holds it knows whether it is in voxels or micrometres,
and `scaled` goes from one to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.geometry import VoxelSize, fine_voxel


@dataclass(frozen=True, eq=False)
class Tree:
    """One or more rooted trees. Parents stand before their children, so a pass in order is a pass from root to tips."""

    points: NDArray[np.float64]  # [N, 3] z y x
    radii: NDArray[np.float64]  # [N]
    parents: NDArray[np.int64]  # [N] index of the parent, -1 for a root
    types: NDArray[np.int64]  # [N] SWC type: 0 undefined, 1 soma, 2 axon, 3 (basal) dendrite, 4 apical dendrite, 5-7

    def __post_init__(self) -> None:
        n = len(self.points)
        if self.points.shape != (n, 3) or any(a.shape != (n,) for a in (self.radii, self.parents, self.types)):
            raise ValueError(f"a tree of {n} nodes has arrays of other lengths")
        if np.any(self.parents >= np.arange(n)) or np.any(self.parents < -1):
            raise ValueError("a node's parent stands after it, or is not in the tree; sort parents before children")

    def __len__(self) -> int:
        return len(self.points)

    @property
    def roots(self) -> NDArray[np.int64]:
        """Indices of the nodes without a parent."""
        return np.flatnonzero(self.parents < 0)

    @property
    def edges(self) -> NDArray[np.int64]:
        """[E, 2] (child, parent) pairs."""
        child = np.flatnonzero(self.parents >= 0)
        return np.stack([child, self.parents[child]], axis=1)


def empty_tree() -> Tree:
    """The tree of no nodes."""
    return build_tree(np.zeros((0, 3)), np.zeros(0, dtype=np.int64))


def build_tree(
    points: NDArray[np.floating],
    parents: NDArray[np.int64],
    radii: NDArray[np.floating] | float = 1.0,
    types: NDArray[np.int64] | int = 3,
) -> Tree:
    """A tree from arrays in any node order (nodes are sorted parents first). Raises ValueError on a cycle."""
    n = len(points)
    parents = np.asarray(parents, dtype=np.int64)
    order = order_parents_first(parents)
    rank = np.empty(n, dtype=np.int64)
    rank[order] = np.arange(n)
    above = parents[order]
    above = np.where(above >= 0, rank[above], -1).astype(np.int64) if n else above
    return Tree(
        np.asarray(points, dtype=np.float64).reshape(n, 3)[order],
        np.broadcast_to(np.asarray(radii, dtype=np.float64), (n,))[order].copy(),
        above,
        np.broadcast_to(np.asarray(types, dtype=np.int64), (n,))[order].copy(),
    )


def order_parents_first(parents: NDArray[np.int64]) -> NDArray[np.int64]:
    """An order of nodes with parents before children, the given one where it already is. ValueError on a cycle."""
    n = len(parents)
    if np.all(parents < np.arange(n)):
        return np.arange(n)
    # pointer doubling: after k rounds `up` is the ancestor 2^k steps away (or the root), `depth` the steps taken
    depth = (parents >= 0).astype(np.int64)
    up = np.where(parents >= 0, parents, np.arange(n))
    for _ in range(n.bit_length()):
        if np.all(parents[up] < 0):
            return np.argsort(depth, kind="stable")
        depth += depth[up]
        up = up[up]
    stuck = np.flatnonzero(parents[up] >= 0)
    if len(stuck):
        raise ValueError(f"{len(stuck)} nodes hang on a cycle, the first is node {int(stuck[0])}")
    return np.argsort(depth, kind="stable")


def child_counts(tree: Tree) -> NDArray[np.int64]:
    """[N] number of children of each node."""
    return np.bincount(tree.parents[tree.parents >= 0], minlength=len(tree)).astype(np.int64)


def tips(tree: Tree) -> NDArray[np.int64]:
    """Indices of end points: nodes without children that are not lone roots."""
    return np.flatnonzero((child_counts(tree) == 0) & (tree.parents >= 0))


def branch_points(tree: Tree) -> NDArray[np.int64]:
    """Indices of nodes with two or more children; a root needs three (two is a cable passing through it)."""
    counts = child_counts(tree)
    return np.flatnonzero(counts >= np.where(tree.parents < 0, 3, 2))


def edge_lengths(tree: Tree) -> NDArray[np.float64]:
    """[N] distance of each node to its parent, 0 for roots, in the tree's unit."""
    if not len(tree):
        return np.zeros(0)
    step = np.linalg.norm(tree.points - tree.points[tree.parents], axis=1)
    return np.where(tree.parents >= 0, step, 0.0)


def length(tree: Tree) -> float:
    """Cable length: the sum of edge lengths, in the tree's unit."""
    return float(edge_lengths(tree).sum())


def scale_tree(tree: Tree, factor: VoxelSize) -> Tree:
    """Scale points by `factor` (z y x) and radii by its middle value (see `fine_voxel`). The inverse undoes it."""
    return replace(tree, points=tree.points * np.asarray(factor), radii=tree.radii * fine_voxel(factor))


def select_nodes(tree: Tree, keep: NDArray[np.bool_]) -> Tree:
    """The kept nodes; a node whose parent is dropped hangs on its nearest kept ancestor, or becomes a root."""
    anchor = np.empty(len(tree), dtype=np.int64)  # nearest kept node on the way up, the node itself included
    for i, parent in enumerate(tree.parents):
        anchor[i] = i if keep[i] else (anchor[parent] if parent >= 0 else -1)
    index = np.cumsum(keep) - 1
    above = np.where(tree.parents >= 0, anchor[tree.parents], -1)[keep] if len(tree) else tree.parents
    parents = np.where(above >= 0, index[above], -1)
    return Tree(tree.points[keep], tree.radii[keep], parents.astype(np.int64), tree.types[keep])


def label_components(tree: Tree) -> NDArray[np.int64]:
    """[N] number of the root above each node, in order of the roots."""
    up = np.where(tree.parents >= 0, tree.parents, np.arange(len(tree)))
    for _ in range(len(tree).bit_length()):
        up = up[up]
    return np.searchsorted(tree.roots, up).astype(np.int64)


def split_components(tree: Tree) -> list[Tree]:
    """The separate trees of a forest, in order of their roots; nodes keep their order."""
    if not len(tree):
        return []
    owner, place = label_components(tree), np.empty(len(tree), dtype=np.int64)  # node -> its index in its part
    order = np.argsort(owner, kind="stable")
    parts = []
    for nodes in np.split(order, np.searchsorted(owner[order], np.arange(1, len(tree.roots)))):
        place[nodes] = np.arange(len(nodes))
        parents = np.where(tree.parents[nodes] < 0, -1, place[tree.parents[nodes]])
        parts.append(Tree(tree.points[nodes], tree.radii[nodes], parents, tree.types[nodes]))
    return parts


def concatenate_trees(trees: Sequence[Tree]) -> Tree:
    """Several trees as one forest, one after the other; the inverse of `components`."""
    if not trees:
        return empty_tree()
    starts = np.cumsum([0, *map(len, trees)])
    parents = [np.where(t.parents >= 0, t.parents + s, -1) for t, s in zip(trees, starts, strict=False)]
    return Tree(
        np.concatenate([t.points for t in trees]),
        np.concatenate([t.radii for t in trees]),
        np.concatenate(parents).astype(np.int64),
        np.concatenate([t.types for t in trees]),
    )


def resample_tree(tree: Tree, step: float) -> Tree:
    """Every edge cut into equal parts no longer than `step` (tree's unit); old nodes stay, radii are interpolated."""
    lengths = edge_lengths(tree)
    parts = np.maximum(1, np.ceil(lengths / step - 1e-9)).astype(np.int64)
    parts[tree.parents < 0] = 1
    last = np.cumsum(parts) - 1  # new index of each old node
    owner = np.repeat(np.arange(len(tree)), parts)
    place = np.arange(len(owner)) - (last - parts + 1)[owner]  # 0 .. parts-1 along the edge, parent side first
    share = (place + 1) / parts[owner]
    parent = np.where(tree.parents >= 0, tree.parents, np.arange(len(tree)))
    points = tree.points[parent[owner]] * (1 - share)[:, None] + tree.points[owner] * share[:, None]
    radii = tree.radii[parent[owner]] * (1 - share) + tree.radii[owner] * share
    first = np.where(tree.parents >= 0, last[tree.parents], -1) if len(tree) else tree.parents
    parents = np.where(place == 0, first[owner], np.arange(len(owner)) - 1)
    return Tree(points, radii, parents, tree.types[owner])
