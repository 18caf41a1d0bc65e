"""Precision and recall of traced cable at a tolerance.

All lengths are in the trees' own unit; the two trees of a call share it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import morphology
from hpc_neuro.core.morphology import Tree
from hpc_neuro.metrics.segments import Segments, pieces


@dataclass(frozen=True)
class CableMatch:
    """Agreement of cable at a tolerance. All but the two lengths are shares in [0, 1]."""

    precision: float  # share of the predicted cable that lies on the gold tree
    recall: float  # share of the gold cable that the prediction covers
    f1: float  # harmonic mean of the two, 0 when both are 0
    predicted_length: float  # cable that was judged, in the trees' unit
    gold_length: float


def match_cable(predicted: Tree, gold: Tree, tolerance: float, step: float = 1.0) -> CableMatch:
    """Precision, recall and F1 by cable length: both trees are cut into pieces no longer than `step`, and a piece
    agrees when its middle is at most `tolerance` from the nearest segment of the other tree.

    A tree without any edge counts its nodes. An empty prediction has precision 0 against a gold tree; two empty trees
    agree (1, 1, 1). Raises ValueError for a tolerance or step that is not positive.
    """
    if tolerance <= 0 or step <= 0:
        raise ValueError(f"tolerance {tolerance} and step {step} must both be above 0")
    lengths = morphology.length(predicted), morphology.length(gold)
    if not len(predicted) and not len(gold):
        return CableMatch(1.0, 1.0, 1.0, *lengths)
    precision = _covered(predicted, gold, tolerance, step)
    recall = _covered(gold, predicted, tolerance, step)
    both = precision + recall
    return CableMatch(precision, recall, 2 * precision * recall / both if both else 0.0, *lengths)


def remove_stub(
    predicted: Tree,
    gold: Tree,
    tolerance: float,
    root: tuple[float, float, float] | None = None,
    reach: float | None = None,
) -> Tree:
    """`predicted` less the neurite that leads up to the gold root.

    Gold trees often begin part way along a neurite that the image shows further back (DIADEM OP_3, OP_7); a tracer that
    follows it back is right about the image and wrong about the tree. What is dropped, and nothing else:
    1. take the predicted node nearest the gold root (`root`; by default the first root of `gold`); it must lie within
       `tolerance` of it;
    2. from there follow the cable outwards to where it leaves the ball of radius `reach` (default: 2 tolerances) around
       the gold root: each crossing begins an arm, with all that hangs on it;
    3. of the arms of which no point lies within `tolerance` of the gold tree, the longest is dropped: a neuron has one
       proximal neurite, so a second false arm stays an error.
    An arm that meets the gold tree anywhere stays. Edges are cut to at most a quarter of `tolerance` first.
    """
    if not len(predicted) or not len(gold):
        return predicted
    reach = 2 * tolerance if reach is None else reach
    fine = morphology.resample_tree(predicted, tolerance / 4)
    centre = gold.points[gold.roots[0]] if root is None else np.asarray(root, dtype=np.float64)
    away = np.linalg.norm(fine.points - centre, axis=1)
    seed = int(away.argmin())
    if away[seed] > tolerance:
        return predicted
    rerooted = _rerooted(fine, seed)
    away = np.linalg.norm(rerooted.points - centre, axis=1)
    seed = int(rerooted.roots[away[rerooted.roots].argmin()])
    arm = _arms(rerooted, seed, away <= reach)
    step = morphology.edge_lengths(rerooted)
    inside = arm >= 0
    on_gold = Segments(gold).distance(rerooted.points) <= tolerance
    count = int(arm.max(initial=-1)) + 1
    lengths = np.bincount(arm[inside], weights=step[inside], minlength=count)
    lengths[np.bincount(arm[inside & on_gold], minlength=count) > 0] = 0.0
    if not len(lengths) or lengths.max() == 0.0:
        return predicted
    return morphology.select_nodes(rerooted, arm != int(lengths.argmax()))


def _covered(tree: Tree, other: Tree, tolerance: float, step: float) -> float:
    """Share of `tree`'s cable within `tolerance` of `other`; 0 for an empty tree."""
    middles, lengths = pieces(tree, step)
    total = lengths.sum()
    if total == 0.0:  # edges of no length: every piece counts the same
        lengths, total = np.ones(len(lengths)), float(len(lengths))
    return float(lengths[Segments(other).distance(middles) <= tolerance].sum() / total) if total else 0.0


def _rerooted(tree: Tree, node: int) -> Tree:
    """The same tree with the path from `node` up to its root turned round."""
    parents = tree.parents.copy()
    above, here = -1, node
    while here >= 0:
        parents[here], above, here = above, here, int(tree.parents[here])
    return morphology.build_tree(tree.points, parents, tree.radii, tree.types)


def _arms(tree: Tree, seed: int, near: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[N] number of the arm a node belongs to, -1 for none. An arm begins at the first node outside `near` on a way out
    from `seed` (a root), and holds all nodes below it."""
    arm = np.full(len(tree), -1, dtype=np.int64)
    rooted = np.zeros(len(tree), dtype=bool)  # reached from the seed without leaving `near`
    rooted[seed] = True
    count = 0
    for node, parent in enumerate(tree.parents):
        if parent < 0:
            continue
        if arm[parent] >= 0:
            arm[node] = arm[parent]
        elif rooted[parent]:
            if near[node]:
                rooted[node] = True
            else:
                arm[node], count = count, count + 1
    return arm
