"""How a tree is connected compared with gold: splits, merges and expected run length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from hpc_neuro.core import morphology
from hpc_neuro.core.morphology import Tree
from hpc_neuro.metrics.metric import Comparison, Metric
from hpc_neuro.metrics.segments import SegmentIndex

_NODES_PER_TOLERANCE = 4
"""Nodes per tolerance along resampled cable."""
_WIDER = 1.0 + 1.0 / _NODES_PER_TOLERANCE
"""Factor on the tolerance when nodes stand for segments, whose nearest node may be half a step farther."""
_MAX_HOPS = 8
"""Edges up to a common ancestor within which two counterparts count as connected without a closer look."""


@dataclass(frozen=True)
class Topology:
    """Errors of connection, as a proofreader counts them."""

    splits: int
    """Missing connections: connected pieces in which the gold trees are found, less one per tree that is found."""
    merges: int
    """False connections: the same with exchanged roles, pieces of predicted cable that gold does not connect there."""
    expected_run_length: float
    """Expected length of correctly connected gold cable around a random point of it (Januszewski et al. 2018)."""


def compare_topology(
    predicted: Tree, gold: Tree, tolerance: float, scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> Topology:
    """Splits, merges and expected run length of trees in one unit; run lengths after multiplying z y x by `scale`.

    Cable counts as found when the other tree is within `tolerance`. Two neighboring found nodes are connected when the
    other tree connects them nearby: by cable that stays within 2 tolerances of the path between them. Pieces no longer
    than 2 tolerances (two neurites that cross, for example) count neither as splits nor as merges. A run that belongs
    to a predicted tree which also runs along another gold tree has length 0, as in the paper.
    """
    if not len(predicted) or not len(gold):
        return Topology(0, 0, 0.0)

    # A split is a break in gold cable; a merge is a break in predicted cable, seen from the other side.
    gold_pieces = _find_pieces(gold, predicted, tolerance, scale)
    predicted_pieces = _find_pieces(predicted, gold, tolerance, scale)

    # A run of a tree that joins two gold trees would have to be cut by hand, so it is worth nothing.
    runs = np.where(_is_unmerged(gold_pieces), gold_pieces.length, 0.0)
    total = morphology.length(morphology.scale_tree(gold, scale))
    run_length = float((runs**2).sum() / total) if total else 0.0

    return Topology(gold_pieces.count_breaks(), predicted_pieces.count_breaks(), run_length)


@dataclass(frozen=True)
class _Pieces:
    """The connected pieces of a tree that are found in the other tree."""

    component: NDArray[np.int64]  # [P] of the tree
    other_component: NDArray[np.int64]  # [P] of the other tree, by most of the piece's nodes
    length: NDArray[np.float64]  # [P] cable, scaled
    is_long: NDArray[np.bool_]  # [P] longer than two tolerances

    def count_breaks(self) -> int:
        """Long pieces, less one per component of the tree that has any."""
        return int(self.is_long.sum()) - len(np.unique(self.component[self.is_long]))


def _is_unmerged(pieces: _Pieces) -> NDArray[np.bool_]:
    """[P] whether the other tree's component of a piece has long pieces of one component of this tree at most."""
    # Short pieces do not count: two neurites that cross are near each other without being one.
    visited: dict[int, set[int]] = {}
    for own, other in zip(pieces.component[pieces.is_long], pieces.other_component[pieces.is_long], strict=True):
        visited.setdefault(int(other), set()).add(int(own))
    return np.array([len(visited.get(int(other), set())) <= 1 for other in pieces.other_component], dtype=bool)


@dataclass(frozen=True)
class _Overlap:
    """A resampled tree, each component rooted at a found node, beside the resampled other tree (the guide)."""

    fine: Tree
    guide: Tree
    is_found: NDArray[np.bool_]  # [N] whether the other tree is within the tolerance
    above: NDArray[np.int64]  # [N] the nearest found node on the way to the root, -1 for none
    counterpart: NDArray[np.int64]  # [N] the guide's nearest node


def _find_pieces(tree: Tree, other: Tree, tolerance: float, scale: tuple[float, float, float]) -> _Pieces:
    """Cut the part of `tree` that lies along `other` into pieces that `other` connects as well."""
    overlap = _overlay(tree, other, tolerance)
    is_joined = _find_joined(overlap, tolerance)
    piece, count = _number_pieces(overlap, is_joined)
    length, scaled_length = _measure_pieces(overlap, is_joined, piece, count, scale)

    # All nodes of a piece are of one component of this tree; of the other tree the majority decides.
    is_found = overlap.is_found
    first = np.unique(piece[is_found], return_index=True)[1]
    guide_component = morphology.label_components(overlap.guide)[overlap.counterpart[is_found]]

    return _Pieces(
        component=morphology.label_components(overlap.fine)[is_found][first],
        other_component=_find_majority(np.stack([piece[is_found], guide_component], axis=1), count),
        length=scaled_length,
        is_long=length > 2 * tolerance,
    )


def _overlay(tree: Tree, other: Tree, tolerance: float) -> _Overlap:
    # Cable is found or not at its nodes, so nodes must stand closer than the tolerance.
    fine, guide = (morphology.resample_tree(t, tolerance / _NODES_PER_TOLERANCE) for t in (tree, other))
    is_found = SegmentIndex(other).query(fine.points) <= tolerance
    fine, is_found = _reroot_at_found(fine, is_found)
    counterpart = np.asarray(cKDTree(guide.points).query(fine.points)[1])
    return _Overlap(fine, guide, is_found, _find_above(fine, is_found), counterpart)


def _reroot_at_found(tree: Tree, is_found: NDArray[np.bool_]) -> tuple[Tree, NDArray[np.bool_]]:
    """Root each component at a found node, where it has one, so that every other found node has one above it."""
    parents = tree.parents.copy()
    component = morphology.label_components(tree)
    _, first = np.unique(component[is_found], return_index=True)
    for start in np.flatnonzero(is_found)[first]:
        morphology.turn_path(parents, int(start))

    # `build_tree` sorts the nodes, and the flags must follow.
    order = morphology.order_parents_first(parents)

    return morphology.build_tree(tree.points, parents, tree.radii, tree.types), is_found[order]


def _find_above(tree: Tree, is_found: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[N] the nearest found node on the way to the root, -1 for none."""
    above = np.full(len(tree), -1)
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            above[node] = parent if is_found[parent] else above[parent]
    return above


def _find_joined(overlap: _Overlap, tolerance: float) -> NDArray[np.bool_]:
    """[N] whether the guide connects a found node with the found node above it."""
    guide, above, counterpart = overlap.guide, overlap.above, overlap.counterpart
    below = np.flatnonzero(overlap.is_found & (above >= 0))
    is_joined = np.zeros(len(overlap.fine), dtype=bool)

    # Neighbors nearly always have counterparts that meet after a few edges, which is quick to test for all at once.
    is_joined[below] = _share_ancestor(guide.parents, counterpart[below], counterpart[above[below]])

    # Few pairs are left, so a search through the guide around each is affordable.
    kd_tree = cKDTree(guide.points)
    for child in below[~is_joined[below]].tolist():
        is_joined[child] = _is_connected_nearby(overlap, child, kd_tree, tolerance)

    return is_joined


def _share_ancestor(parents: NDArray[np.int64], a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether nodes a and b have a common ancestor at most _MAX_HOPS up from both."""
    # Compare every ancestor of a with every ancestor of b, for all pairs of nodes at a time.
    is_shared = np.zeros(len(a), dtype=bool)
    from_a = a
    for _ in range(_MAX_HOPS + 1):
        from_b = b
        for _ in range(_MAX_HOPS + 1):
            is_shared |= (from_a == from_b) & (from_a >= 0)
            from_b = np.where(from_b >= 0, parents[from_b], -1)
        from_a = np.where(from_a >= 0, parents[from_a], -1)

    return is_shared


def _is_connected_nearby(overlap: _Overlap, node: int, kd_tree: cKDTree, tolerance: float) -> bool:
    """Whether the guide connects the surroundings of a node and of the found node above it.

    Only cable of the guide within 2 tolerances of the path between the two nodes counts.
    """
    fine, guide, above = overlap.fine, overlap.guide, int(overlap.above[node])
    path = [node]
    while path[-1] != above:
        path.append(int(fine.parents[path[-1]]))

    # Number the connected parts of the guide within reach by their topmost node; parents come before children.
    allowed = {i for p in fine.points[path] for i in kd_tree.query_ball_point(p, 2 * tolerance)}
    top: dict[int, int] = {}
    for i in sorted(allowed):
        top[i] = top.get(int(guide.parents[i]), i)

    # Connected, when one part of the guide reaches both ends.
    at_node, at_above = (
        {top[i] for i in kd_tree.query_ball_point(fine.points[end], tolerance * _WIDER)} for end in (node, above)
    )

    return bool(at_node & at_above)


def _number_pieces(overlap: _Overlap, is_joined: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int]:
    """[N] number of the piece of each found node, -1 elsewhere, and how many pieces there are."""
    # The found node above comes first in the order, so its piece is known.
    piece = np.full(len(overlap.fine), -1)
    count = 0
    for node in np.flatnonzero(overlap.is_found).tolist():
        if is_joined[node]:
            piece[node] = piece[overlap.above[node]]
        else:
            piece[node], count = count, count + 1

    return piece, count


def _measure_pieces(
    overlap: _Overlap,
    is_joined: NDArray[np.bool_],
    piece: NDArray[np.int64],
    count: int,
    scale: tuple[float, float, float],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[P] cable of each piece in the trees' unit, and [P] after multiplying z y x by `scale`."""
    # Only an edge with both ends in one piece is cable of that piece.
    is_inside = overlap.is_found & is_joined & (overlap.above == overlap.fine.parents)
    lengths = (morphology.edge_lengths(t) for t in (overlap.fine, morphology.scale_tree(overlap.fine, scale)))
    plain, scaled = (np.bincount(piece[is_inside], weights=length[is_inside], minlength=count) for length in lengths)
    return plain.astype(np.float64), scaled.astype(np.float64)


def _find_majority(votes: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """For each of `count` first numbers of `votes` [V, 2], the second number that stands beside it most often."""
    # Sorted by how often they occur, the most frequent pair of each first number is written last and stays.
    winner = np.full(count, -1)
    pairs, times = np.unique(votes, axis=0, return_counts=True)
    order = np.argsort(times, kind="stable")
    winner[pairs[order, 0]] = pairs[order, 1]
    return winner


def _compare(comparison: Comparison) -> Topology:
    return compare_topology(
        comparison.predicted_tree, comparison.gold_tree, comparison.tolerance_vox, comparison.voxel_size
    )


METRICS = (
    Metric(
        key="splits",
        title="Splits",
        unit="",
        direction="lower",
        digits=0,
        definition=(
            "Missing connections: connected pieces in which the gold tree is found, less one. Pieces up to twice the "
            "tolerance do not count, nor does a detour within twice the tolerance."
        ),
        compute=lambda comparison: comparison.once(_compare).splits,
    ),
    Metric(
        key="merges",
        title="Merges",
        unit="",
        direction="lower",
        digits=0,
        definition="False connections: the same with the roles of the two trees exchanged.",
        compute=lambda comparison: comparison.once(_compare).merges,
    ),
    Metric(
        key="expected_run_length_um",
        title="Expected run length",
        unit="µm",
        direction="higher",
        digits=0,
        definition=(
            "Expected length of correctly connected cable around a random point of the gold tree (Januszewski et al. "
            "2018): sum of squared lengths of the pieces over the gold cable."
        ),
        compute=lambda comparison: comparison.once(_compare).expected_run_length,
    ),
)
