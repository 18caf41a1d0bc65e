"""Is a confidence worth its number? What share of what was said with it is right (a reliability table)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core.morphology import Tree, edge_lengths, resample_tree
from hpc_neuro.metrics.segments import Segments

Floats = NDArray[np.float64]
BINS = 10


@dataclass(frozen=True)
class Bin:
    """The cable whose confidence lies in one of `BINS` equal parts of 0 to 1."""

    low: float
    high: float
    cable: float  # in the trees' unit
    confidence: float  # mean by cable
    right: float  # share of the cable that is near gold


def judged(tree: Tree, sure: Floats, gold: Tree, tolerance: float) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Pieces of at most 1 of a tree: [M] length, [M] confidence, [M] whether the middle is within `tolerance` of gold.

    `sure` [N] is the confidence on the edge from each node to its parent. Units are the trees'.
    """
    fine = resample_tree(tree, 1.0)
    parts = np.maximum(1, np.ceil(edge_lengths(tree) - 1e-9)).astype(np.int64)
    parts[tree.parents < 0] = 1
    owner = np.repeat(np.arange(len(tree)), parts)
    piece = fine.parents >= 0
    middle = (fine.points[piece] + fine.points[fine.parents[piece]]) / 2
    return edge_lengths(fine)[piece], sure[owner[piece]], Segments(gold).distance(middle) <= tolerance


def reliability(cable: Floats, sure: Floats, right: NDArray[np.bool_]) -> list[Bin]:
    """The bins that hold any cable, from the least confident up."""
    which = np.minimum((sure * BINS).astype(np.int64), BINS - 1)
    found = []
    for i in range(BINS):
        mine = (which == i) & (cable > 0)
        whole = float(cable[mine].sum())
        if whole > 0:
            mean = float((cable * sure)[mine].sum()) / whole
            found.append(Bin(i / BINS, (i + 1) / BINS, whole, mean, float(cable[mine & right].sum()) / whole))
    return found


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error (Naeini et al. 2015): mean of |right - confidence| over bins, weighted by cable."""
    whole = sum(b.cable for b in bins)
    return sum(b.cable * abs(b.right - b.confidence) for b in bins) / whole if whole else 0.0
