"""Reliability of a confidence: counted by hand, and blind to how an edge is cut."""

from __future__ import annotations

import numpy as np
import pytest

from hpc_neuro.core.morphology import build_tree
from hpc_neuro.metrics.calibration import calibration_error, judged, reliability


def test_a_table_by_hand() -> None:
    cable, sure = np.array([2.0, 1.0, 3.0, 4.0, 0.0]), np.array([0.95, 1.0, 0.91, 0.2, 0.5])
    bins = reliability(cable, sure, np.array([True, False, True, True, True]))
    assert [(b.low, b.high, b.cable) for b in bins] == [(0.2, 0.3, 4.0), (0.9, 1.0, 6.0)]
    assert bins[0].right == 1.0
    assert bins[1].right == pytest.approx(5 / 6)
    assert bins[1].confidence == pytest.approx((2 * 0.95 + 1 + 3 * 0.91) / 6)
    wanted = 0.4 * 0.8 + 0.6 * abs(5 / 6 - bins[1].confidence)
    assert calibration_error(bins) == pytest.approx(wanted)
    assert calibration_error([]) == 0


def test_cable_is_judged_piece_by_piece_with_the_confidence_of_its_edge() -> None:
    """Half of a long edge lies on gold; a doubtful edge lies off it."""
    tree = build_tree(np.array([[0, 0, 0], [0, 0, 20], [0, 9, 20], [0, 0, 0], [0, 0, 4]]), np.array([-1, 0, 1, -1, 3]))
    gold = build_tree(np.array([[0, 0, 0], [0, 0, 10]]), np.array([-1, 0]))
    cable, sure, right = judged(tree, np.array([1.0, 0.9, 0.3, 1.0, 0.7]), gold, 2.0)
    assert cable.sum() == pytest.approx(20 + 9 + 4)
    assert cable[sure == 0.9].sum() == pytest.approx(20)
    assert cable[(sure == 0.9) & right].sum() == pytest.approx(12)
    assert not right[sure == 0.3].any()
    assert right[sure == 0.7].all()


def test_a_confidence_that_is_the_chance_of_being_right_is_calibrated() -> None:
    draw = np.random.default_rng(0)
    sure = draw.random(40_000)
    bins = reliability(np.ones(40_000), sure, draw.random(40_000) < sure)
    assert len(bins) == 10
    assert calibration_error(bins) < 0.02
    assert calibration_error(reliability(np.ones(40_000), sure**3, draw.random(40_000) < sure)) > 0.15
