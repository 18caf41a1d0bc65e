"""How a tree is connected against how it should be: splits, merges, expected run length; Strahler order and Sholl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from hpc_neuro.core import morphology
from hpc_neuro.core.morphology import Tree
from hpc_neuro.metrics.segments import Segments

_STEPS = 4  # nodes per tolerance along resampled cable
_HOPS = 8  # steps up each way in which two neighbours' counterparts meet at once, nearly always


@dataclass(frozen=True)
class Topology:
    """Errors of connection, as a proofreader counts them."""

    splits: int
    """Joins that are missing: connected pieces in which the gold trees are found, less one per tree found."""
    merges: int
    """Joins too many: the same with the roles changed, pieces of predicted cable that gold does not connect there."""
    expected_run_length: float
    """Expected length of correctly connected gold cable around a random point of it (Januszewski et al. 2018)."""


def compare_topology(
    predicted: Tree, gold: Tree, tolerance: float, scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> Topology:
    """Splits, merges and expected run length of trees in one unit; run lengths after multiplying z y x by `scale`.

    Cable counts as found when the other tree is within `tolerance`. Two neighbouring found places are connected when
    the other tree connects them nearby: by cable that stays within 2 tolerances of the way between them. Pieces no
    longer than 2 tolerances (two neurites crossing, say) count neither as splits nor as merges. A run that belongs to a
    predicted tree which also runs along another gold tree has length 0, as in the paper.
    """
    if not len(predicted) or not len(gold):
        return Topology(0, 0, 0.0)
    found = _pieces(gold, predicted, tolerance, scale)
    claimed = _pieces(predicted, gold, tolerance, scale)
    visited: dict[int, set[int]] = {}
    for own, others in zip(found.tree[found.long], found.others[found.long], strict=True):
        visited.setdefault(int(others), set()).add(int(own))
    good = np.array([len(visited.get(int(o), set())) <= 1 for o in found.others], dtype=bool)
    runs = np.where(good, found.length, 0.0)
    total = morphology.length(morphology.scale_tree(gold, scale))
    return Topology(found.breaks, claimed.breaks, float((runs**2).sum() / total) if total else 0.0)


def strahler(tree: Tree) -> NDArray[np.int64]:
    """[N] Strahler order of each node: 1 at tips; one more where two children share the highest order."""
    order = np.ones(len(tree), dtype=np.int64)
    highest, twice = np.zeros(len(tree), dtype=np.int64), np.zeros(len(tree), dtype=bool)
    for node in range(len(tree) - 1, -1, -1):  # children stand after their parents
        if highest[node]:
            order[node] = highest[node] + int(twice[node])
        parent = tree.parents[node]
        if parent >= 0:
            twice[parent] = order[node] == highest[parent] or (twice[parent] and order[node] < highest[parent])
            highest[parent] = max(highest[parent], order[node])
    return order


def sholl(tree: Tree, radii: Sequence[float], centre: NDArray[np.float64] | None = None) -> NDArray[np.int64]:
    """How often the tree's edges cross the spheres of `radii` (the tree's unit) around `centre` (default: first node).

    Exact for straight edges: one whose ends are both outside crosses twice when it dips into the sphere.
    """
    if not len(tree):
        return np.zeros(len(radii), dtype=np.int64)
    middle = tree.points[0] if centre is None else np.asarray(centre, dtype=np.float64)
    edges = tree.edges
    a, b = tree.points[edges[:, 0]] - middle, tree.points[edges[:, 1]] - middle
    along = b - a
    square = (along * along).sum(axis=1)
    share = np.clip(-(a * along).sum(axis=1) / np.where(square > 0, square, 1.0), 0.0, 1.0)
    near = np.linalg.norm(a + share[:, None] * along, axis=1)
    from_, to = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    counts = [
        np.count_nonzero((from_ > r) != (to > r)) + 2 * np.count_nonzero((from_ > r) & (to > r) & (near < r))
        for r in radii
    ]
    return np.array(counts, dtype=np.int64)


@dataclass(frozen=True)
class _Pieces:
    """The connected pieces in which a tree is found in the other."""

    tree: NDArray[np.int64]  # [P] which of the tree's components
    others: NDArray[np.int64]  # [P] which of the other's components, by most of its nodes
    length: NDArray[np.float64]  # [P] cable, scaled
    long: NDArray[np.bool_]  # [P] longer than two tolerances

    @property
    def breaks(self) -> int:
        """Long pieces, less one per component of the tree that has any."""
        return int(self.long.sum()) - len(np.unique(self.tree[self.long]))


def _pieces(tree: Tree, other: Tree, tolerance: float, scale: tuple[float, float, float]) -> _Pieces:
    fine, guide = (morphology.resample_tree(t, tolerance / _STEPS) for t in (tree, other))
    found = Segments(other).distance(fine.points) <= tolerance
    fine, found = _from_found(fine, found)
    counterpart = np.asarray(cKDTree(guide.points).query(fine.points)[1])
    component, guide_component = morphology.label_components(fine), morphology.label_components(guide)

    above = np.full(len(fine), -1)  # nearest found node on the way up
    for node, parent in enumerate(fine.parents):
        if parent >= 0:
            above[node] = parent if found[parent] else above[parent]
    below = np.flatnonzero(found & (above >= 0))
    joined = np.zeros(len(fine), dtype=bool)
    joined[below] = _meet(guide.parents, counterpart[below], counterpart[above[below]])
    nearby = cKDTree(guide.points)
    for child in below[~joined[below]].tolist():
        joined[child] = _connected(fine, child, int(above[child]), guide, nearby, tolerance)

    piece = np.full(len(fine), -1)
    count = 0
    for place in np.flatnonzero(found).tolist():
        if joined[place]:
            piece[place] = piece[above[place]]
        else:
            piece[place], count = count, count + 1
    inside = found & joined & (above == fine.parents)  # an edge with both ends in one piece
    own = np.bincount(piece[inside], weights=morphology.edge_lengths(fine)[inside], minlength=count)
    scaled = morphology.edge_lengths(morphology.scale_tree(fine, scale))
    first = np.unique(piece[found], return_index=True)[1]
    votes = np.stack([piece[found], guide_component[counterpart[found]]], axis=1)
    return _Pieces(
        tree=component[found][first],
        others=_majority(votes, count),
        length=np.bincount(piece[inside], weights=scaled[inside], minlength=count).astype(np.float64),
        long=own > 2 * tolerance,
    )


def _from_found(tree: Tree, found: NDArray[np.bool_]) -> tuple[Tree, NDArray[np.bool_]]:
    """Each component rooted at a found node, where it has one, so that every other found node has one above it."""
    parents = tree.parents.copy()
    component = morphology.label_components(tree)
    has, first = np.unique(component[found], return_index=True)
    for start in np.flatnonzero(found)[first] if len(has) else ():
        above, here = -1, int(start)
        while here >= 0:
            parents[here], above, here = above, here, int(tree.parents[here])
    order = morphology.order_parents_first(parents)
    return morphology.build_tree(tree.points, parents, tree.radii, tree.types), found[order]


def _meet(parents: NDArray[np.int64], a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether nodes a and b have a common ancestor at most _HOPS up from both."""
    met = np.zeros(len(a), dtype=bool)
    from_a = a
    for _ in range(_HOPS + 1):
        from_b = b
        for _ in range(_HOPS + 1):
            met |= (from_a == from_b) & (from_a >= 0)
            from_b = np.where(from_b >= 0, parents[from_b], -1)
        from_a = np.where(from_a >= 0, parents[from_a], -1)
    return met


def _connected(fine: Tree, node: int, above: int, guide: Tree, nearby: cKDTree, tolerance: float) -> bool:
    """Whether `guide` connects the surroundings of two nodes by cable within 2 tolerances of the way between them."""
    way = [node]
    while way[-1] != above:
        way.append(int(fine.parents[way[-1]]))
    allowed = {i for p in fine.points[way] for i in nearby.query_ball_point(p, 2 * tolerance)}
    top: dict[int, int] = {}
    for i in sorted(allowed):  # parents first
        parent = int(guide.parents[i])
        top[i] = top.get(parent, i)
    ends = ({top[i] for i in nearby.query_ball_point(fine.points[end], tolerance * _WIDER)} for end in (node, above))
    return bool(set.intersection(*ends))


_WIDER = 1.0 + 1.0 / _STEPS  # found means near a segment; its nodes may be half a step farther


def _majority(votes: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """For each of `count` first numbers, the second number that stands beside it most often."""
    winner = np.full(count, -1)
    pairs, times = np.unique(votes, axis=0, return_counts=True)
    order = np.argsort(times, kind="stable")
    winner[pairs[order, 0]] = pairs[order, 1]
    return winner
