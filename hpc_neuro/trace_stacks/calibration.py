"""How likely cable is right, from the confidence of `trace`: calibrated on neurons whose tree is known.

The confidence of an edge is the lowest probability along it, 0.5 where the foreground reaches its level. It is no
chance of being right: cable on dim foreground is right nearly as often as on bright one. Platt's scaling (1999) turns
the one into the other, with two numbers (`python -m tools.bench.trace_confidence STORE`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import morphology
from hpc_neuro.core.morphology import Tree
from hpc_neuro.metrics.metric import divide

INTERCEPT = 1.63
"""[log odds] Of being right, at a confidence of 0.5."""
SLOPE = 0.50
"""[log odds of being right per log odds of the confidence]"""
_LEAST = 0.01
"""Confidence below which, and below whose rest, nothing was measured."""
Floats = NDArray[np.float64]


def compute_log_odds(confidence: Floats) -> Floats:
    """Log odds of a confidence, between those of `_LEAST` and of its rest."""
    inside = np.clip(np.asarray(confidence, dtype=np.float64), _LEAST, 1 - _LEAST)
    return np.asarray(np.log(inside / (1 - inside)))


def calibrate(confidence: Floats, intercept: float = INTERCEPT, slope: float = SLOPE) -> Floats:
    """Chance that cable of a confidence lies within 4 voxels of the true tree; any shape."""
    return np.asarray(1 / (1 + np.exp(-(intercept + slope * compute_log_odds(confidence)))))


def estimate_right_share(tree: Tree, confidence: Floats) -> float | None:
    """Share of the cable of a tree that is right, as expected from its confidence [N]; None without cable."""
    lengths = morphology.edge_lengths(tree)
    if not lengths.sum() > 0:
        return None
    return round(divide(float((lengths * calibrate(confidence)).sum()), float(lengths.sum()), empty=0.0), 3)
