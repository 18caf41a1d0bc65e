"""Precision, recall and F1 of traced cable at a tolerance.

All lengths are in the trees' own unit; the two trees of a call share it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import morphology
from hpc_neuro.core.morphology import Tree
from hpc_neuro.metrics.metric import Comparison, Metric, Tolerance, harmonic_mean
from hpc_neuro.metrics.segments import SegmentIndex, cut_cable


@dataclass(frozen=True)
class CableMatch:
    """Agreement of cable at a tolerance."""

    precision: float
    """Share of the predicted cable that lies on the gold tree."""
    recall: float
    """Share of the gold cable that the prediction covers."""
    f1: float
    """Harmonic mean of the two, 0 when both are 0."""
    predicted_length: float
    """Predicted cable, in the trees' unit."""
    gold_length: float


def match_cable(predicted: Tree, gold: Tree, tolerance: float, step: float = 1.0) -> CableMatch:
    """Precision, recall and F1 by cable length.

    Both trees are cut into pieces no longer than `step`; a piece agrees when its middle is at most `tolerance` from the
    nearest segment of the other tree. A tree without any edge counts its nodes. An empty prediction has precision 0
    against a gold tree; two empty trees agree (1, 1, 1). Raises ValueError unless `tolerance` and `step` are positive.
    """
    if tolerance <= 0 or step <= 0:
        raise ValueError(f"tolerance {tolerance} and step {step} must both be above 0")

    # Nothing to find and nothing found is agreement.
    lengths = morphology.length(predicted), morphology.length(gold)
    if not len(predicted) and not len(gold):
        return CableMatch(1.0, 1.0, 1.0, *lengths)

    precision = _measure_coverage(predicted, gold, tolerance, step)
    recall = _measure_coverage(gold, predicted, tolerance, step)

    return CableMatch(precision, recall, harmonic_mean(precision, recall), *lengths)


def _measure_coverage(tree: Tree, other: Tree, tolerance: float, step: float) -> float:
    """Share of the cable of `tree` within `tolerance` of `other`; 0 for an empty tree."""
    middles, lengths = cut_cable(tree, step)
    total = lengths.sum()

    # Where all edges have length 0, every piece counts the same.
    if total == 0.0:
        lengths, total = np.ones(len(lengths)), float(len(lengths))
    if not total:
        return 0.0

    return float(lengths[SegmentIndex(other).query(middles) <= tolerance].sum() / total)


def remove_stub(
    predicted: Tree,
    gold: Tree,
    tolerance: float,
    root: tuple[float, float, float] | None = None,
    reach: float | None = None,
) -> Tree:
    """`predicted` without the neurite that leads up to the gold root.

    Gold trees often begin part way along a neurite that the image shows further back (DIADEM OP_3, OP_7); a tracer that
    follows it back is right about the image and wrong about the tree. Exactly one arm is removed:
    1. take the predicted node nearest the gold root (`root`; by default the first root of `gold`); it must lie within
       `tolerance` of it;
    2. from there follow the cable outwards to where it leaves the ball of radius `reach` (default: 2 tolerances) around
       the gold root: each crossing begins an arm, with all that hangs on it;
    3. of the arms of which no point lies within `tolerance` of the gold tree, the longest is removed: a neuron has one
       proximal neurite, so a second false arm stays an error.
    An arm that meets the gold tree anywhere stays. Edges are cut to at most a quarter of `tolerance` first.
    """
    if not len(predicted) or not len(gold):
        return predicted

    # Cut edges short, so that the place where an arm leaves the ball is exact to a quarter of the tolerance.
    reach = 2 * tolerance if reach is None else reach
    center = gold.points[gold.roots[0]] if root is None else np.asarray(root, dtype=np.float64)
    rerooted = _reroot_near(morphology.resample_tree(predicted, tolerance / 4), center, tolerance)
    if rerooted is None:
        return predicted

    # From the node at the gold root, every arm leads outwards.
    distance = np.linalg.norm(rerooted.points - center, axis=1)
    seed = int(rerooted.roots[distance[rerooted.roots].argmin()])
    arm = _number_arms(rerooted, seed, distance <= reach)

    # Remove the longest false arm, if there is one.
    lengths = _measure_false_arms(rerooted, gold, arm, tolerance)
    if not len(lengths) or lengths.max() == 0.0:
        return predicted

    return morphology.select_nodes(rerooted, arm != int(lengths.argmax()))


def _reroot_near(tree: Tree, center: NDArray[np.float64], tolerance: float) -> Tree | None:
    """The tree rooted at its node nearest `center`, its edges turned; None when that is beyond `tolerance`."""
    distance = np.linalg.norm(tree.points - center, axis=1)
    nearest = int(distance.argmin())
    if distance[nearest] > tolerance:
        return None

    return morphology.reroot(tree, nearest)


def _number_arms(tree: Tree, seed: int, is_near: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[N] number of the arm a node belongs to, -1 for none.

    An arm begins at the first node outside `is_near` on a path away from `seed` (a root), and holds all nodes below it.
    """
    arm = np.full(len(tree), -1, dtype=np.int64)
    is_inside = np.zeros(len(tree), dtype=bool)  # reached from the seed without leaving `is_near`
    is_inside[seed] = True

    # Parents come before their children, so the state of the parent is known.
    count = 0
    for node, parent in enumerate(tree.parents):
        if parent < 0:
            continue
        if arm[parent] >= 0:
            arm[node] = arm[parent]
        elif is_inside[parent] and is_near[node]:
            is_inside[node] = True
        elif is_inside[parent]:
            arm[node], count = count, count + 1

    return arm


def _measure_false_arms(tree: Tree, gold: Tree, arm: NDArray[np.int64], tolerance: float) -> NDArray[np.float64]:
    """[A] cable of each arm that nowhere comes within `tolerance` of gold; 0 for the other arms."""
    count = int(arm.max(initial=-1)) + 1
    in_arm = arm >= 0
    is_on_gold = SegmentIndex(gold).query(tree.points) <= tolerance

    weights = morphology.edge_lengths(tree)[in_arm]
    lengths = np.bincount(arm[in_arm], weights=weights, minlength=count).astype(np.float64)

    # One node on gold makes the whole arm a neurite of the gold tree.
    lengths[np.bincount(arm[in_arm & is_on_gold], minlength=count) > 0] = 0.0

    return lengths


def drop_stub(comparison: Comparison) -> Tree:
    """The predicted tree of a comparison without the stub before the gold root."""
    return remove_stub(comparison.predicted_tree, comparison.gold_tree, comparison.tolerance_vox, comparison.root)


def _match_voxels(comparison: Comparison) -> CableMatch:
    return match_cable(comparison.predicted_tree, comparison.gold_tree, comparison.tolerance_vox)


def _match_voxels_without_stub(comparison: Comparison) -> CableMatch:
    return match_cable(comparison.once(drop_stub), comparison.gold_tree, comparison.tolerance_vox)


def _match_um(comparison: Comparison) -> CableMatch:
    """Agreement at the tolerance in um, in pieces of at most a quarter of it."""
    # Only `list_metrics_at` a tolerance in um asks for this, and it needs that tolerance.
    tolerance = comparison.tolerance_um
    if tolerance is None:
        raise ValueError("metrics at a tolerance in um need a comparison with `tolerance_um`")
    predicted, gold = (
        morphology.scale_tree(t, comparison.voxel_size) for t in (comparison.predicted_tree, comparison.gold_tree)
    )

    return match_cable(predicted, gold, tolerance, step=min(1.0, tolerance / 4))


def list_metrics_at(tolerance: Tolerance) -> list[Metric]:
    """Precision, recall and F1 at a tolerance; at one in voxels also without the stub before the gold root."""
    # The tolerance in um is beside the one in voxels, which the first table shows.
    if tolerance.unit == "um":
        return [replace(metric, main=False) for metric in _list_matches(tolerance, _match_um)]
    return [*_list_matches(tolerance, _match_voxels), *_list_matches_without_stub(tolerance)]


def _list_matches(tolerance: Tolerance, match: Callable[[Comparison], CableMatch]) -> list[Metric]:
    return [
        Metric(
            key=tolerance.key("precision"),
            title=f"Precision @ {tolerance.text}",
            unit="",
            direction="higher",
            digits=3,
            definition=(
                f"Share of the traced cable within {tolerance.text} of the gold tree (nearest segment, pieces of at "
                f"most 1 {tolerance.unit_name})."
            ),
            compute=lambda comparison: comparison.once(match).precision,
            main=True,
        ),
        Metric(
            key=tolerance.key("recall"),
            title=f"Recall @ {tolerance.text}",
            unit="",
            direction="higher",
            digits=3,
            definition=f"Share of the gold cable within {tolerance.text} of the traced tree.",
            compute=lambda comparison: comparison.once(match).recall,
            main=True,
        ),
        Metric(
            key=tolerance.key("f1"),
            title=f"F1 @ {tolerance.text}",
            unit="",
            direction="higher",
            digits=3,
            definition=(
                "Harmonic mean of the two. Everything that was traced counts, also a neurite before the gold root."
            ),
            compute=lambda comparison: comparison.once(match).f1,
            main=True,
        ),
    ]


def _list_matches_without_stub(tolerance: Tolerance) -> list[Metric]:
    return [
        Metric(
            key=tolerance.key("precision") + "_no_stub",
            title="Precision, no stub",
            unit="",
            direction="higher",
            digits=3,
            definition=(
                "The same without the longest traced arm that leaves the root and nowhere meets the gold tree: gold "
                "trees often begin part way along a neurite that the image shows further back."
            ),
            compute=lambda comparison: comparison.once(_match_voxels_without_stub).precision,
        ),
        Metric(
            key=tolerance.key("f1") + "_no_stub",
            title="F1, no stub",
            unit="",
            direction="higher",
            digits=3,
            definition="F1 with that precision; recall does not change.",
            compute=lambda comparison: comparison.once(_match_voxels_without_stub).f1,
        ),
    ]
