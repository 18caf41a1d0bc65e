"""A neuron's tree as a parent array, and pure functions on it.

Coordinates are z y x. A tree carries no unit: the caller knows whether it is in voxels or micrometers, and `scale_tree`
converts one to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.geometry import VoxelSize, fine_voxel


@dataclass(frozen=True, eq=False)
class Tree:
    """One or more rooted trees. Parents come before their children, so a loop over nodes runs from roots to tips."""

    points: NDArray[np.float64]
    """[N, 3] z y x."""
    radii: NDArray[np.float64]
    """[N], in the unit of the points."""
    parents: NDArray[np.int64]
    """[N] index of the parent, -1 for a root."""
    types: NDArray[np.int64]
    """[N] SWC type: 0 undefined, 1 soma, 2 axon, 3 (basal) dendrite, 4 apical dendrite, 5 to 7 custom."""

    def __post_init__(self) -> None:
        n = len(self.points)
        if self.points.shape != (n, 3) or any(a.shape != (n,) for a in (self.radii, self.parents, self.types)):
            raise ValueError(f"the arrays of a tree of {n} nodes have other lengths")
        if np.any(self.parents >= np.arange(n)) or np.any(self.parents < -1):
            raise ValueError("a parent comes after its child, or is not in the tree; sort parents before children")

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


# --- Building ---


def empty_tree() -> Tree:
    """A tree without nodes."""
    return build_tree(np.zeros((0, 3)), np.zeros(0, dtype=np.int64))


def build_tree(
    points: NDArray[np.floating],
    parents: NDArray[np.int64],
    radii: NDArray[np.floating] | float = 1.0,
    types: NDArray[np.int64] | int = 3,
) -> Tree:
    """Build a tree from arrays in any node order; nodes are sorted parents first. Raises ValueError on a cycle."""
    n = len(points)
    parents = np.asarray(parents, dtype=np.int64)

    # `rank` is the inverse of `order`: old index -> new index.
    order = order_parents_first(parents)
    rank = np.empty(n, dtype=np.int64)
    rank[order] = np.arange(n)

    # Parents are given as old indices; `rank` maps an old index to the new one.
    new_parents = parents[order]
    if n:
        new_parents = np.where(new_parents >= 0, rank[new_parents], -1).astype(np.int64)

    return Tree(
        np.asarray(points, dtype=np.float64).reshape(n, 3)[order],
        np.broadcast_to(np.asarray(radii, dtype=np.float64), (n,))[order].copy(),
        new_parents,
        np.broadcast_to(np.asarray(types, dtype=np.int64), (n,))[order].copy(),
    )


def order_parents_first(parents: NDArray[np.int64]) -> NDArray[np.int64]:
    """[N] an order of the nodes with parents before children; the present order where it already is one.

    Raises ValueError on a cycle.
    """
    n = len(parents)
    if np.all(parents < np.arange(n)):
        return np.arange(n)

    # Pointer doubling: after k rounds `ancestor` is 2^k steps up (or the root), and `depth` is the number of steps.
    depth = (parents >= 0).astype(np.int64)
    ancestor = np.where(parents >= 0, parents, np.arange(n))
    for _ in range(n.bit_length()):
        if np.all(parents[ancestor] < 0):
            return np.argsort(depth, kind="stable")
        depth += depth[ancestor]
        ancestor = ancestor[ancestor]

    # A node that reaches no root in N steps is on a cycle or below one.
    on_cycle = np.flatnonzero(parents[ancestor] >= 0)
    if len(on_cycle):
        raise ValueError(f"{len(on_cycle)} nodes hang on a cycle, the first is node {int(on_cycle[0])}")
    return np.argsort(depth, kind="stable")


def turn_path(parents: NDArray[np.int64], node: int, new_parent: int = -1) -> None:
    """Turn the edges above `node` in place, so that it is the root of its tree, and `new_parent` its parent.

    In place, because a forest has one such path for each of its trees.
    """
    while node >= 0:
        old_parent = int(parents[node])
        parents[node] = new_parent
        new_parent, node = node, old_parent


def reroot(tree: Tree, node: int) -> Tree:
    """The tree with `node` as the root of its component."""
    parents = tree.parents.copy()
    turn_path(parents, node)
    return build_tree(tree.points, parents, tree.radii, tree.types)


# --- Measuring ---


def child_counts(tree: Tree) -> NDArray[np.int64]:
    """[N] number of children of each node."""
    return np.bincount(tree.parents[tree.parents >= 0], minlength=len(tree)).astype(np.int64)


def tips(tree: Tree) -> NDArray[np.int64]:
    """Indices of the end points: nodes without children, except roots."""
    return np.flatnonzero((child_counts(tree) == 0) & (tree.parents >= 0))


def branch_points(tree: Tree) -> NDArray[np.int64]:
    """Indices of nodes with two or more children; a root needs three, because a cable passes through one with two."""
    counts = child_counts(tree)
    return np.flatnonzero(counts >= np.where(tree.parents < 0, 3, 2))


def edge_lengths(tree: Tree) -> NDArray[np.float64]:
    """[N] distance of each node to its parent, 0 for roots, in the tree's unit."""
    if not len(tree):
        return np.zeros(0)
    lengths = np.linalg.norm(tree.points - tree.points[tree.parents], axis=1)
    return np.where(tree.parents >= 0, lengths, 0.0)


def length(tree: Tree) -> float:
    """Cable length: the sum of edge lengths, in the tree's unit."""
    return float(edge_lengths(tree).sum())


# --- Changing ---


def scale_tree(tree: Tree, factor: VoxelSize) -> Tree:
    """Scale points by `factor` (z y x) and radii by its middle value (see `fine_voxel`). The inverse undoes it."""
    return replace(tree, points=tree.points * np.asarray(factor), radii=tree.radii * fine_voxel(factor))


def select_nodes(tree: Tree, keep: NDArray[np.bool_]) -> Tree:
    """The nodes where `keep` is true; one whose parent is dropped hangs on its nearest kept ancestor, or is a root."""
    # Nearest kept node above each node; -1 for none. Of dropped ones in a row each round skips twice as many.
    anchor = tree.parents[keep]
    above = tree.parents
    while len(pending := np.flatnonzero((anchor >= 0) & ~keep[anchor])):
        anchor[pending] = above[anchor[pending]]
        above = np.where((above >= 0) & ~keep[above], above[above], above)

    new_index = np.cumsum(keep) - 1
    parents = np.where(anchor >= 0, new_index[anchor], -1)

    return Tree(tree.points[keep], tree.radii[keep], parents.astype(np.int64), tree.types[keep])


def mark_above(tree: Tree, is_marked: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[N] whether a node is marked, or leads from its root to one that is (`is_marked` [N])."""
    leads = is_marked.copy()

    # Children come after their parents, so one backward pass marks all that leads to a node.
    for node in range(len(tree) - 1, 0, -1):
        if leads[node] and tree.parents[node] >= 0:
            leads[tree.parents[node]] = True
    return leads


def label_components(tree: Tree) -> NDArray[np.int64]:
    """[N] number of the root above each node, in the order of the roots."""
    # Pointer doubling, as in `order_parents_first`: log2(N) passes instead of one per generation.
    ancestor = np.where(tree.parents >= 0, tree.parents, np.arange(len(tree)))
    for _ in range(len(tree).bit_length()):
        ancestor = ancestor[ancestor]
    return np.searchsorted(tree.roots, ancestor).astype(np.int64)


def group_components(tree: Tree) -> list[NDArray[np.int64]]:
    """The nodes of each separate tree of a forest, in the order of the roots."""
    if not len(tree):
        return []
    # One sort for all components: a mask for each would take as many passes as there are trees.
    labels = label_components(tree)
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.searchsorted(labels[order], np.arange(1, len(tree.roots))))


def split_components(tree: Tree) -> list[Tree]:
    """The separate trees of a forest, in the order of their roots; nodes keep their order."""
    components = []
    # Index of a node within its component.
    local = np.empty(len(tree), dtype=np.int64)
    for nodes in group_components(tree):
        local[nodes] = np.arange(len(nodes))
        parents = np.where(tree.parents[nodes] < 0, -1, local[tree.parents[nodes]])
        components.append(Tree(tree.points[nodes], tree.radii[nodes], parents, tree.types[nodes]))

    return components


def concatenate_trees(trees: Sequence[Tree]) -> Tree:
    """Several trees as one forest, one after the other; the inverse of `split_components`."""
    if not trees:
        return empty_tree()
    # Indices of a tree shift by the number of nodes before it.
    offsets = np.cumsum([0, *map(len, trees)])
    parents = [np.where(t.parents >= 0, t.parents + offset, -1) for t, offset in zip(trees, offsets, strict=False)]

    return Tree(
        np.concatenate([t.points for t in trees]),
        np.concatenate([t.radii for t in trees]),
        np.concatenate(parents).astype(np.int64),
        np.concatenate([t.types for t in trees]),
    )


def resample_tree(tree: Tree, step: float) -> Tree:
    """Cut every edge into equal parts no longer than `step` (tree's unit). Old nodes stay; radii are interpolated."""
    lengths = edge_lengths(tree)
    # The margin keeps an edge whole that is `step` long but for rounding.
    parts = np.maximum(1, np.ceil(lengths / step - 1e-9)).astype(np.int64)
    parts[tree.parents < 0] = 1

    # New nodes lie edge by edge: those of old node `owner`'s edge, from the parent's side to the old node itself.
    new_index = np.cumsum(parts) - 1
    owner = np.repeat(np.arange(len(tree)), parts)
    position = np.arange(len(owner)) - (new_index - parts + 1)[owner]
    share = (position + 1) / parts[owner]

    parent = np.where(tree.parents >= 0, tree.parents, np.arange(len(tree)))
    points = tree.points[parent[owner]] * (1 - share)[:, None] + tree.points[owner] * share[:, None]
    radii = tree.radii[parent[owner]] * (1 - share) + tree.radii[owner] * share

    # The first new node of an edge hangs on the old parent, every other one on the node before it.
    edge_parent = np.where(tree.parents >= 0, new_index[tree.parents], -1) if len(tree) else tree.parents
    parents = np.where(position == 0, edge_parent[owner], np.arange(len(owner)) - 1)

    return Tree(points, radii, parents, tree.types[owner])
