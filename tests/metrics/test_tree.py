"""Tree distances against a plain double loop and known cases; matching; the stub before the root."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_neuro.core import morphology
from hpc_neuro.core.morphology import Tree
from hpc_neuro.metrics import list_metrics
from hpc_neuro.metrics import tree as metric
from hpc_neuro.metrics.cable import match_cable, remove_stub
from hpc_neuro.metrics.metric import Comparison
from hpc_neuro.metrics.segments import SegmentIndex

Points = list[tuple[float, float, float]]


def path(*points: tuple[float, float, float]) -> Tree:
    return morphology.build_tree(np.array(points, dtype=float), np.arange(len(points)) - 1)


def point_to_segment(p: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Plain definition, written apart from the code under test."""
    d = b - a
    t = 0.0 if not d.any() else min(1.0, max(0.0, float(np.dot(p - a, d) / np.dot(d, d))))
    return math.dist(p, a + t * d)


def plain_distances(one: Tree, two: Tree) -> dict[str, float]:
    """Vaa3D's rule as a double loop."""
    sums = []
    for a, b in ((one, two), (two, one)):
        away = []
        for i, parent in enumerate(a.parents):
            if parent < 0:
                continue
            p, q = a.points[i], a.points[parent]
            n = int(1 + math.dist(p, q) + 0.5)
            for j in range(n):
                at = p + (q - p) * (j / (n - 1) if n > 1 else 0)
                away.append(min(point_to_segment(at, b.points[c], b.points[k]) for c, k in b.edges))
        sums.append(np.array(away))
    far = [d[d >= 2.0] for d in sums]
    means = [f.mean() for f in far if len(f)]
    return {
        "esa": (sums[0].mean() + sums[1].mean()) / 2,
        "dsa": float(np.mean(means)) if means else 0.0,
        "pds": (len(far[0]) / len(sums[0]) + len(far[1]) / len(sums[1])) / 2,
    }


@st.composite
def trees(draw: st.DrawFn, smallest: int = 2) -> Tree:
    n = draw(st.integers(smallest, 8))
    coordinate = st.one_of(st.floats(-20, 20, width=32), st.integers(-3, 3).map(float))
    points = draw(st.lists(st.tuples(coordinate, coordinate, coordinate), min_size=n, max_size=n))
    parents = [-1] + [draw(st.integers(0, i - 1)) for i in range(1, n)]
    return morphology.build_tree(np.array(points, dtype=float), np.array(parents))


@settings(max_examples=60, deadline=None)
@given(trees(), trees())
def test_distances_equal_the_double_loop_and_are_symmetric(a: Tree, b: Tree) -> None:
    expected = plain_distances(a, b)
    assert metric.distances(a, b) == pytest.approx(expected, abs=1e-9)
    assert metric.distances(b, a) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(trees(), trees(), st.permutations([0, 1, 2]), st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3))
def test_distances_do_not_depend_on_axis_order_or_flips(
    a: Tree, b: Tree, order: list[int], sign: tuple[float, float, float]
) -> None:
    def reorient_tree(t: Tree) -> Tree:
        return Tree(t.points[:, order] * np.array(sign) + 7.0, t.radii, t.parents, t.types)

    before = metric.distances(a, b)
    after = metric.distances(reorient_tree(a), reorient_tree(b))
    assert after["esa"] == pytest.approx(before["esa"], abs=1e-9)
    m, m_moved = match_cable(a, b, 3.7), match_cable(reorient_tree(a), reorient_tree(b), 3.7)
    assert m_moved.f1 == pytest.approx(m.f1, abs=0.2)  # a piece exactly at the tolerance may fall on either side


@settings(max_examples=30, deadline=None)
@given(trees(1), trees(1), trees(1))
def test_directed_distance_obeys_the_triangle(a: Tree, b: Tree, c: Tree) -> None:
    """d(p, C) <= d(p, B) + max over B of d(., C), for every point p."""
    to_b, to_c = SegmentIndex(b).query(a.points), SegmentIndex(c).query(a.points)
    samples = morphology.resample_tree(b, 0.05).points
    assert np.all(to_c <= to_b + SegmentIndex(c).query(samples).max() + 0.05)


def test_distances_of_parallel_lines() -> None:
    a, b = path((0, 0, 0), (0, 0, 10)), path((0, 3, 0), (0, 3, 10))
    assert metric.distances(a, b) == {"esa": 3.0, "dsa": 3.0, "pds": 1.0}
    near = path((0, 1.5, 0), (0, 1.5, 10))
    assert metric.distances(a, near) == {"esa": 1.5, "dsa": 0.0, "pds": 0.0}


def test_far_means_two_or_more() -> None:
    a = path((0, 0, 0), (0, 0, 10))
    assert metric.distances(a, path((0, 2, 0), (0, 2, 10)))["pds"] == 1.0
    assert metric.distances(a, path((0, 1.999, 0), (0, 1.999, 10)))["pds"] == 0.0


def test_dsa_averages_only_directions_with_far_points() -> None:
    long, short = path((0, 0, 0), (0, 0, 20)), path((0, 0, 0), (0, 0, 10))
    distances = metric.distances(long, short)
    samples = np.arange(21.0)  # 21 samples one unit apart, the last 9 at distance 2..10 from the short path
    away = np.maximum(0, samples - 10)
    assert distances["esa"] == pytest.approx((away.mean() + 0) / 2)
    assert distances["dsa"] == pytest.approx(away[away >= 2].mean())
    assert distances["pds"] == pytest.approx(9 / 21 / 2)


def test_a_very_short_edge_is_sampled_once_at_the_child() -> None:
    a = path((0, 0, 0), (0, 0, 0.4))
    b = path((0, 5, 0.4), (0, 9, 0.4))
    assert metric.distances(a, b)["esa"] == pytest.approx(
        (5.0 + np.mean([math.hypot(y, 0) for y in (9, 8, 7, 6, 5)])) / 2
    )


def test_single_nodes_and_empty_trees() -> None:
    empty, dot = morphology.empty_tree(), path((0, 0, 0))
    assert metric.distances(empty, empty) == {"esa": 0.0, "dsa": 0.0, "pds": 0.0}
    assert metric.distances(dot, empty) == {"esa": math.inf, "dsa": math.inf, "pds": 1.0}
    assert metric.distances(dot, path((0, 3, 4))) == {"esa": 5.0, "dsa": 5.0, "pds": 1.0}
    line = path((0, 0, 0), (0, 0, 4))
    assert metric.distances(dot, line)["esa"] == pytest.approx((0 + 2) / 2)
    lone = morphology.build_tree(np.array([[0.0, 0, 0], [0, 0, 4], [0, 50, 0]]), np.array([-1, 0, -1]))
    assert metric.distances(lone, line)["esa"] == 0.0  # a node without cable beside a tree does not count, as in Vaa3D


def test_nearest_segment_is_exact_among_very_long_and_coincident_edges() -> None:
    rng = np.random.default_rng(0)
    points = np.concatenate([np.zeros((40, 3)), rng.normal(size=(200, 3)) * 5, [[0, 0, 1e4], [3, 3, -1e4]]])
    parents = np.array([-1] + [int(rng.integers(0, i)) for i in range(1, len(points))])
    tree = morphology.build_tree(points, parents)
    queries = rng.normal(size=(300, 3)) * [5, 5, 3000]
    expected = [min(point_to_segment(q, tree.points[c], tree.points[p]) for c, p in tree.edges) for q in queries]
    np.testing.assert_allclose(SegmentIndex(tree).query(queries), expected, atol=1e-9)


def test_match_counts_cable_length() -> None:
    gold = path((0, 0, 0), (0, 0, 100))
    result = match_cable(path((0, 3, 0), (0, 3, 50)), gold, tolerance=4.0)
    assert result.precision == 1.0
    assert result.recall == pytest.approx((50 + math.sqrt(16 - 9)) / 100, abs=0.01)
    assert result.f1 == pytest.approx(2 * result.recall / (1 + result.recall))
    assert (result.predicted_length, result.gold_length) == (50, 100)
    assert match_cable(path((0, 4.01, 0), (0, 4.01, 100)), gold, tolerance=4.0).f1 == 0.0
    assert match_cable(gold, gold, tolerance=0.5).f1 == 1.0


def test_match_of_empty_and_single_trees() -> None:
    empty, dot, line = morphology.empty_tree(), path((0, 0, 0)), path((0, 0, 0), (0, 0, 9))
    assert match_cable(empty, empty, 4.0).f1 == 1.0
    assert (match_cable(empty, line, 4.0).precision, match_cable(empty, line, 4.0).recall) == (0.0, 0.0)
    assert match_cable(line, empty, 4.0).f1 == 0.0
    assert match_cable(dot, line, 4.0).precision == 1.0
    assert match_cable(dot, path((0, 0, 1)), 4.0).f1 == 1.0
    with pytest.raises(ValueError, match="above 0"):
        match_cable(line, line, 0.0)


@settings(max_examples=60, deadline=None)
@given(trees(), trees(), st.floats(0.5, 20))
def test_match_grows_with_tolerance_and_swaps_roles(a: Tree, b: Tree, tolerance: float) -> None:
    m, wider, turned = match_cable(a, b, tolerance), match_cable(a, b, 2 * tolerance), match_cable(b, a, tolerance)
    assert (turned.precision, turned.recall) == (m.recall, m.precision)
    assert wider.precision >= m.precision
    assert wider.recall >= m.recall
    assert 0 <= m.f1 <= 1


def test_stub_behind_the_gold_root_is_dropped_once() -> None:
    gold = path((0, 0, 0), (0, 0, 50))
    back = [(0, 0, 50), (0, 0, 0), (0, 0, -30)]
    predicted = path(*back)
    kept = remove_stub(predicted, gold, tolerance=4.0)
    assert morphology.length(kept) == pytest.approx(58, abs=1.0)  # the gold cable and the ball of 8 around its root
    assert match_cable(kept, gold, 4.0).precision > match_cable(predicted, gold, 4.0).precision
    assert match_cable(kept, gold, 4.0).recall == 1.0

    two = morphology.build_tree(np.array([*back, (0, 20, 0)], dtype=float), np.array([-1, 0, 1, 1]))
    kept = remove_stub(two, gold, 4.0)
    assert morphology.length(kept) == pytest.approx(58 + 20, abs=1.0)  # only the longest of the two false arms goes


def test_nothing_else_is_dropped_as_a_stub() -> None:
    gold = path((0, 0, 0), (0, 0, 50))
    side = morphology.build_tree(
        np.array([(0, 0, 0), (0, 0, 50), (0, 0, 25), (0, 60, 25)], dtype=float), np.array([-1, 2, 0, 2])
    )
    assert morphology.length(remove_stub(side, gold, 4.0)) == morphology.length(side)  # not at the root
    far = path((0, 30, 0), (0, 30, 50))
    assert remove_stub(far, gold, 4.0) is far  # does not touch the root
    loop = path((0, 0, 50), (0, 0, 0), (0, 0, -20), (0, 20, 20), (0, 2, 40))
    assert morphology.length(remove_stub(loop, gold, 4.0)) == morphology.length(loop)  # comes back to gold
    assert len(remove_stub(morphology.empty_tree(), gold, 4.0)) == 0


def describe(tree: Tree) -> dict[str, float]:
    """The metrics that describe a tree alone."""
    comparison = Comparison(
        predicted_mask=lambda box: np.zeros(box.shape, bool),
        gold_mask=lambda box: np.zeros(box.shape, bool),
        predicted_tree=tree,
        gold_tree=morphology.empty_tree(),
        shape=(9, 9, 9),
        voxel_size=(1.0, 1.0, 2.0),
    )
    return {m.key: m.compute(comparison) for m in list_metrics() if m.describes_tree}


def test_a_tree_is_described_by_cable_tips_and_branch_points() -> None:
    y = morphology.build_tree(
        np.array([(0, 0, 0), (0, 0, 3), (0, 4, 3), (0, -4, 3)], dtype=float), np.array([-1, 0, 1, 1])
    )
    assert describe(y) == {"length_um": 14.0, "tips": 2, "branch_points": 1}
    assert describe(morphology.empty_tree()) == {"length_um": 0.0, "tips": 0, "branch_points": 0}


def test_the_points_that_outline_a_soma_are_no_tips() -> None:
    points = np.array([(0, 0, 0), (0, 3, 0), (0, -3, 0), (0, 0, 5), (0, 0, 9), (0, 4, 9)], dtype=float)
    parents, types = np.array([-1, 0, 0, 0, 3, 3]), np.array([1, 1, 1, 3, 3, 3])
    three_points = morphology.build_tree(points, parents, types=types)
    tree = metric.drop_soma_outline(three_points)
    assert len(tree) == 4
    assert describe(tree) == describe(morphology.build_tree(points[[0, 3, 4, 5]], np.array([-1, 0, 1, 1])))
    assert (describe(three_points)["tips"], describe(three_points)["branch_points"]) == (2, 1)

    # A soma from which a neurite leaves at its second point, and a tree that is all of type 1, stay.
    chain = morphology.build_tree(points, np.array([-1, 0, 1, 2, 3, 4]), types=types)
    all_soma = morphology.build_tree(points, parents, types=1)
    assert metric.drop_soma_outline(chain) is chain
    assert metric.drop_soma_outline(all_soma) is all_soma
    assert len(metric.drop_soma_outline(morphology.empty_tree())) == 0


def test_a_real_neuron_against_its_noisy_copy(real_data: Path) -> None:
    rows = np.loadtxt(real_data / "diadem_op" / "OP_7.swc")
    tree = morphology.build_tree(rows[:, [4, 3, 2]], np.where(rows[:, 6] < 0, -1, rows[:, 6] - 1).astype(int))
    moved = Tree(tree.points + np.array([0, 0, 1.0]), tree.radii, tree.parents, tree.types)
    assert metric.distances(tree, tree) == pytest.approx({"esa": 0.0, "dsa": 0.0, "pds": 0.0}, abs=1e-12)
    assert 0 < metric.distances(tree, moved)["esa"] <= 1.0
    assert match_cable(moved, tree, 4.0).f1 == 1.0
    few, other = (morphology.select_nodes(t, np.arange(len(t)) < 25) for t in (tree, moved))
    assert metric.distances(few, other) == pytest.approx(plain_distances(few, other))
