"""From paths and bridges to rooted, pruned, smooth trees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components
from scipy.spatial import cKDTree

from hpc_neuro.core.morphology import Tree, child_counts, edge_lengths, select_nodes, tips
from hpc_neuro.tracing.graph import Wires
from hpc_neuro.tracing.voxel_graph import Floats, Ints, accumulated, farthest

_UNDEFINED, _SOMA = 0, 1  # SWC types
_SOMA_RATIO = 3.0  # a node this many times thicker than the median, and
_NEAR = 10.0  # [voxel] within which an end is as thick as its nodes are on average
_SOMA_RADIUS = 4.0  # [voxel] at least this thick, is a soma


def rooted(net: Wires, given: Sequence[int], min_branch: float) -> Iterator[Tree]:
    """The trees of the pieces of the `given` roots, in their order, or those of all pieces when none is given.

    No two roots lie in one piece.
    """
    n = len(net.points)
    graph = csr_array((np.ones(len(net.edges)), (net.edges[:, 0], net.edges[:, 1])), shape=(n, n))
    count, label = connected_components(graph, directed=False)
    roots = [(root, _UNDEFINED) for root in given] or _roots(net, min_branch, count, label)
    if not roots:
        return
    # one search for all, from a node that leads to every root: thousands of trees would each look at all nodes
    starts = np.array([start for start, _ in roots], dtype=np.int64)
    rows = np.concatenate([net.edges[:, 0], net.edges[:, 1], np.full(len(starts), n)])
    columns = np.concatenate([net.edges[:, 1], net.edges[:, 0], starts])
    both = csr_array((np.ones(len(rows)), (rows, columns)), shape=(n + 1, n + 1))
    order, above = breadth_first_order(both, n, return_predecessors=True)
    order = order[1:]
    rank, owner = np.empty(n, dtype=np.int64), np.full(count, -1)
    owner[label[starts]] = np.arange(len(starts))
    whose = owner[label[order]]
    ends = np.cumsum(np.bincount(whose))[:-1]
    for (_, kind), nodes in zip(roots, np.split(order[np.argsort(whose, kind="stable")], ends), strict=True):
        rank[nodes] = np.arange(len(nodes))
        parents = np.concatenate([[-1], rank[above[nodes[1:]]]]).astype(np.int64)
        types = np.full(len(nodes), _UNDEFINED, dtype=np.int64)
        types[0] = kind
        yield Tree(net.points[nodes], net.radii[nodes], parents, types)


def _roots(net: Wires, min_branch: float, count: int, label: NDArray[np.int32]) -> list[tuple[int, int]]:
    """Where each piece begins, and that node's type: the soma if one place is far thicker than the rest, else the
    thickest end. What is left of an end at which a bridge begins is none (see pruned)."""
    around = net.neighbor_lists()
    degree = net.degree
    order = np.argsort(label, kind="stable")
    found = []
    for piece in np.split(order, np.searchsorted(label[order], np.arange(1, count))):
        radii = net.radii[piece]
        if radii.max() >= max(_SOMA_RATIO * np.median(radii), _SOMA_RADIUS):
            found.append((int(piece[radii.argmax()]), _SOMA))
            continue
        ends = piece[degree[piece] <= 1]
        stub = np.array([_is_stub(net, around, end, min_branch) for end in ends.tolist()])
        ends = ends if stub.all() else ends[~stub]
        balls = cKDTree(net.points[piece]).query_ball_point(net.points[ends], _NEAR, return_sorted=True)
        thick = [float(radii[ball].mean()) for ball in balls]
        found.append((int(ends[int(np.argmax(thick))]), _UNDEFINED))
    return found


def _is_stub(net: Wires, around: Sequence[Sequence[int]], end: int, min_branch: float) -> bool:
    """Whether an end hardly leaves the surface of the line that it springs from."""
    before, here, gone = -1, end, 0.0
    while len(around[here]) <= 2:
        onward = [node for node in around[here] if node != before]
        if not onward:
            return False
        before, here = here, onward[0]
        gone += float(np.linalg.norm(net.points[here] - net.points[before]))
    return bool(gone - net.radii[here] < min_branch)


def pruned(tree: Tree, min_branch: float) -> Tree:
    """Without end branches that hardly leave the surface of the branch they spring from, shortest first."""
    while True:
        counts = child_counts(tree)
        fork = counts >= 2
        joint, away = _up_to_fork(tree, fork)
        ends = tips(tree)
        ends = ends[fork[joint[ends]]]
        short = ends[away[ends] - tree.radii[joint[ends]] < min_branch]
        if not len(short):
            return tree
        short = short[np.argsort(away[short], kind="stable")]
        _, first = np.unique(joint[short], return_index=True)  # the shortest of each fork; its twin may go on
        drop = np.zeros(len(tree), dtype=bool)
        drop[short[first]] = True
        below = np.arange(len(tree))
        single = np.flatnonzero((tree.parents >= 0) & (counts[tree.parents] == 1))
        below[tree.parents[single]] = single
        drop = drop[farthest(below)] & ~fork & (tree.parents >= 0)  # a dropped tip takes its whole branch
        tree = select_nodes(tree, ~drop)


def _up_to_fork(tree: Tree, fork: NDArray[np.bool_]) -> tuple[Ints, Floats]:
    """For each node the nearest fork above it (the root where there is none) and the way's length."""
    above = np.maximum(tree.parents, 0)
    stop = fork[above] | (tree.parents < 0)  # the way up ends here
    up, step = np.where(stop, np.arange(len(tree)), above), edge_lengths(tree)
    top = farthest(up)
    away = accumulated(np.where(stop, 0.0, step), up) + np.where(tree.parents[top] >= 0, step[top], 0.0)
    return np.where(tree.parents[top] >= 0, above[top], top), away


def main_side(tree: Tree) -> Tree:
    """The part of the tree on the side of its root that holds most cable.

    What leaves a ball of three radii round the root is judged by its direction: less than a right angle from that of
    the branch with most cable stays, the rest is dropped.
    """
    step = edge_lengths(tree)
    home = accumulated(step, np.maximum(tree.parents, 0))
    ball = home <= 3 * tree.radii[0] + 2
    leaving = np.flatnonzero(~ball & ball[tree.parents])
    if len(leaving) < 2:
        return tree
    below = step.copy()
    for node in range(len(tree) - 1, 0, -1):
        below[tree.parents[node]] += below[node]
    out = tree.points[leaving] - tree.points[0]
    stays = leaving[out @ out[below[leaving].argmax()] > 0]
    keep = np.zeros(len(tree), dtype=bool)
    keep[stays] = True
    for node in range(1, len(tree)):  # what hangs below
        keep[node] |= keep[tree.parents[node]]
    for node in range(len(tree) - 1, 0, -1):  # and what leads there
        keep[tree.parents[node]] |= keep[node]
    return select_nodes(tree, keep)


def runs(tree: Tree) -> list[Ints]:
    """The tree as unbranched runs, each from its joint on an earlier run (or the root) to a tip, longest way first."""
    n = len(tree)
    step = edge_lengths(tree)
    far, heir = np.zeros(n), np.full(n, -1, dtype=np.int64)
    for node in range(n - 1, 0, -1):
        parent = tree.parents[node]
        if heir[parent] < 0 or far[node] + step[node] > far[parent]:
            far[parent], heir[parent] = far[node] + step[node], node
    found = []
    starts = [node for node in range(n) if tree.parents[node] < 0 or heir[tree.parents[node]] != node]
    for start in starts:
        run = [start] if tree.parents[start] < 0 else [int(tree.parents[start]), start]
        while heir[run[-1]] >= 0:
            run.append(int(heir[run[-1]]))
        found.append(np.array(run))
    return found


def smoothed(tree: Tree, sigma: float) -> Tree:
    """Nodes moved along their runs by a Gaussian of `sigma` nodes; root, tips and the hold on the parent run stay."""
    if sigma == 0:
        return tree
    width = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-width, width + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    points, radii = tree.points.copy(), tree.radii.copy()
    for run in runs(tree):  # an earlier run is final when a later one takes its joint from it
        line = np.column_stack([points[run], radii[run]])
        pad = min(width, len(run) - 1)
        if pad < 1:
            continue
        # point reflection at both ends keeps them where they are
        before, after = 2 * line[0] - line[pad:0:-1], 2 * line[-1] - line[-2 : -pad - 2 : -1]
        full = np.concatenate([before, line, after])
        small = kernel[width - pad : width + pad + 1]
        small = small / small.sum()
        line = np.stack([np.convolve(column, small, mode="valid") for column in full.T], axis=1)
        points[run[1:]], radii[run[1:]] = line[1:, :3], np.maximum(line[1:, 3], 0.5)
    return replace(tree, points=points, radii=radii)


def thinned(tree: Tree, step: float) -> Tree:
    """Without path nodes closer than `step` to the last kept node above; root, forks and tips stay."""
    counts = child_counts(tree)
    lengths = edge_lengths(tree)
    keep = np.ones(len(tree), dtype=bool)
    since = np.zeros(len(tree))
    for node in range(1, len(tree)):
        since[node] = lengths[node] + since[tree.parents[node]]
        if counts[node] == 1 and since[node] < step:
            keep[node] = False
        else:
            since[node] = 0.0
    return select_nodes(tree, keep)
