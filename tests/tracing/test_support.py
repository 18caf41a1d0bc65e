from __future__ import annotations

import numpy as np

from hpc_neuro.core.morphology import Tree
from hpc_neuro.tracing.support import find_supported_nodes


def make_fork() -> Tree:
    """A stem of 20 voxels along x with two branches of 20, one node a voxel."""
    stem = [(0.0, 0.0, float(x)) for x in range(20)]
    up = [(0.0, float(y), 19.0) for y in range(1, 21)]
    down = [(0.0, -float(y), 19.0) for y in range(1, 21)]
    parents = [-1, *range(19), 19, *range(20, 39), 19, *range(40, 59)]
    return Tree(np.array(stem + up + down), np.ones(60), np.array(parents), np.zeros(60, dtype=np.int64))


def test_an_end_that_is_not_shown_is_dropped_and_a_gap_is_kept() -> None:
    tree, support = make_fork(), np.ones(60)
    support[8:18] = 0
    support[40:] = 0
    keep = find_supported_nodes(tree, support)
    assert keep[:40].all()

    # The first voxels of the branch are judged together with the stem.
    assert not keep[45:].any()


def test_only_the_root_stays_where_nothing_is_shown() -> None:
    keep = find_supported_nodes(make_fork(), np.zeros(60))
    assert np.flatnonzero(keep).tolist() == [0]


def test_short_dark_places_near_a_tip_are_kept() -> None:
    tree, support = make_fork(), np.ones(60)
    support[37:40] = 0
    assert find_supported_nodes(tree, support).all()


def test_the_result_does_not_depend_on_how_densely_nodes_lie() -> None:
    tree = make_fork()
    every = np.array([0, *range(1, 19, 3), 19, *range(21, 40, 3), 39, *range(41, 60, 3), 59])
    every = np.unique(every)
    place = {int(node): number for number, node in enumerate(every)}
    parents = []
    for node in every.tolist():
        parent = int(tree.parents[node])
        while parent >= 0 and parent not in place:
            parent = int(tree.parents[parent])
        parents.append(place.get(parent, -1))
    sparse = Tree(tree.points[every], np.ones(len(every)), np.array(parents), np.zeros(len(every), dtype=np.int64))

    support = np.ones(60)
    support[44:] = 0
    dense_reach = np.abs(tree.points[find_supported_nodes(tree, support)][:, 1]).max()
    sparse_keep = find_supported_nodes(sparse, support[every])
    below = sparse.points[sparse_keep][:, 1].min()
    assert dense_reach == 20
    assert abs(below - tree.points[find_supported_nodes(tree, support)][:, 1].min()) <= 3
