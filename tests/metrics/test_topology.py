"""Splits, merges and expected run length on trees drawn by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_neuro.core import morphology
from hpc_neuro.core.morphology import Tree
from hpc_neuro.metrics.topology import Topology, compare_topology

TOLERANCE = 4.0


def make(points: list[tuple[float, float, float]], parents: list[int]) -> Tree:
    return morphology.build_tree(np.array(points, dtype=float), np.array(parents))


def y_shape() -> Tree:
    """A stem of 50 and two branches of 50: a gold tree of 150."""
    return make([(0, 0, 0), (0, 0, 50), (0, 40, 80), (0, -40, 80)], [-1, 0, 1, 1])


def test_the_same_tree_has_no_errors() -> None:
    for tree in (y_shape(), replace(y_shape(), points=y_shape().points + 1.5)):
        result = compare_topology(tree, y_shape(), TOLERANCE)
        assert (result.splits, result.merges) == (0, 0)
        assert result.expected_run_length == pytest.approx(150, rel=0.02)


def test_rooted_elsewhere_makes_no_difference() -> None:
    turned = make([(0, -40, 80), (0, 0, 50), (0, 40, 80), (0, 0, 0)], [-1, 0, 1, 1])
    result = compare_topology(turned, y_shape(), TOLERANCE)
    assert (result.splits, result.merges) == (0, 0)


def test_a_gap_is_a_split() -> None:
    gold = make([(0, 0, 0), (0, 0, 100)], [-1, 0])
    broken = make([(0, 0, 0), (0, 0, 40), (0, 0, 60), (0, 0, 100)], [-1, 0, -1, 2])
    result = compare_topology(broken, gold, TOLERANCE)
    assert (result.splits, result.merges) == (1, 0)

    # Gold is found to a tolerance beyond the ends of the prediction.
    assert result.expected_run_length == pytest.approx((44**2 + 44**2) / 100, rel=0.05)


def test_a_missed_end_is_no_split_and_shortens_the_run() -> None:
    gold = make([(0, 0, 0), (0, 0, 100)], [-1, 0])
    result = compare_topology(make([(0, 0, 0), (0, 0, 46)], [-1, 0]), gold, TOLERANCE)
    assert (result.splits, result.merges) == (0, 0)
    assert result.expected_run_length == pytest.approx(50**2 / 100, rel=0.05)


def test_a_detour_is_no_split() -> None:
    gold = make([(0, 0, 0), (0, 0, 100)], [-1, 0])
    wavy = make([(0, 0, 0), (0, 0, 40), (0, 7, 50), (0, 0, 60), (0, 0, 100)], [-1, 0, 1, 2, 3])
    assert compare_topology(wavy, gold, TOLERANCE).splits == 0


def test_a_false_bridge_inside_one_neuron_is_a_split_and_a_merge() -> None:
    """The far branch hangs on the tip of the near one instead of on the stem."""
    gold = make([(0, 0, 0), (0, 0, 60), (0, 60, 60), (0, 0, 30), (0, 60, 30)], [-1, 3, 1, 0, 3])
    wrong = make([(0, 0, 0), (0, 0, 60), (0, 60, 60), (0, 60, 30), (0, 20, 30)], [-1, 0, 1, 2, 3])
    result = compare_topology(wrong, gold, TOLERANCE)
    assert (result.splits, result.merges) == (1, 1)


def test_a_merger_of_two_neurons_voids_their_runs() -> None:
    two = make([(0, 0, 0), (0, 0, 100), (0, 50, 0), (0, 50, 100)], [-1, 0, -1, 2])
    joined = make([(0, 0, 0), (0, 0, 100), (0, 50, 100), (0, 50, 0)], [-1, 0, 1, 2])
    result = compare_topology(joined, two, TOLERANCE)
    assert (result.splits, result.merges, result.expected_run_length) == (0, 1, 0.0)
    right = compare_topology(two, two, TOLERANCE)
    assert (right.splits, right.merges) == (0, 0)
    assert right.expected_run_length == pytest.approx(2 * 100**2 / 200, rel=0.01)


def test_crossing_neurites_are_no_pieces() -> None:
    gold = make([(0, 0, 0), (0, 0, 100)], [-1, 0])
    crossing = make([(0, -60, 30), (0, 60, 30)], [-1, 0])
    result = compare_topology(crossing, gold, TOLERANCE)
    assert (result.splits, result.merges) == (0, 0)


def test_lengths_are_scaled() -> None:
    gold = make([(0, 0, 0), (0, 0, 100)], [-1, 0])
    assert compare_topology(gold, gold, TOLERANCE, (1.0, 0.5, 0.25)).expected_run_length == pytest.approx(25)


def test_empty_trees() -> None:
    assert compare_topology(morphology.empty_tree(), y_shape(), TOLERANCE) == Topology(0, 0, 0.0)
    assert compare_topology(y_shape(), morphology.empty_tree(), TOLERANCE) == Topology(0, 0, 0.0)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12))
def test_any_tree_agrees_with_itself_and_roles_swap(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (
        morphology.build_tree(
            rng.normal(size=(n, 3)) * 30, np.array([-1, *[int(rng.integers(0, i)) for i in range(1, n)]])
        )
        for _ in range(2)
    )
    same = compare_topology(a, a, TOLERANCE)
    assert (same.splits, same.merges) == (0, 0)
    assert same.expected_run_length == pytest.approx(morphology.length(a))
    assert compare_topology(a, b, TOLERANCE).splits == compare_topology(b, a, TOLERANCE).merges
    assert compare_topology(a, b, TOLERANCE).expected_run_length <= morphology.length(b) + 1e-9
