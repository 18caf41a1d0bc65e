"""Tree against tree: the BigNeuron distances, and what describes a tree alone.

All lengths are in the trees' own unit; the two trees of a call share it. Published BigNeuron numbers are in voxels.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import morphology
from hpc_neuro.core.morphology import Tree
from hpc_neuro.metrics.cable import drop_stub
from hpc_neuro.metrics.metric import Comparison, Metric
from hpc_neuro.metrics.segments import SegmentIndex

FAR = 2.0
"""A sample at least this far from the other tree counts as a different structure (Vaa3D's `d_thres`)."""

_SOMA = 1
"""SWC type of a soma."""

_ONE_EMPTY = {"esa": math.inf, "dsa": math.inf, "pds": 1.0}
"""Distances when exactly one tree is empty."""


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
    if not len(a) and not len(b):
        return dict.fromkeys(_ONE_EMPTY, 0.0)
    if not len(a) or not len(b):
        return _ONE_EMPTY.copy()

    # Both directions: one alone would not see cable that only the other tree has.
    directed = [SegmentIndex(b).query(sample_tree(a)), SegmentIndex(a).query(sample_tree(b))]
    different = [d[d >= far] for d in directed]

    # A direction without distant samples has no mean; Vaa3D averages the others.
    means = [float(d.mean()) for d in different if len(d)]
    shares = [len(apart) / len(d) for apart, d in zip(different, directed, strict=True)]

    return {
        "esa": float(np.mean([d.mean() for d in directed])),
        "dsa": float(np.mean(means)) if means else 0.0,
        "pds": float(np.mean(shares)),
    }


def drop_soma_outline(tree: Tree) -> Tree:
    """The tree without the points that only outline a soma, such as the second and third of a three-point soma.

    These are nodes of SWC type 1 below another one from which no neurite leaves. They are no tips. A tree that has no
    nodes of other types stays as it is.
    """
    is_soma = tree.types == _SOMA
    has_neurite = ~is_soma

    # Children come after their parents, so one pass backwards tells what hangs below each node.
    for node in range(len(tree) - 1, -1, -1):
        parent = tree.parents[node]
        if parent >= 0:
            has_neurite[parent] |= has_neurite[node]

    # A root stays, whatever its type: the tree hangs on it.
    component = morphology.label_components(tree)
    is_child_of_soma = (tree.parents >= 0) & is_soma[tree.parents]
    is_outline = is_soma & ~has_neurite & is_child_of_soma & has_neurite[tree.roots][component]

    return morphology.select_nodes(tree, ~is_outline) if is_outline.any() else tree


def sample_tree(tree: Tree) -> NDArray[np.float64]:
    """The points at which Vaa3D samples a tree, [S, 3]."""
    edges = tree.edges
    if not len(edges):
        return tree.points

    # The cast truncates, which is Vaa3D's rounding.
    child, parent = tree.points[edges[:, 0]], tree.points[edges[:, 1]]
    counts = (1 + np.linalg.norm(parent - child, axis=1) + 0.5).astype(np.int64)

    # Number the samples of each edge from 0 at the child to counts - 1 at the parent.
    edge = np.repeat(np.arange(len(edges)), counts)
    number = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts)
    share = (number / np.maximum(counts - 1, 1)[edge])[:, None]

    return np.asarray(child[edge] + share * (parent - child)[edge])


def _measure_distances(comparison: Comparison) -> dict[str, float]:
    return _make_finite(distances(comparison.predicted_tree, comparison.gold_tree), comparison)


def _measure_distances_without_stub(comparison: Comparison) -> dict[str, float]:
    return _make_finite(distances(comparison.once(drop_stub), comparison.gold_tree), comparison)


def _make_finite(values: dict[str, float], comparison: Comparison) -> dict[str, float]:
    """Put the diagonal of the volume in place of an infinite distance, so that a miss stays in the mean."""
    return {key: value if math.isfinite(value) else comparison.diagonal_vox for key, value in values.items()}


def _drop_soma_outline(comparison: Comparison) -> Tree:
    return drop_soma_outline(comparison.predicted_tree)


def _scale_to_um(comparison: Comparison) -> Tree:
    return morphology.scale_tree(comparison.predicted_tree, comparison.voxel_size)


METRICS = (
    Metric(
        key="esa",
        title="ESA",
        unit="voxel",
        direction="lower",
        digits=2,
        definition=(
            "Entire structure average, by the rule of Vaa3D's neuron_distance (Peng et al. 2010): mean distance from "
            "samples about one voxel apart to the nearest segment of the other tree, mean of both directions. No tree: "
            "the volume's diagonal."
        ),
        compute=lambda comparison: comparison.once(_measure_distances)["esa"],
        main=True,
    ),
    Metric(
        key="dsa",
        title="DSA",
        unit="voxel",
        direction="lower",
        digits=2,
        definition=(
            "Different structure average: the same over samples at least 2 voxels away; 0 when there are none."
        ),
        compute=lambda comparison: comparison.once(_measure_distances)["dsa"],
    ),
    Metric(
        key="pds",
        title="PDS",
        unit="",
        direction="lower",
        digits=3,
        definition=("Share of different structure: of samples at least 2 voxels away, mean of both directions."),
        compute=lambda comparison: comparison.once(_measure_distances)["pds"],
    ),
    Metric(
        key="esa_no_stub",
        title="ESA, no stub",
        unit="voxel",
        direction="lower",
        digits=2,
        definition="ESA without the arm before the root.",
        compute=lambda comparison: comparison.once(_measure_distances_without_stub)["esa"],
    ),
    Metric(
        key="dsa_no_stub",
        title="DSA, no stub",
        unit="voxel",
        direction="lower",
        digits=2,
        definition="DSA without the arm before the root.",
        compute=lambda comparison: comparison.once(_measure_distances_without_stub)["dsa"],
    ),
    Metric(
        key="pds_no_stub",
        title="PDS, no stub",
        unit="",
        direction="lower",
        digits=3,
        definition="PDS without the arm before the root.",
        compute=lambda comparison: comparison.once(_measure_distances_without_stub)["pds"],
    ),
    Metric(
        key="tree_missed",
        title="Tree missed",
        unit="",
        direction="lower",
        digits=0,
        definition="1 where nothing was traced.",
        compute=lambda comparison: float(not len(comparison.predicted_tree)),
    ),
    Metric(
        key="length_um",
        title="Cable",
        unit="µm",
        direction="",
        digits=0,
        definition="Cable length: sum of the edges' lengths.",
        compute=lambda comparison: morphology.length(comparison.once(_scale_to_um)),
        main=True,
    ),
    Metric(
        key="tips",
        title="Tips",
        unit="",
        direction="",
        digits=0,
        definition="End points: nodes without children. Points that only outline a soma do not count.",
        compute=lambda comparison: len(morphology.tips(comparison.once(_drop_soma_outline))),
        main=True,
    ),
    Metric(
        key="branch_points",
        title="Branch points",
        unit="",
        direction="",
        digits=0,
        definition="Nodes with two or more children (a root: three or more), without points that only outline a soma.",
        compute=lambda comparison: len(morphology.branch_points(comparison.once(_drop_soma_outline))),
        main=True,
    ),
)
