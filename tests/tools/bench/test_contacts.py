"""The table of crowds: means and the worst of each row, and a crowd that shares its volume."""

from __future__ import annotations

import numpy as np
import pytest

from hpc_neuro.metrics.cable import match_cable
from tools.bench import contacts
from tools.bench.contacts import Outcome, grow_crowd, summarize


def test_rows_state_means_and_the_worst_by_ratio_and_by_number() -> None:
    crowd = grow_crowd(0, 2)
    both = match_cable(contacts.concatenate_trees(crowd), crowd[0], 4.0)
    alone = match_cable(crowd[0], crowd[0], 4.0)
    outcomes = [Outcome(0.4, 2, "off", both), Outcome(0.4, 3, "off", alone), Outcome(0.4, 2, "on", alone)]

    off, on = summarize(outcomes, by_neurons=False)
    assert (off["ratio"], off["rule"], off["crowds"]) == (0.4, "off", 2)
    assert off["precision"] == pytest.approx((both.precision + 1) / 2, abs=1e-4)
    assert off["worst_precision"] == pytest.approx(both.precision, abs=1e-4)
    assert on["precision"] == on["recall"] == on["worst_recall"] == 1
    assert [(row["neurons"], row["rule"]) for row in summarize(outcomes, by_neurons=True)] == [
        (2, "off"),
        (2, "on"),
        (3, "off"),
    ]


def test_a_crowd_is_a_function_of_its_seed_and_keeps_clear_of_the_root() -> None:
    crowd, same = grow_crowd(1, 3), grow_crowd(1, 3)
    for tree, other in zip(crowd, same, strict=True):
        np.testing.assert_array_equal(tree.points, other.points)
    assert len(crowd) == 3
    scale = np.array(contacts.VOXEL) / contacts.VOXEL[1]
    for neighbor in crowd[1:]:
        assert np.linalg.norm((neighbor.points - crowd[0].points[0]) * scale, axis=1).min() > 24
