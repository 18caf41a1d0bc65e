"""Tree against tree: the BigNeuron distances, and precision and recall of cable at a tolerance.

All lengths are in the trees' own unit; the two trees of a call share it. Published BigNeuron numbers are in voxels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import morphology
from hpc_neuro.core.morphology import Tree
from hpc_neuro.metrics.segments import Segments, pieces

FAR = 2.0
"""A sample at least this far from the other tree counts as a different structure (Vaa3D's `d_thres`)."""


def distances(a: Tree, b: Tree, far: float = FAR) -> dict[str, float]:
    """ESA, DSA and PDS as Vaa3D's `neuron_distance` computes them; lower is better; symmetric in a and b.

    Every edge is sampled at int(1 + length + 0.5) points from child to parent, both ends included (a single point, the
    child, when that is 1), each with its distance to the nearest segment of the other tree.
    - esa: entire structure average, the mean of the two directed means
    - dsa: different structure average, the mean over samples at least `far` away, averaged over the directions that
      have any; 0 when none has
    - pds: share of different structure, the mean of the two shares of samples at least `far` away

    Where Vaa3D leaves the result open: a tree without any edge is sampled at its nodes; two empty trees agree
    (0, 0, 0); one empty tree is infinitely far (inf, inf, 1).
    Source: Peng et al. 2010, Nature Biotechnology 28:348, as released (double instead of single precision here).
    """
    if not len(a) or not len(b):
        return dict.fromkeys(("esa", "dsa", "pds"), 0.0) if len(a) == len(b) else _MISSING.copy()
    directed = [Segments(b).distance(samples(a)), Segments(a).distance(samples(b))]
    apart = [d[d >= far] for d in directed]
    means = [float(d.mean()) for d in apart if len(d)]
    return {
        "esa": float(np.mean([d.mean() for d in directed])),
        "dsa": float(np.mean(means)) if means else 0.0,
        "pds": float(np.mean([len(x) / len(d) for x, d in zip(apart, directed, strict=True)])),
    }


@dataclass(frozen=True)
class Match:
    """Agreement of cable at a tolerance. All but the two lengths are shares in [0, 1]."""

    precision: float  # share of the predicted cable that lies on the gold tree
    recall: float  # share of the gold cable that the prediction covers
    f1: float  # harmonic mean of the two, 0 when both are 0
    predicted_length: float  # cable that was judged, in the trees' unit
    gold_length: float


def match(predicted: Tree, gold: Tree, tolerance: float, step: float = 1.0) -> Match:
    """Precision, recall and F1 by cable length: both trees are cut into pieces no longer than `step`, and a piece
    agrees when its middle is at most `tolerance` from the nearest segment of the other tree.

    A tree without any edge counts its nodes. An empty prediction has precision 0 against a gold tree; two empty trees
    agree (1, 1, 1). Raises ValueError for a tolerance or step that is not positive.
    """
    if tolerance <= 0 or step <= 0:
        raise ValueError(f"tolerance {tolerance} and step {step} must both be above 0")
    lengths = morphology.length(predicted), morphology.length(gold)
    if not len(predicted) and not len(gold):
        return Match(1.0, 1.0, 1.0, *lengths)
    precision = _covered(predicted, gold, tolerance, step)
    recall = _covered(gold, predicted, tolerance, step)
    both = precision + recall
    return Match(precision, recall, 2 * precision * recall / both if both else 0.0, *lengths)


def without_stub(
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
    fine = morphology.resampled(predicted, tolerance / 4)
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
    return morphology.subset(rerooted, arm != int(lengths.argmax()))


def summary(tree: Tree) -> dict[str, float]:
    """Cable length (the tree's unit), number of tips and of branch points."""
    return {
        "length": morphology.length(tree),
        "tips": len(morphology.tips(tree)),
        "branch_points": len(morphology.branch_points(tree)),
    }


_MISSING = {"esa": float("inf"), "dsa": float("inf"), "pds": 1.0}


def samples(tree: Tree) -> NDArray[np.float64]:
    """The points at which Vaa3D samples a tree, [S, 3]."""
    edges = tree.edges
    if not len(edges):
        return tree.points
    child, parent = tree.points[edges[:, 0]], tree.points[edges[:, 1]]
    lengths = np.linalg.norm(parent - child, axis=1)
    counts = (1 + lengths + 0.5).astype(np.int64)
    edge = np.repeat(np.arange(len(edges)), counts)
    place = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts)
    share = (place / np.maximum(counts - 1, 1)[edge])[:, None]
    return np.asarray(child[edge] + share * (parent - child)[edge])


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
    return morphology.make(tree.points, parents, tree.radii, tree.types)


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
