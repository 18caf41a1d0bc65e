"""The chance that cable is right, from its confidence."""

from __future__ import annotations

import numpy as np
import pytest

from hpc_neuro.core.morphology import build_tree, empty_tree
from hpc_neuro.trace_stacks.calibration import INTERCEPT, SLOPE, calibrate, estimate_right_share


def test_the_chance_rises_with_the_confidence_and_stays_between_0_and_1() -> None:
    chances = calibrate(np.linspace(0, 1, 101))
    assert (np.diff(chances) >= 0).all()
    assert 0 < chances[0] < chances[50] < chances[100] < 1
    assert chances[50] == pytest.approx(1 / (1 + np.exp(-INTERCEPT)))
    # Without an intercept and with a slope of 1 a confidence is its own chance.
    np.testing.assert_allclose(calibrate(np.array([0.2, 0.7]), 0, 1), [0.2, 0.7])
    assert SLOPE > 0


def test_the_share_is_a_mean_over_cable() -> None:
    # 30 voxels of one confidence and 10 of another; the root has no edge.
    tree = build_tree(np.array([[0.0, 0, 0], [0, 0, 30], [0, 0, 40]]), np.array([-1, 0, 1]))
    confidence = np.array([0.0, 0.9, 0.3])
    expected = (3 * calibrate(confidence)[1] + calibrate(confidence)[2]) / 4
    assert estimate_right_share(tree, confidence) == pytest.approx(expected, abs=1e-3)
    assert estimate_right_share(empty_tree(), np.zeros(0)) is None
