"""Tree against tree: the BigNeuron distances.

All lengths are in the trees' own unit; the two trees of a call share it. Published BigNeuron numbers are in voxels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import morphology
from hpc_neuro.core.morphology import Tree
from hpc_neuro.metrics.segments import Segments

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
