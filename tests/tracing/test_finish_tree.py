"""Rooting all pieces at once, against one piece at a time; and bridges among specks, against all that is possible."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_neuro.core.morphology import Tree, length
from hpc_neuro.tracing import TraceConfig, trace
from hpc_neuro.tracing.finish_tree import root_trees
from hpc_neuro.tracing.graph import CenterlineGraph
from tests.core.test_morphology import trees


@given(trees(), st.booleans())
def test_every_piece_is_rooted_as_if_it_were_alone(forest: Tree, given_roots: bool) -> None:
    lines = CenterlineGraph(forest.points, forest.radii, forest.radii, forest.edges, np.arange(len(forest)))
    starts = forest.roots[::-1].tolist() if given_roots else []
    rooted = [tree for tree, _ in root_trees(lines, starts, 5.0, 0.0)]
    assert len(rooted) == len(forest.roots)
    below = {int(root): [int(root)] for root in forest.roots}
    for node in range(len(forest)):
        top = node
        while forest.parents[top] >= 0:
            top = int(forest.parents[top])
        below[top].extend([node] if node != top else [])
    order = starts or [int(r) for r in sorted(below, key=lambda r: min(below[r]))]
    for root, tree in zip(order, rooted, strict=True):
        nodes = np.sort(below[root])
        rank = {int(node): i for i, node in enumerate(nodes)}
        edges = np.array([[rank[a], rank[b]] for a, b in forest.edges.tolist() if a in rank], dtype=np.int64)
        alone = CenterlineGraph(
            forest.points[nodes], forest.radii[nodes], forest.radii[nodes], edges.reshape(-1, 2), np.arange(len(nodes))
        )
        ((same, _),) = root_trees(alone, [rank[root]] if given_roots else [], 5.0, 0.0)
        for part in ("points", "radii", "parents", "types"):
            np.testing.assert_array_equal(getattr(tree, part), getattr(same, part))
        assert np.isclose(length(tree), sum(np.linalg.norm(alone.points[a] - alone.points[b]) for a, b in edges))


@pytest.mark.parametrize("seed", range(3))
def test_specks_around_a_broken_neurite_change_nothing(seed: int) -> None:
    """A voxel alone has no cable that a bridge could be worth; thousands are dismissed before anything is looked at."""
    clean = np.zeros((12, 48, 64), np.float32)
    clean[5:8, 20:23, 4:30] = clean[5:8, 20:23, 36:60] = 1
    noisy, rng = clean.copy(), np.random.default_rng(seed)
    z, y, x = (rng.integers(0, n, 900) for n in clean.shape)
    free = np.abs(y - 21) > 6
    noisy[z[free] // 2 * 2, y[free] // 2 * 2, x[free] // 2 * 2] = 1  # none touches another
    root = [(6.0, 21.0, 4.0)]
    for cfg in (TraceConfig(min_voxels=1), TraceConfig(min_voxels=12)):
        (with_specks,) = trace(noisy, (1.0, 1.0, 1.0), roots=root, cfg=cfg)
        (without,) = trace(clean, (1.0, 1.0, 1.0), roots=root, cfg=cfg)
        np.testing.assert_allclose(with_specks.points, without.points)
        assert length(without) > 50  # over the break
