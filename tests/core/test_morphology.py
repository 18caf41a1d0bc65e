"""Trees as parent arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import fine_voxel
from hpc_neuro.core.morphology import Tree, build_tree


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Random trees of 1 to 30 nodes, one or more roots, in any node order."""
    n = draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    parents = np.array([-1 if i == 0 or rng.random() < 0.05 else rng.integers(i) for i in range(n)], dtype=np.int64)
    order = rng.permutation(n)
    rank = np.argsort(order)
    shuffled = np.where(parents[order] >= 0, rank[parents[order]], -1)
    return morphology.build_tree(rng.normal(size=(n, 3)) * 10, shuffled, rng.uniform(0.5, 2, n))


@given(trees(), st.floats(0.1, 5))
def test_resampling_keeps_length_tips_and_branch_points(tree: Tree, step: float) -> None:
    fine = morphology.resample_tree(tree, step)
    assert np.isclose(morphology.length(fine), morphology.length(tree))
    assert len(morphology.tips(fine)) == len(morphology.tips(tree))
    assert len(morphology.branch_points(fine)) == len(morphology.branch_points(tree))
    assert morphology.edge_lengths(fine).max(initial=0) <= step + 1e-6
    # every old node is still there
    assert {tuple(p) for p in np.round(tree.points, 6)} <= {tuple(p) for p in np.round(fine.points, 6)}


@given(trees())
def test_a_subset_of_everything_is_the_tree(tree: Tree) -> None:
    same = morphology.select_nodes(tree, np.ones(len(tree), bool))
    assert np.array_equal(same.parents, tree.parents)
    assert np.array_equal(same.points, tree.points)


@given(trees(), st.integers(0, 2**32 - 1))
def test_a_subset_hangs_on_the_nearest_kept_ancestor(tree: Tree, seed: int) -> None:
    keep = np.random.default_rng(seed).random(len(tree)) < 0.6
    kept = morphology.select_nodes(tree, keep)
    old_index = np.flatnonzero(keep)

    for node, old_node in enumerate(old_index):
        ancestor = tree.parents[old_node]
        while ancestor >= 0 and not keep[ancestor]:
            ancestor = tree.parents[ancestor]
        parent = kept.parents[node]
        assert (old_index[parent] if parent >= 0 else -1) == ancestor


@given(trees())
def test_components_are_the_subsets_below_each_root(tree: Tree) -> None:
    owner = morphology.label_components(tree)
    for node, parent in enumerate(tree.parents):
        assert owner[node] == (owner[parent] if parent >= 0 else list(tree.roots).index(node))
    parts = morphology.split_components(tree)
    assert len(parts) == len(tree.roots)
    for number, part in enumerate(parts):
        wanted = morphology.select_nodes(tree, owner == number)
        for field in ("points", "radii", "parents", "types"):
            assert np.array_equal(getattr(part, field), getattr(wanted, field))
    again = morphology.split_components(morphology.concatenate_trees(parts))
    assert len(again) == len(parts)
    for one, other in zip(again, parts, strict=True):
        for field in ("points", "radii", "parents", "types"):
            assert np.array_equal(getattr(one, field), getattr(other, field))


def test_an_empty_tree_has_no_components() -> None:
    assert morphology.split_components(morphology.empty_tree()) == []
    assert len(morphology.concatenate_trees([])) == 0


@given(trees())
def test_euler_tips_and_branches_agree(tree: Tree) -> None:
    """Ends minus forks: in a forest, sum over nodes of (children - 1) = -roots."""
    assert (morphology.child_counts(tree) - 1).sum() == -len(tree.roots)


def test_a_cycle_is_refused() -> None:
    with pytest.raises(ValueError, match="cycle"):
        morphology.build_tree(np.zeros((3, 3)), np.array([1, 2, 0]))


def test_unsorted_parents_are_refused_by_the_constructor_and_sorted_by_build_tree() -> None:
    points, parents = np.arange(9.0).reshape(3, 3), np.array([1, 2, -1])
    with pytest.raises(ValueError, match="sort"):
        Tree(points, np.ones(3), parents, np.ones(3, np.int64))
    tree = morphology.build_tree(points, parents)
    assert tree.parents.tolist() == [-1, 0, 1]
    assert tree.points[0].tolist() == [6.0, 7.0, 8.0]


def test_a_through_going_root_is_no_branch_point() -> None:
    tree = morphology.build_tree(np.zeros((3, 3)), np.array([-1, 0, 0]))
    assert len(morphology.branch_points(tree)) == 0
    assert len(morphology.tips(tree)) == 2


def test_empty_tree() -> None:
    tree = morphology.empty_tree()
    assert morphology.length(tree) == 0
    assert len(morphology.resample_tree(tree, 1.0)) == 0
    assert len(morphology.select_nodes(tree, np.zeros(0, bool))) == 0


@given(st.tuples(*[st.floats(0.05, 20)] * 3))
def test_scaling_is_undone_by_its_inverse_and_knows_no_axis(factor: tuple[float, float, float]) -> None:
    tree = build_tree(np.array([[0.0, 0, 0], [1, 2, 3]]), np.array([-1, 0]), radii=[1.0, 2.0])
    there = morphology.scale_tree(tree, factor)
    back = morphology.scale_tree(there, tuple(1 / f for f in factor))
    np.testing.assert_allclose(back.points, tree.points, rtol=1e-12)
    np.testing.assert_allclose(back.radii, tree.radii, rtol=1e-12)
    turned = morphology.scale_tree(tree, factor[::-1])
    np.testing.assert_array_equal(turned.radii, there.radii)


def test_radii_follow_the_two_axes_sampled_alike() -> None:
    for size in ((1.0, 0.33, 0.33), (0.33, 1.0, 0.33), (0.33, 0.33, 1.0)):
        assert fine_voxel(size) == 0.33


@given(trees(), st.integers(0, 2**32 - 1))
def test_all_ancestors_of_marked_nodes_are_marked(tree: Tree, seed: int) -> None:
    is_marked = np.random.default_rng(seed).random(len(tree)) < 0.2
    expected = is_marked.copy()
    for node in np.flatnonzero(is_marked).tolist():
        while tree.parents[node] >= 0:
            node = int(tree.parents[node])
            expected[node] = True
    np.testing.assert_array_equal(morphology.mark_above(tree, is_marked), expected)
